"""The server's configuration, validated once, and the one place that reads HYDRASERVE_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Adapters that can meet in one batch when nothing else is said: enough for most, small beside a base model.
DEFAULT_SLOTS = 8
# Kept free for adapters loaded later, beyond what the given ones need.
DEFAULT_MAX_RANK = 16
DEFAULT_MAX_HEADS = 4
# Seconds that running requests get to finish after the first SIGINT or SIGTERM.
DEFAULT_SHUTDOWN_TIMEOUT = 30

# Requests that may wait besides those that the engine computes at once. A few seconds' worth for most servers; a client
# that waits longer is better served by another replica.
DEFAULT_MAX_QUEUED = 1024
# A prompt of a million tokens, as ids in JSON, takes about 7 MiB.
DEFAULT_MAX_BODY_MIB = 16

# Adapters with Prometheus series of their own, the busiest; the rest share one.
DEFAULT_METRICS_ADAPTERS = 20

# Where adapters may be loaded from at run time when nothing else is said: below the folder that the server was started
# in, and from the two stores that need no address of a machine.
DEFAULT_SOURCES = (".", "hf://", "s3://")


def cache_dir() -> Path:
    """Where made and downloaded files are kept: HYDRASERVE_CACHE, else the user's cache folder."""
    given = os.environ.get("HYDRASERVE_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hydraserve"


def plugin_enabled() -> bool:
    """Whether vLLM is extended in this process; HYDRASERVE_PLUGIN=0 leaves vLLM's own LoRA path."""
    return os.environ.get("HYDRASERVE_PLUGIN", "1") != "0"


def take_secret(name: str) -> str | None:
    """The value of a variable that holds a key, which is then taken away: child processes do not inherit it."""
    return os.environ.pop(name, None) or None


def server_url() -> str:
    """The server that `hydraserve adapters` talks to when nothing else is said: HYDRASERVE_URL."""
    return os.environ.get("HYDRASERVE_URL") or "http://127.0.0.1:8000"


def administration_key() -> str | None:
    """The key that `hydraserve adapters` shows: HYDRASERVE_ADMIN_API_KEY, else HYDRASERVE_API_KEY."""
    return os.environ.get("HYDRASERVE_ADMIN_API_KEY") or os.environ.get("HYDRASERVE_API_KEY") or None


# Variables that make a server ask for keys.
KEY_VARIABLES = ("HYDRASERVE_API_KEY", "HYDRASERVE_ADMIN_API_KEY", "VLLM_API_KEY")


def inference_key() -> str | None:
    """The key that `hydraserve bench` shows a running server: HYDRASERVE_API_KEY, else OPENAI_API_KEY."""
    return os.environ.get("HYDRASERVE_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def debug() -> bool:
    """Whether errors come with tracebacks: HYDRASERVE_DEBUG=1, which `--debug` sets for all processes."""
    return os.environ.get("HYDRASERVE_DEBUG", "0") == "1"


@dataclass(frozen=True)
class AdapterSource:
    """An adapter named on the command line: the name requests use, and the folder."""

    name: str
    path: Path


@dataclass(frozen=True)
class ServeConfig:
    """What `hydraserve serve` decides itself; everything else is vLLM's.

    model:          short name, Hub id or path, as typed.
    adapters:       served from the start.
    slots:          adapters that can be in one batch. None: the given ones, at most DEFAULT_SLOTS; with
                    --max-adapters given, room for those too, up to DEFAULT_SLOTS.
    max_adapters:   adapters kept in host memory. None: the given ones, at least the slots.
    max_rank, max_heads: the largest adapter to leave room for, besides the given ones. One of them alone: with the
                    other as large as among the given ones. Neither: no more than the given ones need (without any:
                    DEFAULT_MAX_RANK, DEFAULT_MAX_HEADS).
    per_head_a:     that adapter has one A for each head.
    target_modules: the linear layers to wrap, by last name component. None: those the given adapters use
                    (without any: all).
    router_metrics: every so many engine steps routers are counted for the metrics; 0: never.
    metrics_adapters: adapters with Prometheus series of their own.
    """

    model: str
    adapters: tuple[AdapterSource, ...] = ()
    slots: int | None = None
    max_adapters: int | None = None
    max_rank: int | None = None
    max_heads: int | None = None
    per_head_a: bool = False
    target_modules: tuple[str, ...] | None = None
    host: str = ""
    port: int = 8000
    debug: bool = False
    key_file: Path | None = None
    allow_sources: tuple[str, ...] = ()
    adapter_dir: Path | None = None
    state_dir: Path | None = None
    router_metrics: int = 0
    metrics_adapters: int = DEFAULT_METRICS_ADAPTERS


@dataclass(frozen=True)
class ServerSettings:
    """What our part of the HTTP server is started with; it travels on vLLM's arguments.

    adapters:      served from the start.
    base_shapes:   module path -> (in_features, out_features) of the base model's linear layers.
    api_keys:      for inference; admin_key: for changing adapters as well.
    key_file:      more keys, each with what it may do.
    allow_sources: folders and URL prefixes that adapters may be loaded from while the server runs.
    adapter_dir:   a folder whose sub-folders are the adapters that are wanted.
    state_dir:     keeps what was loaded while the server ran.
    metrics_adapters: adapters with Prometheus series of their own.
    max_queued:    requests that may wait besides those that the engine computes at once.
    max_body:      bytes of one request's body.
    api_servers:   with several API server processes, the folder of the sockets between them.
    """

    adapters: tuple[AdapterSource, ...] = ()
    base_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    key_file: Path | None = None
    allow_sources: tuple[str, ...] = ()
    adapter_dir: Path | None = None
    state_dir: Path | None = None
    metrics_adapters: int = DEFAULT_METRICS_ADAPTERS
    max_queued: int = DEFAULT_MAX_QUEUED
    max_body: int = DEFAULT_MAX_BODY_MIB << 20
    api_servers: Path | None = None
