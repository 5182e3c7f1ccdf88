"""What is told about adapters over HTTP."""

from __future__ import annotations

from hydraserve.adapters.registry import AdapterEntry
from hydraserve.adapters.runtime import Residency
from hydraserve.adapters.sources import without_secrets
from hydraserve.server.lifecycle.served import told_all
from hydraserve.server.lifecycle.service import AdapterService
from hydraserve.server.schemas import CONCERN_OTHERS, AdapterCard, AdapterState, ProgressCard, ResidencyCard


def adapter_card(service: AdapterService, entry: AdapterEntry, residency: Residency) -> AdapterCard:
    """One adapter, as it is now, as far as the sender of the current request may know."""
    served, version = service.current.get(entry.name), entry.version
    progress = service.progress.get(entry.name)
    card = AdapterCard(
        name=entry.name,
        source=without_secrets(entry.source),
        origin=entry.origin,
        state=_state(service, entry, residency),
        pinned=entry.pinned,
        version=version.digest if version else None,
        format=version.format if version else None,
        rank=version.rank if version else None,
        heads=version.heads if version else None,
        modules=list(version.targets) if version else None,
        module_count=version.modules if version else None,
        bytes=version.nbytes if version else None,
        dtypes=list(version.dtypes) if version else None,
        base_model=version.base_model if version else None,
        requests_running=len(served.request_ids) if served else 0,
        requests_served=served.served if served else 0,
        last_used=served.last_used if served else None,
        loaded_at=entry.read_at,
        load_seconds=entry.load_seconds,
        progress=ProgressCard(done=progress.done, total=progress.total) if progress else None,
        error=str(entry.failure) if entry.failure else None,
    )
    return card if told_all() else card.model_copy(update=dict.fromkeys(CONCERN_OTHERS))


def residency_card(service: AdapterService, residency: Residency) -> ResidencyCard:
    """The engine's memory, with adapters' names instead of its numbers."""
    names = {served.adapter_id: name for name, served in service.current.items()}
    return ResidencyCard(
        slots=[None if i is None else names.get(i, f"(leaving: {i})") for i in residency.slots],
        host_adapters=len(residency.host),
        host_capacity=service.cache.capacity,
        host_bytes=sum(residency.host.values()),
        kv_blocks=residency.blocks,
        kv_blocks_free=residency.free_blocks,
        kv_blocks_cached=residency.cached_blocks,
        process_bytes=residency.process_bytes,
    )


def _state(service: AdapterService, entry: AdapterEntry, residency: Residency) -> AdapterState:
    if entry.name in service.progress:
        return AdapterState.LOADING
    served = service.current.get(entry.name)
    if served is None:
        return AdapterState.FAILED if entry.failure else AdapterState.UNREAD
    if served.adapter_id in residency.slots:
        return AdapterState.SLOT
    if served.adapter_id in residency.host:
        return AdapterState.HOST
    return AdapterState.LOADING if service.cache.loading(served.stored.digest) else AdapterState.DISK
