"""The asymmetry of A and B on adapters whose likeness is known by construction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra_kernels import Layout
from hydra_kernels.testing import random_weights

from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import ConfigError
from hydraserve.training.asymmetry import analyze, plot, similarities, span

LAYOUT = Layout(rank=3, heads=2, has_router=True)


def family(count: int, layout: Layout = LAYOUT) -> dict[str, HydraAdapter]:
    """Adapters whose A's span one space (in different bases) and whose B's are random."""
    adapters = {}
    for i in range(count):
        modules = {}
        for layer in range(4):
            shared = random_weights(60, 80, layout, torch.float32, seed=layer).a
            own = random_weights(60, 80, layout, torch.float32, seed=100 + 10 * i + layer)
            mix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(i)))[0]
            modules[f"model.layers.{layer}.mlp.up_proj"] = replace(own, a=mix @ shared)
        adapters[f"task{i}"] = HydraAdapter.of(modules)
    return adapters


def test_similarity_of_spaces() -> None:
    rows = torch.eye(6)
    one, half, none = span(rows[:2]), span(rows[1:3] * 5), span(rows[4:])
    table = similarities([one, half, none, span(torch.zeros(2, 6)), span(rows[:4] @ torch.diag(torch.arange(1.0, 7)))])
    expected = np.array([[1, 0.5, 0, 0, 1], [0.5, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]])
    np.testing.assert_allclose(table, expected, atol=1e-6)


def test_shared_a_and_different_b() -> None:
    result = analyze(family(3))
    assert result.a.across == pytest.approx(1, abs=1e-5)
    assert result.a.within is None
    assert result.b.across < 0.15
    assert result.b.within < 0.15
    assert result.asymmetry == pytest.approx(result.a.across - result.b.across)
    assert len([p for p in result.points if p.side == "A"]) == 3 * 4
    assert len([p for p in result.points if p.side == "B"]) == 3 * 4 * 2
    assert {p.kind for p in result.points} == {"up_proj"}
    assert analyze(family(3)) == result


def test_same_adapter_twice_is_symmetric() -> None:
    adapter = family(1)["task0"]
    result = analyze({"one": adapter, "two": adapter})
    assert result.a.across == pytest.approx(1, abs=1e-5)
    # Each head equals itself in the other adapter and is unlike the other head: half of the four pairs are 1.
    assert result.b.across == pytest.approx((1 + result.b.within) / 2, abs=1e-5)


def test_lora_of_another_rank_beside_hydralora() -> None:
    lora = HydraAdapter.of(
        {
            f"model.layers.{i}.mlp.up_proj": random_weights(60, 80, Layout(rank=5), torch.float32, seed=50 + i)
            for i in (0, 1)
        }
    )
    result = analyze({"hydra": family(1)["task0"], "lora": lora})
    assert 0 <= result.a.across < 0.3
    assert result.adapters == ("hydra", "lora")


def test_one_adapter_and_strangers() -> None:
    alone = analyze(family(1))
    assert (alone.a.across, alone.asymmetry) == (None, None)
    assert alone.b.within is not None
    other = HydraAdapter.of({"encoder.0": random_weights(60, 80, LAYOUT, torch.float32)})
    with pytest.raises(ConfigError, match="adapters that share no layer"):
        analyze({"one": family(1)["task0"], "two": other})


def test_one_kind_of_layer_in_two_widths(tmp_path: Path) -> None:
    modules = dict(family(1)["task0"].modules)
    wide = {f"vision.{i}.mlp.up_proj": random_weights(30, 80, LAYOUT, torch.float32, seed=i) for i in range(5)}
    result = analyze({"one": HydraAdapter.of(modules | wide), "two": HydraAdapter.of(modules)})
    assert {p.width for p in result.points if p.side == "A"} == {30, 60}
    assert {p.width for p in result.points if p.side == "B"} == {80}
    assert result.a.across == pytest.approx(1, abs=1e-5)
    plot(result, tmp_path / "asymmetry.png")
    assert (tmp_path / "asymmetry.png").stat().st_size > 5000


def test_one_layer_in_two_widths_is_of_two_bases() -> None:
    path = "model.layers.0.mlp.up_proj"
    other = HydraAdapter.of({path: random_weights(60, 40, LAYOUT, torch.float32)})
    with pytest.raises(ConfigError, match="from 60 to 80 features in one, from 60 to 40 in two, expected adapters of"):
        analyze({"one": family(1)["task0"], "two": other})


@pytest.mark.parametrize("count", [1, 3])
def test_plot_is_a_png(tmp_path: Path, count: int) -> None:
    path = tmp_path / "new" / "asymmetry.png"
    plot(analyze(family(count)), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5000
