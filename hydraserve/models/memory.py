"""Whether a base model can fit this machine at all."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hydraserve.errors import ModelTooLargeError
from hydraserve.models.shapes import BY_NAME, ModelAccess, read_config, skeleton


def dtype_bytes(dtype: str) -> int:
    """Bytes of a number of vLLM's --dtype, which has two names for float32."""
    return 4 if dtype in ("float32", "float") else 2


def check_fits(
    model: str,
    slot_bytes: int,
    access: ModelAccess = BY_NAME,
    *,
    bits: int = 16,
    nodes: int = 1,
    extra_bytes: int = 0,
) -> None:
    """Refuse a base that cannot fit this machine in any way, before minutes are spent on loading it.

    slot_bytes:  taken by the adapter slots on all devices together.
    bits:        of one weight at the least, where vLLM quantises the model as it loads it.
    nodes:       machines like this one that the model is spread over.
    extra_bytes: memory besides the devices' own, such as what vLLM may offload to the host.

    The limit is all GPUs together (or the main memory, with a CPU build of torch), so what passes here may still
    turn out too large: vLLM then says so. Raises ModelTooLargeError.
    """
    weights = weight_bytes(model, access, bits)
    where, memory = device_memory()
    if weights is None or memory is None or weights + slot_bytes <= memory * nodes + extra_bytes:
        return
    raise ModelTooLargeError(
        what=model,
        got=f"{weights / 1e9:.1f} GB of weights and {slot_bytes / 1e9:.1f} GB of adapter slots",
        expected=f"at most {(memory * nodes + extra_bytes) / 1e9:.1f} GB, {where}"
        + (f" on {nodes} such nodes" if nodes > 1 else "")
        + (" and what is offloaded" if extra_bytes else ""),
        fix="take a smaller or quantised base, fewer --slots, or a larger machine",
    )


def weight_bytes(model: str, access: ModelAccess = BY_NAME, bits: int = 16) -> int | None:
    """Bytes of a base model's weights as vLLM holds them at the least: `bits` each, or as quantised on disk.

    None when it cannot be known without a download: a quantised base on the Hub. Raises as `base_shapes`.
    """
    config = read_config(model, access)
    if getattr(config, "quantization_config", None) is not None:
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) or None
    return bits * sum(parameter.numel() for parameter in skeleton(config, access).parameters()) // 8


def device_memory() -> tuple[str, int | None]:
    """What the memory is called, and its bytes (None: unknown).

    GPUs are asked through nvidia-smi: CUDA, once initialised here, could not be used in vLLM's forked processes.
    """
    import torch

    if torch.version.cuda is None:
        return "the memory of this machine", host_memory()
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return "the memory of all GPUs", sum(int(line) for line in listed.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or memory shared with the host ("[N/A]")
        return "the memory of all GPUs", None


def host_memory() -> int:
    """Bytes of main memory, or of the container's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit: no file, or the word "max"
        return memory
