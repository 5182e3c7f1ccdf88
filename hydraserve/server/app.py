"""Our part of vLLM's OpenAI app: an endpoint plugin (entry point `vllm.endpoint_plugins`)."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from hydraserve.config import ServerSettings
from hydraserve.errors import HydraServeError
from hydraserve.metrics import Metrics
from hydraserve.server.errors import handle_error
from hydraserve.server.keys import KeyRing
from hydraserve.server.metrics import ServerMetrics
from hydraserve.server.middleware import RequestMiddleware
from hydraserve.server.routes import adapters, inspector, metrics, routing, vllm
from hydraserve.server.security import Gate, is_loopback
from hydraserve.server.startup import AdapterServer


class HydraEndpoints:
    """What vLLM asks of an endpoint plugin: routes, then state once the engine runs.

    Started by plain `vllm serve`, without our settings, it leaves vLLM's routes and keys alone.
    """

    name = "hydraserve_endpoints"
    required_tasks = None

    def __init__(self) -> None:
        self._server: AdapterServer | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.title = "HydraServe"
        args = app.state.args
        settings: ServerSettings | None = getattr(args, "hydraserve", None)
        if settings is None:
            return
        keys = KeyRing(settings.api_keys, settings.admin_key, settings.key_file)
        local = bool(args.uds) or (bool(args.host) and is_loopback(args.host))
        gate = Gate(keys, local_admin=local and not keys.has_admin_key and not keys.has_tenants)
        # vLLM adds its own middleware later and so around this one; its authentication is off, ours does all of it.
        app.add_middleware(RequestMiddleware, gate=gate)
        app.add_exception_handler(HydraServeError, handle_error)
        app.include_router(adapters.router)
        for routes in (vllm, routing, inspector, metrics):
            app.include_router(routes.router)
        app.router.lifespan_context = self._ending_with(app.router.lifespan_context)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called when the base model is loaded, before the first request is accepted: load the adapters."""
        settings: ServerSettings | None = getattr(args, "hydraserve", None)
        if settings is not None and engine_client is not None:
            self._server = AdapterServer(settings)
            watched = engine_client.hydra_watched
            state.hydraserve_metrics = ServerMetrics(watched, Metrics(), settings.metrics_adapters)
            state.hydraserve_tracer = routing.Tracer(watched)
            runtime = state.hydraserve_metrics.meter(engine_client.hydra_adapters)
            await self._server.start(runtime, state.openai_serving_models)
            assert self._server.service is not None
            state.hydraserve_adapters = self._server.service
            await state.hydraserve_metrics.start(self._server.service, await runtime.sizes())
        host = args.host or "127.0.0.1"
        where = f"unix:{args.uds}" if args.uds else f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
        print(f"hydraserve is ready on {where} (API /v1, metrics /metrics)", file=sys.stderr, flush=True)

    def _ending_with(self, lifespan: Any) -> Any:
        """The app's lifespan, and after it the end of what runs for the adapters."""

        @asynccontextmanager
        async def both(app: FastAPI) -> AsyncIterator[Any]:
            async with lifespan(app) as state:
                yield state
            if self._server is not None:
                await self._server.close()

        return both
