"""The custom ops of stacked slots, as torch.compile and CUDA graphs see them: opaque, with fake implementations.

On CUDA they are the Triton kernels, on everything else the grouped torch path. In a CUDA graph the decision
"no token has an adapter" is the one of the capture: capture with adapters in the step what is to be replayed with
any mix of them; a graph captured without stays without, as for vLLM's own LoRA.
"""

# torch.library is not typed:
# mypy: disable-error-code="no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch

from hydra_kernels.metadata import NUM_SEGMENTS, NUM_TILES, StepMetadata
from hydra_kernels.ops import grouped
from hydra_kernels.slots import StackedSlots, meta_args
from hydra_kernels.tuning import ExpandConfig, ShrinkConfig, expand_config, shrink_config

# The registrations last as long as this object.
LIBRARY = torch.library.Library("hydra_kernels", "FRAGMENT")

# The probe's memory is written through addresses that its control holds, and nothing in a graph reads it.
PROBE_AND_CARRY = "Tensor? probe, int first_router, Tensor(c!)? carry=None"
META = "Tensor meta_host, Tensor meta_device, int max_tokens, int max_slots"
B_AND_GATE = "Tensor b, Tensor layout, Tensor bias, Tensor slice_start, int[] out_slices"
LIBRARY.define(f"shrink(Tensor x, Tensor a, Tensor layout, {META}) -> Tensor")
LIBRARY.define(f"expand_(Tensor(y!) y, Tensor z, {B_AND_GATE}, {META}, {PROBE_AND_CARRY}) -> ()")
LIBRARY.define(f"linear_(Tensor(y!) y, Tensor x, Tensor a, {B_AND_GATE}, {META}, {PROBE_AND_CARRY}) -> ()")


@torch.library.impl(LIBRARY, "shrink", "CompositeExplicitAutograd")
def _shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    layout: torch.Tensor,
    meta_host: torch.Tensor,
    _meta_device: torch.Tensor,
    _max_tokens: int,
    max_slots: int,
) -> torch.Tensor:
    return grouped.shrink(x, a, layout, meta_host, max_slots)


@torch.library.impl(LIBRARY, "expand_", "CompositeExplicitAutograd")
def _expand(
    y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    _slice_start: torch.Tensor,
    out_slices: list[int],
    meta_host: torch.Tensor,
    _meta_device: torch.Tensor,
    _max_tokens: int,
    max_slots: int,
    probe: torch.Tensor | None,
    first_router: int,
    carry: torch.Tensor | None = None,
) -> None:
    grouped.expand_(y, z, b, layout, bias, out_slices, meta_host, max_slots, probe, first_router, carry)


@torch.library.impl(LIBRARY, "linear_", "CompositeExplicitAutograd")
def _linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    _slice_start: torch.Tensor,
    out_slices: list[int],
    meta_host: torch.Tensor,
    _meta_device: torch.Tensor,
    _max_tokens: int,
    max_slots: int,
    probe: torch.Tensor | None,
    first_router: int,
    carry: torch.Tensor | None = None,
) -> None:
    if int(meta_host[NUM_SEGMENTS]) > 0:
        z = grouped.shrink(x, a, layout, meta_host, max_slots)
        grouped.expand_(y, z, b, layout, bias, out_slices, meta_host, max_slots, probe, first_router, carry)


def _nothing_to_do(meta_host: torch.Tensor, max_tokens: int, **rows: tuple[torch.Tensor, int, torch.dtype]) -> bool:
    """Whether no token has an adapter. If any: ValueError for tensors that the kernels would misread.

    rows: x, y or both by name, each [T, width] with its expected width and dtype; y may be wider.
    """
    with_adapter, segments = meta_host[:NUM_TILES].tolist()
    if segments == 0:
        return True
    tokens = next(iter(rows.values()))[0].shape[0]
    for name, (t, width, dtype) in rows.items():
        wide = t.shape[1] == width or (name == "y" and t.shape[1] > width)
        if not wide or t.shape[0] != tokens or t.stride(1) != 1 or t.dtype is not dtype:
            raise ValueError(
                f"{name}: got {t.dtype} {list(t.shape)} with column stride {t.stride(1)}, "
                f"expected {dtype} {[tokens, width]} with contiguous rows"
            )
    if not with_adapter <= tokens <= max_tokens:
        raise ValueError(
            f"{next(iter(rows))}: got {tokens} rows, expected at least the {with_adapter} tokens with an adapter of "
            f"the step and at most its {max_tokens}; update StepMetadata for these rows"
        )
    return False


# Triton is imported on the first call on a GPU: this package is importable without it.
@torch.library.impl(LIBRARY, "shrink", "CUDA")
def _shrink_cuda(
    x: torch.Tensor,
    a: torch.Tensor,
    layout: torch.Tensor,
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_tokens: int,
    max_slots: int,
) -> torch.Tensor:
    if _nothing_to_do(meta_host, max_tokens, x=(x, a.shape[3], a.dtype)):
        return torch.zeros(a.shape[1], x.shape[0], a.shape[2], dtype=torch.float32, device=x.device)
    from hydra_kernels.ops.shrink import shrink

    return shrink(x, a, layout, meta_host, meta_device, max_tokens, max_slots)


@torch.library.impl(LIBRARY, "expand_", "CUDA")
def _expand_cuda(
    y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    slice_start: torch.Tensor,
    out_slices: list[int],
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_tokens: int,
    max_slots: int,
    probe: torch.Tensor | None,
    first_router: int,
    carry: torch.Tensor | None = None,
) -> None:
    if _nothing_to_do(meta_host, max_tokens, y=(y, b.shape[1], b.dtype)):
        return
    if z.shape[:2] != (bias.shape[1], y.shape[0]) or z.dtype is not torch.float32:
        expected = [bias.shape[1], y.shape[0], "rows"]
        raise ValueError(f"z: got {z.dtype} {list(z.shape)}, expected float32 {expected}; make it with shrink")
    from hydra_kernels.ops.expand import expand_

    meta = meta_host, meta_device, max_tokens, max_slots
    expand_(y, z.contiguous(), b, layout, bias, slice_start, out_slices, *meta, None, probe, first_router, carry)


@torch.library.impl(LIBRARY, "linear_", "CUDA")
def _linear_cuda(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    layout: torch.Tensor,
    bias: torch.Tensor,
    slice_start: torch.Tensor,
    out_slices: list[int],
    meta_host: torch.Tensor,
    meta_device: torch.Tensor,
    max_tokens: int,
    max_slots: int,
    probe: torch.Tensor | None,
    first_router: int,
    carry: torch.Tensor | None = None,
) -> None:
    if _nothing_to_do(meta_host, max_tokens, x=(x, a.shape[3], a.dtype), y=(y, b.shape[1], b.dtype)):
        return
    from hydra_kernels.ops.expand import expand_
    from hydra_kernels.ops.shrink import shrink_partials

    meta = meta_host, meta_device, max_tokens, max_slots
    first, second = _block_sizes(a, b, x.shape[0])
    z = shrink_partials(x, a, layout, *meta, first, second.pdl)
    expand_(y, z, b, layout, bias, slice_start, out_slices, *meta, second, probe, first_router, carry)


def _block_sizes(a: torch.Tensor, b: torch.Tensor, tokens: int) -> tuple[ShrinkConfig, ExpandConfig]:
    """Of a shrink of `tokens` rows with a [slots, slices, rows, in], and of the expand that reads its partial sums."""
    _, slices, rows, in_features = a.shape
    first = shrink_config(a.device, a.dtype, tokens, in_features, rows, slices)
    splits = first.splits(in_features)
    return first, expand_config(a.device, a.dtype, tokens, b.shape[1], b.shape[2], slices, splits)


@torch.library.register_fake("hydra_kernels::shrink", lib=LIBRARY)
def _shrink_fake(
    x: torch.Tensor,
    a: torch.Tensor,
    _layout: torch.Tensor,
    _meta_host: torch.Tensor,
    _meta_device: torch.Tensor,
    _max_tokens: int,
    _max_slots: int,
) -> torch.Tensor:
    return x.new_empty((a.shape[1], x.shape[0], a.shape[2]), dtype=torch.float32)


@torch.library.register_fake("hydra_kernels::expand_", lib=LIBRARY)
@torch.library.register_fake("hydra_kernels::linear_", lib=LIBRARY)
def _in_place_fake(*_: object) -> None:
    return None


def warm_up(slots: StackedSlots, max_tokens: int) -> None:
    """Compile the kernels for every number of tokens up to `max_tokens`, so that no later step waits for a compiler.

    Without a GPU there is nothing to compile. Slots may be empty; what they hold is neither read nor changed.
    """
    if slots.device.type == "cuda":
        launch_empty_steps(slots, max_tokens)


def launch_empty_steps(slots: StackedSlots, max_tokens: int) -> None:
    """Every launch that steps of up to `max_tokens` tokens can make, with a step that has no work for them."""
    from hydra_kernels.ops.expand import expand_
    from hydra_kernels.ops.shrink import shrink_partials, sum_partials

    meta = StepMetadata(max_tokens, slots.num_slots, slots.device, slots.capacity.heads)
    step, rows = meta_args(meta), slots.a.shape[2]
    gate = slots.b, slots.layout, slots.bias, slots.slice_start, slots.out_slices
    x = torch.empty(max_tokens, slots.in_features, dtype=slots.dtype, device=slots.device)
    y = torch.empty(max_tokens, sum(slots.out_slices), dtype=slots.dtype, device=slots.device)
    probe = None if slots.probe is None else slots.probe.control
    # Block sizes are chosen by powers of two.
    for tokens in [1 << bits for bits in range((max_tokens - 1).bit_length())] + [max_tokens]:
        first, second = _block_sizes(slots.a, slots.b, tokens)
        z = shrink_partials(x[:tokens], slots.a, slots.layout, *step, first, second.pdl)
        expand_(y[:tokens], z, *gate, *step, second, probe, slots.first_router, meta.carry)
        z = shrink_partials(x[:tokens], slots.a, slots.layout, *step)
        z = sum_partials(z, rows, slots.layout, meta.device, meta.max_tokens, meta.max_slots)
        expand_(y[:tokens], z, *gate, *step, None, probe, slots.first_router, meta.carry)
