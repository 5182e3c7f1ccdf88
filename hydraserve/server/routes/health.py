"""GET /ready, beside vLLM's /health: the one asks for requests, the other says that the engine lives."""

from __future__ import annotations

from http import HTTPStatus
from typing import cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from hydraserve.server.health import Readiness

router = APIRouter()


@router.get("/ready", responses={HTTPStatus.SERVICE_UNAVAILABLE: {"description": "Requests should go elsewhere."}})
async def ready(request: Request) -> JSONResponse:
    """200 when the server takes requests, else 503 with the reason. It listens only once its model and the adapters of
    its command line are loaded."""
    obstacle = cast(Readiness, request.app.state.hydraserve_readiness).obstacle()
    if obstacle is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": obstacle}, status_code=HTTPStatus.SERVICE_UNAVAILABLE)
