"""Between `hydraserve serve` and vLLM's arguments: what we read from them, refuse in them, and fill in."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from hydraserve.config import DEFAULT_SHUTDOWN_TIMEOUT, ServeConfig
from hydraserve.errors import ConfigError, ModelTooLargeError

if TYPE_CHECKING:
    from hydraserve.adapters.sizing import SlotPlan
    from hydraserve.models import ModelAccess

WORKER_EXTENSION = "hydraserve.engine.worker.HydraWorkerExtension"
# Settings of vLLM that `fill_in` gives a value, unless the user did. Parsed as None where nobody said anything.
OURS = (
    *("enable_lora", "served_model_name", "max_loras", "max_cpu_loras", "max_lora_rank", "lora_target_modules"),
    *("additional_config", "worker_extension_cls", "api_server_count", "shutdown_timeout"),
)


def parse(config: ServeConfig, model: str, passthrough: list[str]) -> argparse.Namespace:
    """vLLM's arguments, with what it is told through --config; those of OURS that nobody gave are None.

    Raises ConfigError for settings that do not go together with ours.
    """
    from hydraserve.engine import launch

    host = ["--host", config.host] if config.host else []
    parsed = launch.parse(["--model", model, *host, "--port", str(config.port), *passthrough], unset=OURS)
    refuse_unsupported(parsed)
    return parsed


def refuse_unsupported(parsed: argparse.Namespace) -> None:
    """Raises ConfigError for settings under which adapters would be computed wrongly or not be managed."""
    from hydraserve.engine.options import refuse_wrong_results

    refuse_wrong_results(fully_sharded_loras=bool(parsed.fully_sharded_loras))
    if parsed.lora_modules:
        raise ConfigError(
            what="--lora-modules",
            got="given",
            expected="--adapter, which checks, sizes and keeps track of adapters",
            fix="--adapter NAME=PATH for each of them",
        )
    if parsed.enable_lora is False:
        raise ConfigError(
            what="--no-enable-lora", got="given", expected="adapters to be served", fix="use `vllm serve` without them"
        )
    if parsed.worker_extension_cls not in (None, "", WORKER_EXTENSION):
        raise ConfigError(
            what="--worker-extension-cls",
            got=parsed.worker_extension_cls,
            expected="none: vLLM takes one class, and adapters are loaded and watched through ours",
            fix="leave it out",
        )


def model_access(parsed: argparse.Namespace) -> ModelAccess:
    """How vLLM will get the model's configuration, so that our checks read the same one."""
    from hydraserve.models import ModelAccess

    return ModelAccess(**{field.name: getattr(parsed, field.name) for field in fields(ModelAccess)})


def check_memory(parsed: argparse.Namespace, model: str, slot_bytes: int) -> None:
    """Raises ModelTooLargeError when the base and the slots cannot fit; only warns where other machines, or settings
    that change the model, may make them fit."""
    from hydraserve.models import check_fits

    ranks = parsed.tensor_parallel_size * parsed.pipeline_parallel_size
    try:
        check_fits(
            model,
            slot_bytes,
            model_access(parsed),
            bits=4 if parsed.quantization else 16,  # the least that a method of vLLM's leaves of a weight
            nodes=parsed.nnodes,
            extra_bytes=int(parsed.cpu_offload_gb * 2**30) * ranks,  # the flag counts for each GPU
        )
    except ModelTooLargeError as error:
        if not _may_fit_yet(parsed):
            raise
        print(f"warning: {error}", file=sys.stderr)


def _may_fit_yet(parsed: argparse.Namespace) -> bool:
    """Whether something decides about memory that cannot be known here: the other nodes, a smaller model made of the
    same configuration, weights that come and go."""
    elsewhere = parsed.headless or parsed.nnodes > 1 or parsed.distributed_executor_backend == "ray"
    return bool(elsewhere or parsed.hf_overrides or parsed.offload_group_size or parsed.quantization_config)


def fill_in(parsed: argparse.Namespace, config: ServeConfig, plan: SlotPlan) -> None:
    """Give vLLM's arguments our values; what the user said wins."""
    from hydraserve.engine.options import EngineOptions, legal_max_rank

    ours = {
        "enable_lora": True,
        "served_model_name": list(dict.fromkeys([config.model, parsed.model])),
        "max_loras": plan.slots,
        "max_cpu_loras": plan.max_adapters,
        "max_lora_rank": legal_max_rank(plan.max_rank),
        "lora_target_modules": list(plan.targets),
        "worker_extension_cls": WORKER_EXTENSION,
        # vLLM's default is one for each data parallel engine; a node that only computes has none.
        "api_server_count": None if parsed.headless else 1,
        "shutdown_timeout": DEFAULT_SHUTDOWN_TIMEOUT,
    }
    for name, value in ours.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    options = EngineOptions(plan.capacity, config.router_metrics).to_config()
    parsed.additional_config = {**options, **(parsed.additional_config or {})}
