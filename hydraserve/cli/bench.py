"""`hydraserve bench`: what adapters cost, end to end over HTTP, against the same engine without them."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydraserve.errors import ConfigError

if TYPE_CHECKING:
    from hydraserve.bench.arms import Comparison, Shape
    from hydraserve.bench.runner import Settings
    from hydraserve.bench.workload import Load, Workload

HELP = "measure what adapters cost against the same engine without them"
PASSES_THROUGH = True  # flags that are not ours go to every server

INTERRUPTED = 130  # exit status after Ctrl-C, as shells give it

# Flags about servers that are started here.
STARTED_ONLY = ("--adapter", "--shape", "--target-modules", "--slots", "--arms", "--reference", "--one-at-a-time")

EPILOG = """\
Every other flag goes to all servers alike (--dtype, --enforce-eager, --max-model-len ...). Defaults that are not
vLLM's: prefix caching is off, --max-num-seqs is the largest batch, the KV cache is as large as the workload needs.

examples:
  hydraserve bench --model demo
  hydraserve bench --model llama2-7b --adapter ./hydra --batch 1,8,32,64 --output result.json --plot result.png
  hydraserve bench --model demo --shape 8x4,16x8 --adapters 1,4,8,16 --reference
  hydraserve bench --model demo --rate 2,4 --burstiness 0.5 --popularity zipf --adapters 16 --slots 4 --slo ttft=500
  hydraserve bench --model demo --url http://localhost:8000
  hydraserve bench --show result.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--model", help="base model: a short name (`hydraserve models`), a Hub id or a path")
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="adapter folder, repeatable (default: random adapters of --shape)",
    )
    what.add_argument("--shape", default="8x4", help="rank x heads of random adapters, a list (default: %(default)s)")
    what.add_argument("--target-modules", metavar="NAME,...", help="layers of random adapters (default: all)")
    what.add_argument(
        "--adapters", metavar="N,...", help="numbers of different adapters (default: 1,8; of given ones also all)"
    )
    what.add_argument("--slots", type=int, help="adapters in one batch (default: as many as there are)")
    what.add_argument(
        "--arms",
        default="off,base-only,hydra,lora,lora-wide",
        help="of: off (LoRA off), control (LoRA off on a second server: the noise floor), base-only (adapters on, base "
        "traffic), hydra, lora (vLLM's own, rank r), lora-wide (rank E*r), reference (default: %(default)s)",
    )
    what.add_argument(
        "--reference", action="store_true", help="also the authors' per-head computation in Hugging Face transformers"
    )
    what.add_argument("--url", help="measure this running server instead of starting any")
    what.add_argument(
        "--api-key", metavar="KEY", help="of that server; better given as HYDRASERVE_API_KEY or OPENAI_API_KEY"
    )
    _add_workload(parser)
    _add_measurement(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the workload")
    group.add_argument("--batch", default="1,8,32", help="closed loop: requests at any time (default: %(default)s)")
    group.add_argument("--rate", help="open loop instead: requests that arrive per second, a list")
    group.add_argument("--burstiness", type=float, default=1.0, help="of arrivals: 1 is Poisson, less is burstier")
    group.add_argument("--waves", type=int, default=2, help="closed loop: requests per client (default: %(default)s)")
    group.add_argument("--requests", type=int, default=200, help="open loop: requests per run (default: %(default)s)")
    group.add_argument("--input-len", default="32", help="prompt tokens, or a range 16-64 (default: %(default)s)")
    group.add_argument("--output-len", default="64", help="answer tokens, or a range (default: %(default)s)")
    group.add_argument("--dataset", type=Path, help="take prompts and lengths from a file in ShareGPT's form")
    group.add_argument(
        "--popularity",
        default="distinct",
        help="of adapters: distinct (in turn), identical, uniform, zipf (exponent 1.5) (default: %(default)s)",
    )
    group.add_argument("--slo", help="report goodput: requests within these limits, such as ttft=500,tpot=50 (ms)")


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the measurement")
    group.add_argument("--repeats", type=int, default=3, help="of each cell, interleaved (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="start the servers one after the other, where the memory cannot hold all of them",
    )
    group.add_argument("--output", type=Path, help="write every run and what they come to as JSON")
    group.add_argument("--plot", type=Path, help="write a PNG")
    group.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a temporary one)")
    group.add_argument("--show", type=Path, metavar="FILE", help="print (and --plot) a result file, measure nothing")
    group.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> int:
    from hydraserve.bench.result import load
    from hydraserve.cli.signals import terminable

    if args.show is not None:
        _refuse(args.passthrough, "--show measures nothing")
        _print(load(args.show), args)
        return 0
    if not args.model:
        raise ConfigError("--model", "nothing", "a base model", "hydraserve bench --model demo")
    with terminable(), tempfile.TemporaryDirectory(prefix="hydraserve-bench-") as folder:
        return measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> int:
    """Set everything up, run it, print it. 0, or with a partial result the status that shells give."""
    from hydraserve.bench.progress import BarProgress
    from hydraserve.bench.result import Result, save
    from hydraserve.bench.runner import Runner
    from hydraserve.cli.signals import Terminated

    check_combinations(args)
    workload, loads = read_workload(args)
    settings = read_settings(args, loads, folder)
    engine_flags = [] if args.url else default_flags(args, workload, loads)
    comparison = read_comparison(args, engine_flags, folder)
    result = Result(_about(args, workload, settings, engine_flags), comparison.baseline)

    def keep() -> None:
        if args.output is not None:
            save(result.to_json(), args.output)

    status = 0
    with BarProgress() as progress:
        try:
            Runner(comparison, workload, settings, result, progress, keep).run()
        except KeyboardInterrupt:
            result.stopped_by, status = "Ctrl-C", INTERRUPTED
        except Terminated as e:
            result.stopped_by, status = e.name, e.status
        except BaseException as e:
            result.stopped_by = type(e).__name__
            raise
        finally:
            keep()
    _print(result.to_json(), args)
    return status


def check_combinations(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags that would do nothing, or make a comparison unfair."""
    if args.url:
        _refuse(args.passthrough, "the server of --url runs already")
        for flag in STARTED_ONLY:
            if getattr(args, flag.lstrip("-").replace("-", "_")) != _defaults(flag):
                raise ConfigError(flag, "given", "not with --url, which measures what runs there", "leave it out")
    elif args.api_key:
        raise ConfigError("--api-key", "given", "only with --url: servers started here have no key", "leave it out")
    varied = args.dataset is not None or any("-" in text for text in (args.input_len, args.output_len))
    if varied and "reference" in read_kinds(args):
        raise ConfigError(
            what="reference",
            got="requests of different lengths, of which transformers would take each alone",
            expected="one length, so that it can batch them",
            fix="--input-len and --output-len without a range and no --dataset, or leave the reference out",
        )


def _defaults(flag: str) -> Any:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.get_default(flag.lstrip("-").replace("-", "_"))


def read_kinds(args: argparse.Namespace) -> list[str]:
    """The kinds of arms. Raises ConfigError."""
    from hydraserve.bench.arms import KINDS

    kinds = [*args.arms.split(","), *(["reference"] if args.reference else [])]
    if unknown := set(kinds) - set(KINDS):
        raise ConfigError("--arms", ", ".join(sorted(unknown)), ", ".join(KINDS), "choose of these")
    return kinds


def read_workload(args: argparse.Namespace) -> tuple[Workload, list[Load]]:
    """The requests, and how fast they come. Raises ConfigError."""
    from transformers import AutoTokenizer

    from hydraserve.bench.workload import POPULARITIES, Lengths, Load, Workload, read_sharegpt
    from hydraserve.models import resolve_model

    if args.popularity not in POPULARITIES:
        raise ConfigError("--popularity", args.popularity, ", ".join(POPULARITIES), "choose one of these")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
    workload = Workload(
        len(tokenizer),
        Lengths.parse(args.input_len, "--input-len"),
        Lengths.parse(args.output_len, "--output-len"),
        args.popularity,
        read_sharegpt(args.dataset, tokenizer) if args.dataset else (),
    )
    if args.rate is not None:
        return workload, [Load(rate=rate, burstiness=args.burstiness) for rate in numbers(args.rate, "--rate", float)]
    return workload, [Load(concurrency=int(batch)) for batch in numbers(args.batch, "--batch", int)]


def read_comparison(args: argparse.Namespace, engine_flags: Sequence[str], folder: Path) -> Comparison:
    """The servers and the arms. Raises ConfigError."""
    from hydraserve.bench.arms import Plan, adapter_counts, compare, running_server
    from hydraserve.bench.models import served_models
    from hydraserve.config import inference_key
    from hydraserve.engine.options import legal_max_rank
    from hydraserve.models import base_shapes, resolve_model

    asked = [int(n) for n in numbers(args.adapters, "--adapters", int)] if args.adapters is not None else None
    if args.url:
        key = args.api_key or inference_key()
        base, adapters = served_models(args.url, key)
        return running_server(args.url, base, adapters, adapter_counts(asked, len(adapters)), key)
    shapes = read_shapes(args)
    model = resolve_model(args.model)
    plan = Plan(
        model=model,
        base_shapes=base_shapes(model),
        shapes=shapes,
        counts=adapter_counts(asked, len(shapes[0].folders) or None),
        kinds=read_kinds(args),
        engine_flags=engine_flags,
        vllm_rank=legal_max_rank,
        folder=folder / "adapters",
        targets=args.target_modules.split(",") if args.target_modules else None,
        slots=args.slots,
        dtype=given_dtype(engine_flags),
    )
    return compare(plan)


def read_shapes(args: argparse.Namespace) -> list[Shape]:
    """The HydraLoRA shapes to measure: of the given adapters, which are one server, or of --shape."""
    from hydraserve.adapters.checkpoint import inspect_adapter
    from hydraserve.bench.arms import Shape
    from hydraserve.cli.serve import adapter_source

    if args.adapter:
        sources = [adapter_source(text) for text in args.adapter]
        summaries = [inspect_adapter(source.path) for source in sources]
        folders = {source.name: source.path for source in sources}
        return [Shape(max(s.rank for s in summaries), max(s.heads for s in summaries), folders)]
    shapes = []
    for text in args.shape.split(","):
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
        if found is None:
            raise ConfigError("--shape", repr(text), "RANKxHEADS", "for example --shape 8x4,16x8")
        shapes.append(Shape(int(found[1]), int(found[2])))
    return shapes


def read_settings(args: argparse.Namespace, loads: Sequence[Load], folder: Path) -> Settings:
    """How it is measured. Raises ConfigError."""
    from hydraserve.bench.machine import openmp_runtime
    from hydraserve.bench.runner import Settings
    from hydraserve.bench.stats import Slo

    for flag, least in (("repeats", 1), ("waves", 1), ("requests", 1), ("slots", 1), ("seed", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag}", value, f"at least {least}", "raise it")
    logs = args.logs or folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # `hydraserve serve` lets its engine start with this library; vLLM's own arms get it too, or they would be slower.
    library, given = openmp_runtime(), os.environ.get("LD_PRELOAD", "")
    preload = {} if library is None or "libiomp" in given else {"LD_PRELOAD": f"{library}:{given}".rstrip(":")}
    return Settings(
        loads=loads,
        log_folder=logs,
        repeats=args.repeats,
        waves=args.waves,
        requests=args.requests,
        seed=args.seed,
        slo=Slo.parse(args.slo) if args.slo else None,
        together=not args.one_at_a_time,
        env=preload,
    )


def given_dtype(flags: Sequence[str]) -> str:
    """--dtype among vLLM's flags, in either of its spellings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="auto")
    return str(parser.parse_known_args(flags)[0].dtype)


def default_flags(args: argparse.Namespace, workload: Workload, loads: Sequence[Load]) -> list[str]:
    """The engine flags of every server: the given ones, and what makes a measurement of their defaults."""
    import torch

    from hydraserve.bench.capacity import kv_bytes_per_token
    from hydraserve.models import resolve_model
    from hydraserve.models.memory import dtype_bytes
    from hydraserve.models.shapes import skeleton

    given: list[str] = args.passthrough
    named = {flag.partition("=")[0].replace("_", "-") for flag in given if flag.startswith("--")}
    batch = max((load.concurrency or 0 for load in loads), default=0) or 64
    tokens = -(-workload.longest // 128) * 128  # vLLM's largest default block
    config = skeleton(resolve_model(args.model)).config
    kv_bytes = int(1.25 * batch * tokens * kv_bytes_per_token(config, dtype_bytes(given_dtype(given))))
    defaults = {
        "--max-num-seqs": [str(batch)],
        "--max-model-len": [str(tokens)],
        "--kv-cache-memory-bytes": [str(max(kv_bytes, 256 << 20))],
    }
    if torch.version.cuda is not None and not args.one_at_a_time:
        # With the cache's size given, vLLM only asks that this share of the GPU is free at the start: several servers
        # are to share it.
        defaults["--gpu-memory-utilization"] = ["0.05"]
    flags = [] if {"--enable-prefix-caching", "--no-enable-prefix-caching"} & named else ["--no-enable-prefix-caching"]
    for flag, values in defaults.items():
        flags += [] if flag in named else [flag, *values]
    return [*flags, *given]


def numbers(text: str, flag: str, kind: type[int] | type[float]) -> list[float]:
    """ "1,8,32". Raises ConfigError."""
    try:
        values: list[float] = [kind(part) for part in text.split(",")]
        if not all(0 < value < math.inf for value in values):  # nor a NaN
            raise ValueError(text)
    except ValueError as e:
        raise ConfigError(flag, repr(text), "positive numbers with commas between", f"for example {flag} 1,8") from e
    return values


def _about(
    args: argparse.Namespace, workload: Workload, settings: Settings, engine_flags: Sequence[str]
) -> dict[str, Any]:
    """The head of the result file."""
    from hydraserve.bench.machine import environment, provenance

    return {
        "provenance": provenance(),
        "model": args.model if not Path(args.model).is_dir() else Path(args.model).name,
        "engine_flags": list(engine_flags),
        "enforce_eager": "--enforce-eager" in engine_flags,
        "environment": environment(),
        "openmp_preloaded": bool(settings.env) or "libiomp" in os.environ.get("LD_PRELOAD", ""),
        "client": "one process on the same machine; on a CPU it shares the cores with the server",
        "interleaved": settings.together,
        "workload": workload.describe(),
        "repeats": settings.repeats,
        "waves": settings.waves,
        "requests": settings.requests,
        "seed": settings.seed,
        "slo_ms": args.slo,
    }


def _print(result: dict[str, Any], args: argparse.Namespace) -> None:
    from hydraserve.bench.plot import plot
    from hydraserve.bench.table import markdown, show

    if args.markdown:
        print(markdown(result), end="")
    else:
        show(result)
    if args.plot is not None:
        plot(result, args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)
    if args.output is not None:
        print(f"result: {args.output}", file=sys.stderr)


def _refuse(passthrough: Sequence[str], why: str) -> None:
    if passthrough:
        raise ConfigError("arguments", " ".join(passthrough), f"none: {why}", "leave them out")
