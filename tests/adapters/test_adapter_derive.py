"""Derived adapters compute what the reference computes for one head, the best heads, or equal weights."""

from __future__ import annotations

import pytest
import torch
from hydra_kernels import HydraWeights, Layout, reference
from hydra_kernels.testing import random_weights

from hydraserve.adapters.derive import derive, split_derived
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import UnknownAdapterError

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 40), "model.layers.0.mlp.down_proj": (40, 24)}


@pytest.fixture(scope="module")
def adapter() -> HydraAdapter:
    """Four heads of rank 3 in one module; in the other, LoRAMoE-like, three with an A each and a router bias."""
    moe = Layout(rank=2, heads=3, shared_a=False, has_router=True, has_bias=True)
    modules = {
        "model.layers.0.self_attn.q_proj": random_weights(24, 40, Layout(3, 4, has_router=True), torch.float64, 1),
        "model.layers.0.mlp.down_proj": random_weights(40, 24, moe, torch.float64, 2),
    }
    return HydraAdapter.of(modules, base_model="base", source="somewhere")


def outputs(adapter: HydraAdapter) -> list[tuple[torch.Tensor, torch.Tensor, HydraWeights]]:
    """(x, delta, weights) of each module."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for weights in adapter.modules.values():
        x = torch.randn(11, weights.in_features, generator=generator, dtype=torch.float64)
        result.append((x, reference.delta(x, weights, torch.float64), weights))
    return result


def heads_alone(x: torch.Tensor, weights: HydraWeights) -> torch.Tensor:
    """s * B_i A_i x of every head, [E, T, out], written out without the code under test."""
    layout = weights.layout
    a = weights.a.view(-1, layout.rank, weights.in_features).expand(layout.heads, -1, -1)
    return torch.stack([weights.scaling * (x @ a[i].T) @ weights.b[i].T for i in range(layout.heads)])


@pytest.mark.parametrize("head", [0, 1, 2])
def test_one_head_is_plain_lora_of_that_head(adapter: HydraAdapter, head: int) -> None:
    derived = derive(adapter, f"head={head}")
    assert derived.format == "lora"
    assert {layout.heads for layout in derived.layouts} == {1}
    for (x, got, _), weights in zip(outputs(derived), adapter.modules.values(), strict=True):
        torch.testing.assert_close(got, heads_alone(x, weights)[head])


def test_uniform_is_the_mean_of_the_heads(adapter: HydraAdapter) -> None:
    for (x, got, _), weights in zip(outputs(derive(adapter, "uniform")), adapter.modules.values(), strict=True):
        torch.testing.assert_close(got, heads_alone(x, weights).mean(0))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_mixes_only_the_largest_weights(adapter: HydraAdapter, k: int) -> None:
    for (x, got, _), weights in zip(outputs(derive(adapter, f"top_k={k}")), adapter.modules.values(), strict=True):
        w = reference.routing_weights(x, weights, torch.float64)
        smallest_kept = w.sort(dim=-1, descending=True).values[:, k - 1 : k]
        w = torch.where(w >= smallest_kept, w, 0.0)
        w = w / w.sum(-1, keepdim=True)
        torch.testing.assert_close(got, torch.einsum("te,eto->to", w, heads_alone(x, weights)))


def test_derivations_differ_in_digest_and_share_memory(adapter: HydraAdapter) -> None:
    derived = {spec: derive(adapter, spec) for spec in ("head=0", "head=1", "top_k=1", "top_k=2", "uniform")}
    assert len({d.digest for d in derived.values()} | {adapter.digest}) == len(derived) + 1
    assert derive(adapter, "head=1").digest == derived["head=1"].digest
    path = "model.layers.0.self_attn.q_proj"
    assert derived["top_k=1"].modules[path].b.data_ptr() == adapter.modules[path].b.data_ptr()
    assert derived["head=0"].source == adapter.source


def test_top_k_of_all_heads_is_the_adapter_itself(adapter: HydraAdapter) -> None:
    assert derive(adapter, "top_k=4").digest == adapter.digest


@pytest.mark.parametrize("spec", ["head=4", "head=3", "top_k=0", "top_k=5", "head=-1", "head=01", "top_k", "", "mean"])
def test_a_derivation_that_cannot_be_is_refused(adapter: HydraAdapter, spec: str) -> None:
    """head 3 exists in one of the two modules only."""
    with pytest.raises(UnknownAdapterError) as caught:
        derive(adapter, spec)
    assert spec in str(caught.value)
    assert "expected" in str(caught.value)


def test_plain_lora_has_nothing_to_derive() -> None:
    plain = make_adapter(SHAPES, rank=4, heads=1)
    for spec in ("head=0", "top_k=1", "uniform"):
        with pytest.raises(UnknownAdapterError, match="without a router"):
            derive(plain, spec)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sql@head=2", ("sql", "head=2")),
        ("team@sql@uniform", ("team@sql", "uniform")),
        ("sql@top_k=1", ("sql", "top_k=1")),
        ("sql", None),
        ("sql@latest", None),
        ("@uniform", None),
        ("sql@", None),
    ],
)
def test_names_are_split_at_the_last_at(name: str, expected: tuple[str, str] | None) -> None:
    assert split_derived(name) == expected
