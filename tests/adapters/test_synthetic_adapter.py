"""Random adapters: repeatable, of the asked sizes, with heads and routers that do something."""

from __future__ import annotations

import pytest
import torch
from hydra_kernels import Layout, reference

from hydraserve.adapters.synthetic import make_adapter

SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(3)
    for name, shape in {"self_attn.q_proj": (64, 48), "mlp.up_proj": (64, 96), "mlp.down_proj": (96, 64)}.items()
}


def test_sizes_and_modules() -> None:
    adapter = make_adapter(SHAPES, ["up_proj", "down_proj"], 8, 4)
    assert set(adapter.modules) == {path for path in SHAPES if "mlp" in path}
    assert adapter.layouts == {Layout(8, 4, has_router=True)}
    assert adapter.format == "hydralora"
    for path, weights in adapter.modules.items():
        assert (weights.in_features, weights.out_features) == SHAPES[path]
        assert weights.scaling == 2.0


def test_the_seed_makes_the_adapter() -> None:
    turned = dict(reversed(SHAPES.items()))
    assert make_adapter(SHAPES, seed=1).digest == make_adapter(turned, seed=1).digest
    assert len({make_adapter(SHAPES, seed=seed).digest for seed in range(5)}) == 5


def test_layers_may_differ() -> None:
    adapter = make_adapter(SHAPES, None, [2, 8], [3, 1, 4], alpha=6)
    layouts = [adapter.modules[path].layout for path in sorted(SHAPES)]
    assert [layout.rank for layout in layouts] == [2, 8, 2, 8, 2, 8, 2, 8, 2]
    assert [layout.heads for layout in layouts] == [3, 1, 4, 3, 1, 4, 3, 1, 4]
    assert all(weights.scaling == 6 / weights.layout.rank for weights in adapter.modules.values())
    assert all(layout.has_router for layout in layouts)


def test_one_head_is_plain_lora_unless_asked_otherwise() -> None:
    assert make_adapter(SHAPES, None, 4, 1).layouts == {Layout(4)}
    assert make_adapter(SHAPES, None, 4, 1).format == "lora"
    assert make_adapter(SHAPES, None, 4, 1, plain=False).layouts == {Layout(4, 1, has_router=True)}


def test_what_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="expected 1 for plain LoRA"):
        make_adapter(SHAPES, None, 4, 2, plain=True)
    with pytest.raises(ValueError, match="targets"):
        make_adapter(SHAPES, ["no_such"])


def test_every_head_has_its_share_and_tokens_differ() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    weights = make_adapter(SHAPES, ["q_proj"], 8, 4, sharpness=2.0).modules["model.layers.0.self_attn.q_proj"]
    w = reference.routing_weights(x, weights)
    assert (w.mean(0) > 0.1).all(), "no head is dead"
    assert (w.argmax(-1).bincount(minlength=4) > 10).all(), "each is some token's first"
    assert w.max(-1).values.mean() > 0.5, "and this is no even mixture"


def test_strength_is_the_size_of_the_delta() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    for strength in (0.1, 1.0):
        weights = make_adapter(SHAPES, ["q_proj"], 8, 1, strength=strength).modules["model.layers.0.self_attn.q_proj"]
        assert reference.delta(x, weights).pow(2).mean().sqrt() == pytest.approx(strength, rel=0.3)
