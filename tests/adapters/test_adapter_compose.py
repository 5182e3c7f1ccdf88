"""Composed adapters compute what their parts compute, added up or mixed; written here in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hydra_kernels import HydraWeights, Layout, reference
from hydra_kernels.testing import random_weights

from hydraserve.adapters.compose import Recipe, RouterFile, compose, read_router
from hydraserve.adapters.formats.plan import PREFIX
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import (
    AdapterConfigError,
    AdapterError,
    DuplicateModuleError,
    EmptyTensorError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnexpectedTensorError,
    UnsupportedFeatureError,
)

UP, DOWN, Q = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
SHAPES = {UP: (24, 40), DOWN: (40, 24), Q: (24, 24)}


def lora(rank: int, paths: tuple[str, ...], seed: int, dtype: torch.dtype = torch.float32) -> HydraAdapter:
    return HydraAdapter.of(
        {path: random_weights(*SHAPES[path], Layout(rank), dtype, seed + i) for i, path in enumerate(paths)}
    )


def alone(weights: HydraWeights | None, x: torch.Tensor) -> torch.Tensor:
    """s B A x of ordinary LoRA, by hand, in float64."""
    if weights is None:
        return torch.zeros(())
    return weights.scaling * (x @ weights.a.double().T) @ weights.b[0].double().T


PARTS = [(lora(4, (UP, DOWN), 1), 0.7), (lora(6, (UP, Q), 20), -1.3), (lora(3, (UP, DOWN), 40), 2.0)]


def test_a_sum_adds_its_parts_up() -> None:
    composed = compose(PARTS)
    assert (composed.format, set(composed.modules)) == ("composed", set(SHAPES))
    assert {path: w.layout for path, w in composed.modules.items()} == {UP: Layout(13), DOWN: Layout(7), Q: Layout(6)}
    for path, weights in composed.modules.items():
        x = torch.randn(7, SHAPES[path][0], dtype=torch.float64)
        expected = sum((weight * alone(part.modules.get(path), x) for part, weight in PARTS), torch.zeros(()))
        torch.testing.assert_close(reference.delta(x, weights, torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_equal_weights_change_no_bit_of_the_parts() -> None:
    """Nothing is rounded, whatever the type."""
    parts = [(lora(4, (UP,), seed, torch.bfloat16), 0.5) for seed in (1, 2)]
    weights = compose(parts).modules[UP]
    assert weights.b.dtype is torch.bfloat16
    assert torch.equal(weights.b[0], torch.cat([part.modules[UP].b[0] for part, _ in parts], dim=1))
    assert torch.equal(weights.a, torch.cat([part.modules[UP].a for part, _ in parts]))
    assert weights.scaling == 0.5 * parts[0][0].modules[UP].scaling


def test_different_weights_are_kept_in_float32() -> None:
    """bfloat16 weights times a ratio need more bits than they had."""
    parts = [(lora(4, (UP,), 1, torch.bfloat16), 1.0), (lora(4, (UP,), 2, torch.bfloat16), 0.3)]
    weights = compose(parts).modules[UP]
    assert weights.b.dtype is torch.float32
    x = torch.randn(7, 24, dtype=torch.float64)
    expected = alone(parts[0][0].modules[UP], x) + 0.3 * alone(parts[1][0].modules[UP], x)
    torch.testing.assert_close(reference.delta(x, weights, torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_one_adapter_of_any_kind_is_scaled() -> None:
    layout = Layout(4, 3, has_router=True, top_k=2, has_bias=True)
    weights = random_weights(24, 40, layout, torch.float32)
    scaled = compose([(HydraAdapter.of({UP: weights}), -0.25)]).modules[UP]
    x = torch.randn(5, 24)
    torch.testing.assert_close(reference.delta(x, scaled), -0.25 * reference.delta(x, weights))


def routers(bias: bool, heads: int = 3) -> RouterFile:
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return RouterFile({p: (normal(heads, n) / 3, normal(heads) if bias else None) for p, (n, _) in SHAPES.items()})


@pytest.mark.parametrize("bias", [True, False])
def test_a_router_mixes_whole_adapters(bias: bool) -> None:
    file = routers(bias)
    for path, weights in compose(PARTS, file).modules.items():
        x = torch.randn(7, SHAPES[path][0], dtype=torch.float64)
        router, offset = file.routers[path]
        logits = x @ router.double().T + (0 if offset is None else offset.double())
        mixed = torch.softmax(logits, -1)
        expected = torch.zeros(())
        for i, (part, weight) in enumerate(PARTS):
            expected = expected + mixed[:, i : i + 1] * weight * alone(part.modules.get(path), x)
        torch.testing.assert_close(reference.delta(x, weights, torch.float64), expected, rtol=1e-6, atol=1e-6)


def write_router(folder: Path, file: RouterFile, config: dict[str, object] | None = None) -> Path:
    tensors = {}
    for path, (router, bias) in file.routers.items():
        tensors[f"{path}.router.weight"] = router
        if bias is not None:
            tensors[f"{path}.router.bias"] = bias
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "router.safetensors")
    if config is not None:
        (folder / "router_config.json").write_text(json.dumps(config))
    return folder


def test_a_router_comes_from_a_file(tmp_path: Path) -> None:
    written = routers(True)
    file = read_router(write_router(tmp_path, written, {"top_k": 2, "renormalize": False}))
    assert (file.top_k, file.renormalize) == (2, False)
    assert set(file.routers) == set(SHAPES)
    for path, (router, bias) in file.routers.items():
        assert torch.equal(router, written.routers[path][0])
        assert bias is not None
        assert torch.equal(bias, written.routers[path][1])  # type: ignore[arg-type]
    assert compose(PARTS, file).modules[UP].layout == Layout(
        6, 3, shared_a=False, top_k=2, renormalize=False, has_router=True, has_bias=True
    )


@pytest.mark.parametrize(
    ("file", "error"),
    [
        (RouterFile({p: r for p, r in routers(False).routers.items() if p != Q}), MissingTensorError),
        (RouterFile({**routers(False).routers, f"{UP}s": (torch.ones(3, 24), None)}), UnexpectedTensorError),
        (routers(False, heads=2), ShapeError),
    ],
    ids=["no router for a module", "a router too many", "other adapters"],
)  # fmt: skip
def test_routers_of_other_adapters(file: RouterFile, error: type[AdapterError]) -> None:
    with pytest.raises(error, match="router"):
        compose(PARTS, file)


def test_the_total_rank_has_a_limit() -> None:
    with pytest.raises(LimitError, match=r"rank of .*up_proj: got 13 = 4 \+ 6 \+ 3, expected at most 12"):
        compose(PARTS, limits=AdapterLimits(rank=12))


def test_mixtures_do_not_add_up_to_a_mixture() -> None:
    hydra = HydraAdapter.of({UP: random_weights(24, 40, Layout(4, 3, has_router=True), torch.float32)})
    with pytest.raises(UnsupportedFeatureError, match="3 heads in an adapter to be composed"):
        compose([(hydra, 1.0), (PARTS[0][0], 1.0)])


def test_adapters_of_other_base_models() -> None:
    other = HydraAdapter.of({UP: random_weights(32, 40, Layout(4), torch.float32)})
    with pytest.raises(ShapeError, match="32 inputs"):
        compose([(PARTS[0][0], 1.0), (other, 1.0)])


def test_a_recipe_is_its_source() -> None:
    recipe = Recipe((("style", 0.7), ("domain/sql", -1.0)), "/routers/one")
    assert Recipe.parse(recipe.source) == recipe
    assert str(recipe) == "0.7 style + -1 domain/sql under the router /routers/one"
    assert Recipe.parse("/some/folder") is None
    with pytest.raises(AdapterConfigError, match="compose it again"):
        Recipe.parse("compose:{}")


@pytest.mark.parametrize("parts", [(), (("a", 1.0), ("a", 2.0)), (("a", 0.0),), (("a", float("nan")),)])
def test_recipes_that_make_no_adapter(parts: tuple[tuple[str, float], ...]) -> None:
    with pytest.raises(AdapterConfigError):
        Recipe(parts)


def test_an_empty_router_is_an_adapter_error(tmp_path: Path) -> None:
    folder = write_router(tmp_path, RouterFile({UP: (torch.empty(0, 24), None)}))
    with pytest.raises(EmptyTensorError, match="router"):
        read_router(folder)


def test_two_names_for_one_router_are_refused(tmp_path: Path) -> None:
    folder = write_router(tmp_path, RouterFile({UP: (torch.ones(3, 24), None), PREFIX + UP: (torch.ones(3, 24), None)}))
    with pytest.raises(DuplicateModuleError, match="up_proj"):
        read_router(folder)


def test_a_weight_beyond_all_numbers_is_an_adapter_error() -> None:
    with pytest.raises(NonFiniteError, match="scaling of"):
        compose([(PARTS[0][0], 1e300)])
