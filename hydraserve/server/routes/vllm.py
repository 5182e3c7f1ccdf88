"""vLLM's own adapter routes, over our registry: existing operators and clients go on as they are."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response

from hydraserve.adapters.sources import without_secrets
from hydraserve.errors import AdapterConflictError
from hydraserve.server.errors import error_response
from hydraserve.server.lifecycle.served import may_see, told_all
from hydraserve.server.routes.adapters import Service
from hydraserve.server.schemas import LoadLora, UnloadLora

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.post("/load_lora_adapter")
async def load_lora_adapter(body: LoadLora, service: Service) -> Response:
    """Serve an adapter, or with load_inplace read it again under the same name."""
    if body.load_inplace:
        await service.replace(body.lora_name, body.lora_path)
    elif service.registry.find(body.lora_name) is not None:
        error = AdapterConflictError(
            what="adapter",
            got=f"{body.lora_name!r}, which has already been loaded",
            expected="a name that is free",
            fix="set 'load_inplace' to true to load it again",
        )
        return error_response(error, HTTPStatus.BAD_REQUEST)  # as vLLM has it
    else:
        await service.add(body.lora_name, body.lora_path)
    return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLora, service: Service) -> Response:
    """Stop serving an adapter; what it took is freed when its running requests have ended."""
    await service.remove(body.lora_name, wait=False)
    return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/models")
async def list_models(request: Request, service: Service) -> dict[str, Any]:
    """The base model, and the adapters that the sender may use."""
    models = request.app.state.openai_serving_models
    listed: dict[str, Any] = (await models.registry.show_available_models()).model_dump()
    base = listed["data"][0]
    for entry in service.registry:
        if may_see(entry.name):
            card = {
                **base,
                "id": entry.name,
                "root": without_secrets(entry.source) if told_all() else None,
                "parent": base["id"],
                "max_model_len": None,
            }
            listed["data"].append({**card, "created": int(entry.registered_at)})
    return listed
