"""Body of POST /v1/routing."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RoutingFormat(StrEnum):
    """JSON for small answers; the others hold the weights as one array [tokens, routers, heads] of float32."""

    JSON = "json"
    NPZ = "npz"
    SAFETENSORS = "safetensors"


class RoutingRequest(BaseModel):
    """What to generate, and which routers to show.

    model:    name of an adapter.
    prompt:   text or token ids; or messages, as for /v1/chat/completions.
    modules:  last components of the layers' names ("down_proj"); default all.
    layers:   layer numbers; default all.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    seed: int | None = None
    ignore_eos: bool = False
    modules: list[str] | None = Field(default=None, min_length=1)
    layers: list[int] | None = Field(default=None, min_length=1)
    format: RoutingFormat = RoutingFormat.JSON

    @model_validator(mode="after")
    def _one_input(self) -> RoutingRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("got both or neither of prompt and messages, expected one of them")
        return self

    @property
    def chat(self) -> bool:
        return self.messages is not None

    def completion_body(self, request_id: str) -> dict[str, Any]:
        """Of the same request to vLLM's handler. Its prompt must be computed, so no cached prefix may serve it."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "request_id": request_id,
            "cache_salt": request_id,
            "return_token_ids": True,
        }
        return {**body, **({"messages": self.messages} if self.chat else {"prompt": self.prompt})}
