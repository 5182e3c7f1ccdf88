"""GET /metrics: vLLM's route with the engine asked first, so that our series are as fresh as vLLM's."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from hydraserve.server.metrics.series import ServerMetrics

router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def show_metrics(request: Request) -> Response:
    """All series in Prometheus' text format, also for clients that would rather have OpenMetrics: in that,
    prometheus_client 0.26 writes vllm:name as vllm_name, which no dashboard asks for."""
    metrics: ServerMetrics = request.app.state.hydraserve_metrics
    await metrics.refresh()
    return Response(generate_latest(metrics.registry()), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
