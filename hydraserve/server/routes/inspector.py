"""/inspector: a page to look at adapters' routers. Its files need nothing from outside; its calls carry the API key."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from hydraserve.errors import UnknownAdapterError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent.parent / "static"
_FILES = {path.name: path for path in _FOLDER.iterdir() if path.suffix in (".html", ".css", ".js")}
_HEADERS = {
    # Nothing but this server's own files and routes, and no other page around it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/inspector")
async def page() -> FileResponse:
    """The page itself."""
    return FileResponse(_FILES["inspector.html"], headers=_HEADERS)


@router.get("/inspector/{name}")
async def file(name: str) -> FileResponse:
    """What it is made of."""
    if name not in _FILES:
        raise UnknownAdapterError(what="file", got=repr(name), expected=", ".join(sorted(_FILES)))
    return FileResponse(_FILES[name], headers=_HEADERS)
