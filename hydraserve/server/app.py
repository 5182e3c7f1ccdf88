"""Our part of vLLM's OpenAI app: an endpoint plugin (entry point `vllm.endpoint_plugins`)."""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from hydraserve.config import ServerSettings
from hydraserve.errors import HydraServeError
from hydraserve.metrics import Metrics
from hydraserve.server.api_servers.forward import ForwardMiddleware
from hydraserve.server.api_servers.front import FoundAdapters, Front
from hydraserve.server.api_servers.keeper import Keeper
from hydraserve.server.errors import handle_error
from hydraserve.server.health import Readiness
from hydraserve.server.keys import KeyRing, Principal
from hydraserve.server.lifecycle.served import name_of
from hydraserve.server.limits import LimitMiddleware
from hydraserve.server.metrics.gateway import LoraRequestsInfo
from hydraserve.server.metrics.series import ServerMetrics, show_every_second
from hydraserve.server.middleware import RequestMiddleware
from hydraserve.server.routes import adapters, health, inspector, metrics, routing, vllm
from hydraserve.server.security import Gate, is_loopback
from hydraserve.server.startup import AdapterServer
from hydraserve.server.traffic import Traffic

# After the last request, for answers that clients do not read.
_CLOSE_S = 5
# Until the API server processes have found one another: the adapters of the command line are read in between.
_START_S = 600.0


class HydraEndpoints:
    """What vLLM asks of an endpoint plugin: routes, then state once the engine runs.

    Started by plain `vllm serve`, without our settings, it leaves vLLM's routes and keys alone.
    """

    name = "hydraserve_endpoints"
    required_tasks = None

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._keys = KeyRing()
        self._traffic = Traffic(limit=0)
        self._server: AdapterServer | None = None  # of the process that keeps the adapters
        self._keeper: Keeper | None = None  # the same one's, when there are fronts
        self._front: Front | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.title = "HydraServe"
        args = app.state.args
        settings: ServerSettings | None = getattr(args, "hydraserve", None)
        if settings is None:
            return
        self._app = app
        keys = self._keys = KeyRing(settings.api_keys, settings.admin_key, settings.key_file)
        local = bool(args.uds) or (bool(args.host) and is_loopback(args.host))
        gate = Gate(keys, local_admin=local and not keys.has_admin_key and not keys.has_tenants)
        app.add_middleware(LimitMiddleware, traffic=self._traffic, max_body=settings.max_body)
        # vLLM adds its own middleware later and so around this one; its authentication is off, ours does all of it.
        app.add_middleware(RequestMiddleware, gate=gate, count=self._count)
        app.add_middleware(ForwardMiddleware, front=lambda: self._front)
        app.add_exception_handler(HydraServeError, handle_error)
        app.include_router(adapters.router)
        for routes in (vllm, routing, inspector, metrics, health):
            app.include_router(routes.router)
        app.router.lifespan_context = self._ending_with(app.router.lifespan_context)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called when the base model is loaded, before the first request is accepted: load the adapters, or find the
        process that does."""
        settings: ServerSettings | None = getattr(args, "hydraserve", None)
        if settings is not None and engine_client is not None:
            process, processes = engine_client.hydra_adapters.process
            config = engine_client.vllm_config
            at_once = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
            self._traffic.limit = math.ceil((at_once + settings.max_queued) / processes)
            metrics = ServerMetrics(engine_client.hydra_watched, Metrics(), settings.metrics_adapters)
            state.hydraserve_metrics = metrics
            engine_client.hydra_release_lora_gauge()
            if process > 0:
                await self._join(engine_client, state, settings)
                return
            await self._keep(engine_client, state, settings)
            if processes > 1:
                await self._answer_fronts(engine_client, metrics, settings, processes - 1)
        host = args.host or "127.0.0.1"
        where = f"unix:{args.uds}" if args.uds else f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
        print(f"hydraserve is ready on {where} (API /v1, metrics /metrics)", file=sys.stderr, flush=True)

    async def _keep(self, engine_client: Any, state: Any, settings: ServerSettings) -> None:
        """Load the adapters, and take requests until the engine is to end."""
        self._server = AdapterServer(settings)
        runtime = state.hydraserve_metrics.meter(engine_client.hydra_adapters)
        await self._server.start(runtime, state.openai_serving_models)
        service = self._server.service
        assert service is not None
        sizes = await runtime.sizes()
        state.hydraserve_adapters = service
        state.hydraserve_tracer = routing.Tracer(engine_client.hydra_watched, service.current, sizes.trace_bytes)
        await state.hydraserve_metrics.start(service, sizes)
        state.hydraserve_metrics.add(LoraRequestsInfo(service, engine_client.vllm_config.lora_config.max_loras))
        state.hydraserve_readiness = Readiness(self._traffic, lambda: bool(engine_client.errored))
        engine_client.hydra_ending.attach(self._drain)

    async def _answer_fronts(
        self, engine_client: Any, metrics: ServerMetrics, settings: ServerSettings, fronts: int
    ) -> None:
        assert self._server is not None
        service, folder = self._server.service, settings.api_servers
        assert service is not None
        assert folder is not None
        assert self._app is not None
        self._keeper = Keeper(folder, self._app, self._keys, service.current.get, metrics.note)
        service.abort_elsewhere = self._keeper.abort
        await self._keeper.start(engine_client.hydra_adapters.hooks, fronts, _START_S)

    async def _join(self, engine_client: Any, state: Any, settings: ServerSettings) -> None:
        """Take requests, and ask the process that keeps the adapters."""
        assert settings.api_servers is not None
        runtime = engine_client.hydra_adapters
        self._front = Front(settings.api_servers, runtime)
        await self._front.connect(_START_S)
        runtime.publish(state.openai_serving_models, FoundAdapters(), name_of)
        runtime.hooks = self._front
        self._front.start(show_every_second(state.hydraserve_metrics))
        engine_client.hydra_ending.attach(self._drain)

    async def _count(self, principal: Principal) -> None:
        if self._front is not None:
            await self._front.count(principal)
        else:
            self._keys.count(principal)

    def _drain(self, timeout_s: float) -> None:
        """Take no more requests, and wait until those under way are answered, here and by the fronts."""
        started = time.monotonic()
        self._traffic.drain(timeout_s)
        if self._front is not None:
            self._front.leave()
        if self._keeper is not None:
            self._keeper.wait_for_fronts(timeout_s - (time.monotonic() - started))

    def _ending_with(self, lifespan: Any) -> Any:
        """The app's lifespan, and after it the end of what runs for the adapters."""

        @asynccontextmanager
        async def both(app: FastAPI) -> AsyncIterator[Any]:
            app.state.server.config.timeout_graceful_shutdown = _CLOSE_S  # uvicorn's; its default is to wait for ever
            async with lifespan(app) as state:
                yield state
            for part in (self._front, self._keeper, self._server):
                if part is not None:
                    await part.close()

        return both
