"""GET /metrics: vLLM's route with the engine asked first, so that our series are as fresh as vLLM's."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from hydraserve.server.metrics import registry

router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All series, as text or OpenMetrics, whichever the client asks for."""
    await request.app.state.hydraserve_metrics.refresh()
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry()), headers={"Content-Type": content_type})
