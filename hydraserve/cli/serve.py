"""`hydraserve serve`: check everything that can be checked early, size the slots, start vLLM's server."""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydraserve.cli.engine_settings import check_memory, fill_in, model_access, parse
from hydraserve.config import (
    DEFAULT_MAX_BODY_MIB,
    DEFAULT_MAX_HEADS,
    DEFAULT_MAX_QUEUED,
    DEFAULT_MAX_RANK,
    DEFAULT_METRICS_ADAPTERS,
    DEFAULT_SLOTS,
    DEFAULT_SOURCES,
    AdapterSource,
    ServeConfig,
    ServerSettings,
    take_secret,
)
from hydraserve.errors import AdapterConfigError, ConfigError, PortInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hydraserve.adapters.checkpoint import AdapterSummary
    from hydraserve.adapters.sizing import SlotPlan

HELP = "serve a base model and its adapters over an OpenAI-compatible API (the default command)"
PASSES_THROUGH = True  # flags that are not ours go to vLLM
AT_LEAST_ONE = (
    *("slots", "max_adapters", "max_rank", "max_heads", "router_metrics_every", "metrics_adapters"),
    *("max_queued_requests", "max_body_mib"),
)

VLLM_HELP = """\
Every other flag of `vllm serve` passes through (--dtype, --max-model-len, --tensor-parallel-size, --api-key,
--gpu-memory-utilization ...); `hydraserve serve --vllm-help` lists them.

examples:
  hydraserve --model llama2-7b --adapter ./hydra
  hydraserve --model demo --adapter sql=./runs/sql --adapter ./chat --port 8080
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = VLLM_HELP
    parser.add_argument(
        "--model", required=False, help="base model: a short name (`hydraserve models`), a Hub id or a path"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="adapter folder, repeatable; requests name it as `model` (default name: the folder's)",
    )
    parser.add_argument(
        "--slots", type=int, help=f"adapters in one batch (default: as many as given, at most {DEFAULT_SLOTS})"
    )
    parser.add_argument("--max-adapters", type=int, help="adapters kept in host memory (default: as many as given)")
    parser.add_argument(
        "--max-rank",
        type=int,
        help=f"rank of the largest adapter to leave room for (default: the given ones', else {DEFAULT_MAX_RANK})",
    )
    parser.add_argument(
        "--max-heads",
        type=int,
        help=f"heads of that adapter; with neither flag, no more room than the given adapters need "
        f"(default: the given ones', else {DEFAULT_MAX_HEADS})",
    )
    parser.add_argument(
        "--per-head-a",
        action="store_true",
        help="leave that room for adapters with one A for each head (LoRAMoE and its like, adapters under a router)",
    )
    parser.add_argument(
        "--target-modules",
        metavar="NAME,...",
        help="also wrap these linear layers, for adapters loaded later (default: those the adapters use, else all)",
    )
    parser.add_argument(
        "--adapter-dir", type=Path, metavar="DIR", help="serve each sub-folder; what appears or vanishes there follows"
    )
    parser.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="keep adapters loaded at run time over a restart, in DIR"
    )
    parser.add_argument(
        "--allow-source",
        action="append",
        default=[],
        metavar="PATH|URL",
        help="adapters may be loaded from below here at run time, repeatable (default: the current folder, hf://, s3://)",
    )
    parser.add_argument(
        "--admin-api-key",
        metavar="KEY",
        help="key for changing adapters at run time; better given as HYDRASERVE_ADMIN_API_KEY",
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys (hashed) with the adapters, limits and role of each"
    )
    parser.add_argument(
        "--router-metrics",
        choices=("off", "on"),
        default="off",
        help="count what routers do, for /metrics (default: off)",
    )
    parser.add_argument(
        "--router-metrics-every",
        type=int,
        default=1,
        metavar="N",
        help="with --router-metrics on: count in every Nth step of the engine only (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics-adapters",
        type=int,
        default=DEFAULT_METRICS_ADAPTERS,
        metavar="N",
        help="the N busiest adapters have metrics of their own, the others share theirs (default: %(default)s)",
    )
    parser.add_argument(
        "--max-queued-requests",
        type=int,
        default=DEFAULT_MAX_QUEUED,
        metavar="N",
        help="requests that may wait for a place in the batch; more are answered 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body-mib",
        type=int,
        default=DEFAULT_MAX_BODY_MIB,
        metavar="N",
        help="largest request body, in MiB; more is answered 413 (default: %(default)s)",
    )
    parser.add_argument("--host", default="", help="address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--vllm-help", action="store_true", help="list vLLM's own flags and exit")


def run(args: argparse.Namespace) -> int:
    from hydraserve.engine import launch

    if args.vllm_help:
        launch.parse(["--help=all"])
    config = serve_config(args)

    from hydraserve.adapters.checkpoint import check_base, inspect_adapter
    from hydraserve.adapters.sizing import plan_slots, readable_adapters
    from hydraserve.models import base_shapes, resolve_model
    from hydraserve.models.memory import dtype_bytes

    summaries = [inspect_adapter(source.path) for source in config.adapters]
    later = readable_adapters(config.adapter_dir) if config.adapter_dir else []
    parsed = parse(config, resolve_model(config.model), args.passthrough)
    if not parsed.headless:
        check_port(config.host, config.port)
    shapes = base_shapes(parsed.model, model_access(parsed))
    for summary in summaries:
        check_base(summary, shapes)
    plan = plan_slots(config, summaries, shapes, dtype_bytes(parsed.dtype), later)
    check_memory(parsed, parsed.model, plan.slots * plan.slot_bytes)
    print_summary(config, parsed.model, summaries, plan)
    fill_in(parsed, config, plan)
    with sockets_folder(parsed.api_server_count or 0) as folder:
        parsed.hydraserve = replace(server_settings(args, config, shapes, parsed), api_servers=folder)
        launch.run(parsed)
    return 0


@contextmanager
def sockets_folder(api_servers: int) -> Iterator[Path | None]:
    """Where several API server processes find one another; one needs none. Only this user can open it."""
    if api_servers < 2:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="hydraserve-") as folder:
        yield Path(folder)


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The validated configuration of a command line. Raises ConfigError."""
    if not args.model:
        raise ConfigError(
            what="--model",
            got="nothing",
            expected="a base model",
            fix="hydraserve --model demo, or see `hydraserve models`",
        )
    for flag in AT_LEAST_ONE:
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(what=f"--{flag.replace('_', '-')}", got=str(value), expected="at least 1", fix="raise it")
    adapters = tuple(adapter_source(text) for text in args.adapter)
    for source in adapters:
        check_source(source)
    names = [source.name for source in adapters]
    if twice := {name for name in names if names.count(name) > 1 or name == args.model}:
        raise ConfigError(
            what="--adapter",
            got=f"the name {sorted(twice)[0]!r} twice, or the base model's",
            expected="a different name for each adapter",
            fix=f"--adapter NAME={next(s.path for s in adapters if s.name in twice)}",
        )
    return ServeConfig(
        model=args.model,
        adapters=adapters,
        slots=args.slots,
        max_adapters=args.max_adapters,
        max_rank=args.max_rank,
        max_heads=args.max_heads,
        per_head_a=args.per_head_a,
        target_modules=tuple(filter(None, args.target_modules.split(","))) if args.target_modules else None,
        host=args.host,
        port=args.port,
        debug=args.debug,
        key_file=args.api_key_file.resolve() if args.api_key_file else None,
        allow_sources=tuple(args.allow_source) or DEFAULT_SOURCES,
        adapter_dir=args.adapter_dir.resolve() if args.adapter_dir else None,
        state_dir=args.state_dir.resolve() if args.state_dir else None,
        router_metrics=args.router_metrics_every if args.router_metrics == "on" else 0,
        metrics_adapters=args.metrics_adapters,
    )


def server_settings(
    args: argparse.Namespace, config: ServeConfig, shapes: Mapping[str, tuple[int, int]], parsed: argparse.Namespace
) -> ServerSettings:
    """What our part of the server needs; takes the keys for inference from vLLM's arguments, as ours checks them.

    Raises ConfigError for a key file that cannot be used.
    """
    from hydraserve.server.keys import KeyRing

    given = list(parsed.api_key or [])
    parsed.api_key = None
    from_environment = [take_secret(name) for name in ("HYDRASERVE_API_KEY", "VLLM_API_KEY")]
    admin_from_environment = take_secret("HYDRASERVE_ADMIN_API_KEY")
    settings = ServerSettings(
        adapters=config.adapters,
        base_shapes=shapes,
        api_keys=tuple(given or filter(None, from_environment)),
        admin_key=args.admin_api_key or admin_from_environment,
        key_file=config.key_file,
        allow_sources=config.allow_sources,
        adapter_dir=config.adapter_dir,
        state_dir=config.state_dir,
        metrics_adapters=config.metrics_adapters,
        max_queued=args.max_queued_requests,
        max_body=args.max_body_mib << 20,
    )
    KeyRing(settings.api_keys, settings.admin_key, settings.key_file)
    return settings


def adapter_source(text: str) -> AdapterSource:
    """`NAME=PATH`, or `PATH` whose last component is the name; a path may hold a "=" too."""
    name, sep, path = text.partition("=")
    if not sep or text.startswith(("/", ".", "~")) or Path(text).exists():
        name, path = "", text
    folder = Path(path).expanduser().resolve()
    return AdapterSource(name or folder.name, folder)


def check_source(source: AdapterSource) -> None:
    """Raises ConfigError for a name that no adapter of the command line can have; before the engine starts."""
    from hydraserve.adapters.registry import check_name

    try:
        check_name(source.name)
    except AdapterConfigError as error:
        raise ConfigError(
            what="--adapter",
            got=f"the name {source.name!r}",
            expected=error.expected,
            fix=f"--adapter NAME={source.path}",
        ) from error


def check_port(host: str, port: int) -> None:
    """Raises PortInUseError when nothing can listen there; before the minutes of loading, not after."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            raise PortInUseError(
                what=f"address {host or '0.0.0.0'}:{port}",
                got=e.strerror or str(e),
                expected="an address that this server can listen on",
                fix="--port with a free port, or stop what listens there",
            ) from e


def print_summary(config: ServeConfig, model: str, summaries: Sequence[AdapterSummary], plan: SlotPlan) -> None:
    """A table of the adapters and of the memory that the slots take, on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stderr)
    table = Table(title=f"base model {config.model}" + (f" ({model})" if model != config.model else ""))
    for column in ("adapter", "format", "rank", "heads", "modules", "size"):
        table.add_column(column, justify="right" if column in ("rank", "heads", "size") else "left")
    for source, summary in zip(config.adapters, summaries, strict=True):
        table.add_row(source.name, *(str(value) for value in row(summary)))
    if summaries:
        console.print(table)
    else:
        console.print(f"base model {config.model}, no adapters yet")
    console.print(
        f"{plan.slots} slots of up to {plan.slot_bytes / 2**20:.1f} MiB "
        f"({plan.slots * plan.slot_bytes / 2**20:.1f} MiB together), {plan.max_adapters} adapters in host memory, "
        f"address http://{config.host or '0.0.0.0'}:{config.port}"
    )


def row(summary: AdapterSummary) -> Mapping[str, Any] | list[Any]:
    """The cells of one adapter after its name."""
    return [
        summary.format,
        summary.rank,
        summary.heads,
        " ".join(summary.targets),
        f"{summary.nbytes / 2**20:.1f} MiB",
    ]
