"""Bodies of the adapter routes."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hydraserve.adapters.compose import Recipe


class AdapterState(StrEnum):
    """Where an adapter's weights are: the fastest place counts.

    unread:  registered; its files are read when the first request asks for it.
    loading: being fetched, read or brought into host memory.
    failed:  the last attempt to read it failed, see `error`.
    disk, host, slot: on the server's disk, in its host memory, in a slot of the engine.
    """

    UNREAD = "unread"
    LOADING = "loading"
    FAILED = "failed"
    DISK = "disk"
    HOST = "host"
    SLOT = "slot"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(_Body):
    """An adapter to be composed with others, and what it is multiplied by."""

    adapter: str
    weight: float = 1.0


class AddAdapter(_Body):
    """POST /v1/adapters. Either source, or compose: adapters that are served, to be added up or, with a router
    (where its folder comes from), to be mixed by it. digest: what the content has to be, if given."""

    name: str
    source: str | None = None
    compose: list[Part] | None = Field(default=None, min_length=1, max_length=64)
    router: str | None = None
    pin: bool = False
    digest: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")

    @model_validator(mode="after")
    def _one_origin(self) -> AddAdapter:
        if (self.source is None) == (self.compose is None):
            raise ValueError("expected either source or compose")
        if self.router is not None and self.compose is None:
            raise ValueError("router: expected only together with compose")
        return self

    def origin(self) -> str:
        """The source, or that of what is to be composed. Raises AdapterConfigError."""
        if self.compose is None:
            assert self.source is not None
            return self.source
        return Recipe(tuple((part.adapter, part.weight) for part in self.compose), self.router).source


class ReplaceAdapter(_Body):
    """PUT /v1/adapters/{name}. source: default, where it came from before."""

    source: str | None = None
    pin: bool | None = None
    digest: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")


class LoadLora(BaseModel):
    """vLLM's POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLora(BaseModel):
    """vLLM's POST /v1/unload_lora_adapter."""

    lora_name: str


class ProgressCard(BaseModel):
    """Bytes of a download; total is 0 while it is not known."""

    done: int
    total: int


class AdapterCard(BaseModel):
    """One adapter. Fields of its content are null while it was never read, and those of CONCERN_OTHERS for a tenant.

    version:   SHA-256 of its content.
    modules:   last components of the adapted layers' names; module_count: how many layers.
    bytes:     of its weights as stored.
    last_used, loaded_at: seconds since the epoch. load_seconds: for fetching, reading and checking.
    """

    object: Literal["adapter"] = "adapter"
    name: str
    source: str | None
    origin: str
    state: AdapterState
    pinned: bool
    version: str | None
    format: str | None
    rank: int | None
    heads: int | None
    modules: list[str] | None
    module_count: int | None
    bytes: int | None
    dtypes: list[str] | None
    base_model: str | None
    requests_running: int | None
    requests_served: int | None
    last_used: float | None
    loaded_at: float | None
    load_seconds: float | None
    progress: ProgressCard | None
    error: str | None


# A recipe or an error names other adapters, folders and buckets; an adapter may be used by others as well.
CONCERN_OTHERS = ("source", "error", "requests_running", "requests_served", "last_used")


class ResidencyCard(BaseModel):
    """What the engine holds. slots: the adapter in each, or null. kv_blocks_cached: with a prefix that can be hit."""

    slots: list[str | None]
    host_adapters: int
    host_capacity: int
    host_bytes: int
    kv_blocks: int
    kv_blocks_free: int
    kv_blocks_cached: int
    process_bytes: int


class AdapterList(BaseModel):
    """GET /v1/adapters. residency: for administrators only."""

    object: Literal["list"] = "list"
    data: list[AdapterCard]
    residency: ResidencyCard | None


class Removed(BaseModel):
    """DELETE /v1/adapters/{name}."""

    object: Literal["adapter.deleted"] = "adapter.deleted"
    name: str
    deleted: Literal[True] = True
