"""/v1/adapters: what is served, and changing that."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request, Response

from hydraserve.errors import UnknownAdapterError
from hydraserve.server.cards import adapter_card, residency_card
from hydraserve.server.keys import Role
from hydraserve.server.lifecycle.served import current_scope, may_see
from hydraserve.server.lifecycle.service import AdapterService
from hydraserve.server.schemas import AdapterCard, AdapterList, AddAdapter, Removed, ReplaceAdapter

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


def adapter_service(request: Request) -> AdapterService:
    return cast(AdapterService, request.app.state.hydraserve_adapters)


Service = Annotated[AdapterService, Depends(adapter_service)]


@router.get("")
async def list_adapters(service: Service) -> AdapterList:
    """The adapters that the sender may use; for administrators also what the engine holds."""
    residency = await service.residency()
    scope = current_scope.get()
    is_admin = scope is None or scope.principal.role is Role.ADMIN
    return AdapterList(
        data=[adapter_card(service, entry, residency) for entry in service.registry if may_see(entry.name)],
        residency=residency_card(service, residency) if is_admin else None,
    )


@router.post("")
async def add_adapter(body: AddAdapter, service: Service, response: Response) -> AdapterCard:
    """Read an adapter, or compose one of others, and serve it. 201, or 200 when the same was there; 409 when the name
    stands for another."""
    entry, is_new = await service.add(body.name, body.origin(), pin=body.pin, digest=body.digest)
    response.status_code = 201 if is_new else 200
    return adapter_card(service, entry, await service.residency())


@router.post("/{name:path}/pin")
async def pin_adapter(name: str, service: Service) -> AdapterCard:
    """Keep an adapter in host memory and in a slot."""
    return adapter_card(service, await service.pin(name, True), await service.residency())


@router.post("/{name:path}/unpin")
async def unpin_adapter(name: str, service: Service) -> AdapterCard:
    """Undo pin."""
    return adapter_card(service, await service.pin(name, False), await service.residency())


@router.post("/{name:path}/prefetch")
async def prefetch_adapter(name: str, service: Service) -> AdapterCard:
    """Bring an adapter into host memory before requests ask for it."""
    return adapter_card(service, await service.prefetch(name), await service.residency())


@router.get("/{name:path}")
async def get_adapter(name: str, service: Service) -> AdapterCard:
    """One adapter; 404 also for one that the sender may not use."""
    if not may_see(name):
        raise UnknownAdapterError(what="adapter", got=repr(name), expected="a name that is served")
    return adapter_card(service, service.registry.get(name), await service.residency())


@router.put("/{name:path}")
async def replace_adapter(name: str, body: ReplaceAdapter, service: Service, response: Response) -> AdapterCard:
    """Read an adapter again, or from another source. Running requests end with the old content, new ones get the new.
    201 when there was none of this name."""
    entry, is_new = await service.replace(name, body.source, pin=body.pin, digest=body.digest)
    response.status_code = 201 if is_new else 200
    return adapter_card(service, entry, await service.residency())


@router.delete("/{name:path}")
async def remove_adapter(
    name: str, service: Service, response: Response, force: bool = False, wait: bool = True
) -> Removed:
    """Stop serving an adapter at once, and free what it took when its requests have ended (force: end them now).
    Answers when all is freed, or with wait=false at once, with 202."""
    await service.remove(name, force=force, wait=wait)
    response.status_code = 200 if wait else 202
    return Removed(name=name)
