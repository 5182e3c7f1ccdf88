"""What is asked of an adapter and cannot be: each raises, or makes, the error that says so."""

from __future__ import annotations

from hydraserve.adapters.registry import AdapterEntry, Origin
from hydraserve.adapters.sources import without_secrets
from hydraserve.adapters.store import StoredAdapter
from hydraserve.errors import AdapterConflictError, UnknownAdapterError


def unknown(name: str) -> UnknownAdapterError:
    return UnknownAdapterError(what="adapter", got=repr(name), expected="a name that is served")


def refuse_directorys(entry: AdapterEntry, origin: Origin) -> None:
    """What a directory wishes is changed there: taken away here, it would be back with the next start."""
    if entry.origin is Origin.DIRECTORY and origin is not Origin.DIRECTORY:
        raise AdapterConflictError(
            what="adapter",
            got=f"{entry.name!r}, which comes from --adapter-dir",
            expected="an adapter that was loaded at run time",
            fix="change or remove its folder there",
        )


def refuse_other_source(entry: AdapterEntry, source: str) -> None:
    if entry.source != source:
        raise AdapterConflictError(
            what="adapter",
            got=f"{entry.name!r}, which is served from {without_secrets(entry.source)}",
            expected="a name that is free",
            fix="choose another name, or replace the adapter (PUT)",
        )


def refuse_other_content(stored: StoredAdapter, digest: str | None, source: str) -> None:
    """digest: what the content has to be; None: anything."""
    if digest is not None and stored.digest != digest.lower():
        raise AdapterConflictError(
            what="content",
            got=f"digest {stored.digest}",
            expected=f"digest {digest}",
            where=f"adapter {without_secrets(source)}",
        )
