"""`hydraserve plan`: what fits into a memory of a stated size, and the flags that make use of it."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydraserve.errors import ConfigError

if TYPE_CHECKING:
    from hydraserve.bench.capacity import MemoryPlan, Wish
    from hydraserve.bench.check import Checked

HELP = "what fits: bytes per adapter and slot, KV tokens left, suggested flags"

# The status when nothing fits, or when --check finds the plan wrong.
FAILURE = 1

EPILOG = """\
examples:
  hydraserve plan --model llama2-7b --rank 8 --heads 4 --adapters 1000 --memory 80GiB
  hydraserve plan --model demo --adapters 16 --memory 8GiB --check
"""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1 << 10 * power for power, unit in enumerate("kmgt", start=1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, help="base model: a short name, a Hub id or a path")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="of the adapters (default: %(default)s)")
    parser.add_argument("--target-modules", metavar="NAME,...", help="adapted layers (default: all linear layers)")
    parser.add_argument("--adapters", type=int, default=1, help="how many there are (default: %(default)s)")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=64,
        help="requests that meet in a batch, which more slots are no use for (default: %(default)s)",
    )
    parser.add_argument("--slots", type=int, help="adapters in one batch (default: chosen)")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="(default: what this machine's torch is built for)")
    parser.add_argument("--memory", help="of one GPU, or of the machine: 80GiB, 24GB (default: this machine's)")
    parser.add_argument("--host-memory", help="beside the GPU, for waiting adapters (default: this machine's)")
    parser.add_argument("--utilization", type=float, help="share of --memory to use (default: 0.9)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="(default: the model's own)")
    parser.add_argument("--max-model-len", type=int, help="tokens of the longest request (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print numbers for a program")
    parser.add_argument(
        "--check", action="store_true", help="start the server with these flags and compare with what it takes"
    )


def run(args: argparse.Namespace) -> int:
    from hydraserve.bench.capacity import BaseSize, MemoryPlan
    from hydraserve.models import resolve_model

    wish = read_wish(args)
    model = resolve_model(args.model)
    plan = MemoryPlan(BaseSize.of(model, wish.dtype_bytes), wish)
    checked = check(model, plan) if args.check and plan.fits else []
    if args.json:
        print(json.dumps(as_json(plan, args.model, checked), indent=1))
    else:
        show(plan, args.model, checked)
    return 0 if plan.fits and all(line.agrees for line in checked) else FAILURE


def read_wish(args: argparse.Namespace) -> Wish:
    """What the arguments ask for. Raises ConfigError."""
    from hydra_kernels import Layout

    from hydraserve.bench.capacity import CPU_UTILIZATION, GPU_UTILIZATION, Wish

    for flag in ("rank", "heads", "adapters", "concurrency", "slots", "tensor_parallel_size", "max_model_len"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}", value, "at least 1", "raise it")
    device = args.device or this_device()
    utilization = args.utilization or (CPU_UTILIZATION if device == "cpu" else GPU_UTILIZATION)
    if not 0 < utilization <= 1:
        raise ConfigError("--utilization", utilization, "more than 0, at most 1", "for example --utilization 0.9")
    return Wish(
        layout=Layout(args.rank, args.heads, has_router=args.heads > 1),
        adapters=args.adapters,
        device=device,
        memory=parse_bytes(args.memory, "--memory") if args.memory else memory_of(device),
        host=parse_bytes(args.host_memory, "--host-memory") if args.host_memory else memory_of("cpu"),
        concurrency=args.concurrency,
        slots=args.slots,
        targets=tuple(args.target_modules.split(",")) if args.target_modules else None,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        tensor_parallel=args.tensor_parallel_size,
        utilization=utilization,
    )


def this_device() -> Any:
    """ "gpu" where torch is built for one."""
    import torch

    return "cpu" if torch.version.cuda is None else "gpu"


def memory_of(device: str) -> int:
    """Bytes that this machine or container has, or its first GPU. Raises ConfigError when there is none."""
    import subprocess

    from hydraserve.models.memory import host_memory

    if device == "cpu":
        return host_memory()
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return int(listed.splitlines()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as e:
        raise ConfigError("--memory", "nothing, and no GPU here", "a GPU's memory", "for example --memory 80GiB") from e


def parse_bytes(text: str, flag: str) -> int:
    """ "80GiB", "24 GB", "1073741824". Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise ConfigError(flag, repr(text), "a size", f"for example {flag} 80GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def check(model: str, plan: MemoryPlan) -> list[Checked]:
    """Start the server as planned and compare."""
    from hydraserve.bench.check import check_plan
    from hydraserve.cli.signals import terminable

    with terminable(), tempfile.TemporaryDirectory(prefix="hydraserve-plan-") as folder:
        return check_plan(model, plan, Path(folder))


def show(plan: MemoryPlan, model: str, checked: list[Checked]) -> None:
    """The plan as a table, the command, and what the check found."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    wish = plan.wish
    table = Table(title=f"{model}, {size(wish.memory)} of {wish.device.upper()} memory", box=box.SIMPLE_HEAD)
    for heading in ("", "each", "number", "together"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each, number, together in rows(plan):
        table.add_row(name, size(each) if each else "", str(number) if number else "", size(together))
    console.print(table)
    if not plan.kv_tokens:
        console.print("does NOT fit: nothing is left for the KV cache; take fewer --slots, or more --memory")
        return
    requests = f"{plan.requests:.1f} requests of {plan.max_model_len} tokens"
    console.print(f"KV cache: {plan.kv_tokens:,} tokens of {size(plan.kv_token)}, {requests}")
    if not plan.fits:
        console.print(
            f"does NOT fit: vLLM wants room for one request of that length; take --max-model-len of at most "
            f"{plan.kv_tokens}, fewer --slots, or more --memory"
        )
        return
    if plan.max_adapters < wish.adapters:
        waiting = f"{plan.max_adapters} of {wish.adapters} adapters stay in memory"
        console.print(f"{waiting}; the others are read from disk when they are asked for")
    console.print(f"\nhydraserve --model {model} {' '.join(plan.flags())}")
    for line in checked:
        console.print(f"checked {line.name}: planned {line.planned:,}, found {line.found:,} ({line.difference:+.1%})")


def rows(plan: MemoryPlan) -> list[tuple[str, int, int, int]]:
    """name, bytes each, number, bytes together; 0 where there is nothing to say."""
    gpu = plan.wish.device == "gpu"
    ranks = plan.wish.tensor_parallel
    where = f"host memory, {ranks} copies" if ranks > 1 else "host memory"
    waiting = "waiting adapters" + (f" ({where})" if gpu else "")
    overhead = "context and activations (estimate)" if gpu else "processes (estimate)"
    return [
        ("base weights", 0, 0, plan.weights),
        (overhead, 0, 0, plan.overhead),
        ("slots", plan.slot, plan.slots, plan.slot * plan.slots),
        (waiting, plan.waiting, plan.max_adapters, plan.host_cache),
        ("KV cache", 0, 0, max(0, plan.kv_cache)),
    ]


def as_json(plan: MemoryPlan, model: str, checked: list[Checked]) -> dict[str, Any]:
    """The same numbers, in bytes."""
    return {
        "model": model,
        "device": plan.wish.device,
        "memory": plan.wish.memory,
        "weights": plan.weights,
        "overhead": plan.overhead,
        "adapter": plan.adapter,
        "slot": plan.slot,
        "slots": plan.slots,
        "max_adapters": plan.max_adapters,
        "host_cache": plan.host_cache,
        "kv_cache": plan.kv_cache,
        "kv_token": plan.kv_token,
        "kv_tokens": plan.kv_tokens,
        "max_model_len": plan.max_model_len,
        "fits": plan.fits,
        "flags": plan.flags(),
        "checked": [
            {"name": line.name, "planned": line.planned, "found": line.found, "difference": line.difference}
            for line in checked
        ],
    }


def size(count: int) -> str:
    """Bytes for people: 9.2 MiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
