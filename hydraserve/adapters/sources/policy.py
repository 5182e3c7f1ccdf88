"""Which sources of adapters an operator allows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hydraserve.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from hydraserve.errors import SourceForbiddenError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)
_USERINFO = re.compile(r"//[^/?#]*@")  # to the last @ before the path: a password may hold one


def split_scheme(source: str) -> tuple[str, str]:
    """("s3", "bucket/key"); ("", path) for a path, with or without file://."""
    match = _SCHEME.fullmatch(source)
    if match is None:
        return "", source
    scheme, rest = match[1].lower(), match[2]
    return ("", rest) if scheme == "file" else (scheme, rest)


def without_secrets(source: str) -> str:
    """The source as it may be shown: without user, password and query (which may hold a signature)."""
    scheme, _ = split_scheme(source)
    return _USERINFO.sub("//", source).partition("?")[0] if scheme else source


@dataclass(frozen=True)
class SourcePolicy:
    """Local folders and URL prefixes that adapters may be loaded from while the server runs.

    roots:  folders; anything below them, by real path, is allowed.
    urls:   prefixes such as "hf://", "hf://my-org/", "s3://my-bucket/".
    limits: how large an adapter may be.
    """

    roots: tuple[Path, ...] = ()
    urls: tuple[str, ...] = ()
    limits: AdapterLimits = DEFAULT_LIMITS

    @classmethod
    def of(cls, allowed: Iterable[str], limits: AdapterLimits = DEFAULT_LIMITS) -> SourcePolicy:
        """From what the operator wrote: paths, and URL prefixes."""
        split = [(text, *split_scheme(text)) for text in allowed]
        roots = tuple(Path(path).expanduser().resolve() for _, scheme, path in split if not scheme)
        return cls(roots, tuple(text for text, scheme, _ in split if scheme), limits)

    def check_url(self, source: str) -> None:
        """Raises SourceForbiddenError."""
        # "s3://bucket" allows that bucket and not "s3://bucket-2"; dots could climb out of an allowed prefix.
        allowed = any(source.startswith(url if url.endswith("/") else f"{url}/") or source == url for url in self.urls)
        if not allowed or "/../" in f"{source.partition('?')[0]}/":
            raise self._forbidden(without_secrets(source))

    def check_path(self, path: Path) -> Path:
        """The real path of something below an allowed folder. Raises SourceForbiddenError."""
        if ".." in path.parts:
            raise self._forbidden(f"{path}, with '..' in it")
        try:
            real = path.expanduser().resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, links in a circle
            raise self._forbidden(f"{path}: {error}") from error
        if not any(real.is_relative_to(root) for root in self.roots):
            raise self._forbidden(str(path) if real == path else f"{path}, which is {real}")
        return real

    def _forbidden(self, got: str) -> SourceForbiddenError:
        return SourceForbiddenError(
            what="source",
            got=got,
            expected=f"something below {', '.join([*map(str, self.roots), *self.urls]) or '(nothing is allowed)'}",
            fix="start the server with --allow-source PATH or --allow-source URL-PREFIX",
        )
