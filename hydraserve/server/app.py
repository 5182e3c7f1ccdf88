"""Our part of vLLM's OpenAI app: an endpoint plugin (entry point `vllm.endpoint_plugins`)."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from fastapi import FastAPI


class HydraEndpoints:
    """What vLLM asks of an endpoint plugin: routes, then state once the engine runs."""

    name = "hydraserve_endpoints"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.title = "HydraServe"

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called when base model and adapters are loaded, just before the first request is accepted."""
        host = args.host or "127.0.0.1"
        where = f"unix:{args.uds}" if args.uds else f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
        print(f"hydraserve is ready on {where} (API /v1, metrics /metrics)", file=sys.stderr, flush=True)
