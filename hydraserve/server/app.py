"""Our part of vLLM's OpenAI app: an endpoint plugin (entry point `vllm.endpoint_plugins`)."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY

from hydraserve.config import ServerSettings
from hydraserve.errors import HydraServeError
from hydraserve.metrics import Metrics
from hydraserve.server.errors import handle_error
from hydraserve.server.gateway import LoraRequestsInfo
from hydraserve.server.health import Readiness
from hydraserve.server.keys import KeyRing
from hydraserve.server.limits import LimitMiddleware
from hydraserve.server.metrics import ServerMetrics
from hydraserve.server.middleware import RequestMiddleware
from hydraserve.server.routes import adapters, health, inspector, metrics, routing, vllm
from hydraserve.server.security import Gate, is_loopback
from hydraserve.server.startup import AdapterServer
from hydraserve.server.traffic import Traffic

# After the last request, for answers that clients do not read.
_CLOSE_S = 5


class HydraEndpoints:
    """What vLLM asks of an endpoint plugin: routes, then state once the engine runs.

    Started by plain `vllm serve`, without our settings, it leaves vLLM's routes and keys alone.
    """

    name = "hydraserve_endpoints"
    required_tasks = None

    def __init__(self) -> None:
        self._server: AdapterServer | None = None
        self._traffic = Traffic(limit=0)

    def attach_router(self, app: FastAPI) -> None:
        app.title = "HydraServe"
        args = app.state.args
        settings: ServerSettings | None = getattr(args, "hydraserve", None)
        if settings is None:
            return
        keys = KeyRing(settings.api_keys, settings.admin_key, settings.key_file)
        local = bool(args.uds) or (bool(args.host) and is_loopback(args.host))
        gate = Gate(keys, local_admin=local and not keys.has_admin_key and not keys.has_tenants)
        app.add_middleware(LimitMiddleware, traffic=self._traffic, max_body=settings.max_body)
        # vLLM adds its own middleware later and so around this one; its authentication is off, ours does all of it.
        app.add_middleware(RequestMiddleware, gate=gate)
        app.add_exception_handler(HydraServeError, handle_error)
        app.include_router(adapters.router)
        for routes in (vllm, routing, inspector, metrics, health):
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
            self._open(engine_client, state, settings)
        host = args.host or "127.0.0.1"
        where = f"unix:{args.uds}" if args.uds else f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
        print(f"hydraserve is ready on {where} (API /v1, metrics /metrics)", file=sys.stderr, flush=True)

    def _open(self, engine_client: Any, state: Any, settings: ServerSettings) -> None:
        """Take requests, until the engine is to end."""
        assert self._server is not None
        assert self._server.service is not None
        config = engine_client.vllm_config
        at_once = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        self._traffic.limit = at_once + settings.max_queued
        registry = self._server.service.registry
        state.hydraserve_readiness = Readiness(self._traffic, lambda: bool(engine_client.errored), lambda: registry)
        engine_client.hydra_ending.attach(self._traffic.drain)
        engine_client.hydra_release_lora_gauge()
        REGISTRY.register(LoraRequestsInfo(self._server.service, config.lora_config.max_loras))

    def _ending_with(self, lifespan: Any) -> Any:
        """The app's lifespan, and after it the end of what runs for the adapters."""

        @asynccontextmanager
        async def both(app: FastAPI) -> AsyncIterator[Any]:
            app.state.server.config.timeout_graceful_shutdown = _CLOSE_S  # uvicorn's; its default is to wait for ever
            async with lifespan(app) as state:
                yield state
            if self._server is not None:
                await self._server.close()

        return both
