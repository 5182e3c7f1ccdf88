"""The tuner's layer against the float64 reference: values, gradients, dtypes, recording."""

from __future__ import annotations

import pytest
import torch
from hydra_kernels import HydraWeights, Layout, reference
from hydra_kernels.testing import TOLERANCE, max_error
from peft import get_peft_model
from torch import nn

from hydraserve.tuner import HydraLoraConfig, HydraLoraLinear, record_routing


class TwoLinear(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(13, 24, bias=True, dtype=dtype)
        self.down = nn.Linear(24, 7, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def adapted(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = HydraLoraConfig(
        **{"r": 3, "num_heads": 5, "target_modules": ["up", "down"], "init_weights": False} | options
    )
    return get_peft_model(TwoLinear(dtype), config, autocast_adapter_dtype=False)


def weights_of(layer: HydraLoraLinear, adapter: str = "default") -> HydraWeights:
    router = layer.hydralora_router[adapter].weight
    return HydraWeights(
        a=layer.hydralora_A[adapter].weight,
        b=layer.hydralora_B[adapter].weight,
        router=router,
        layout=Layout(rank=layer.r[adapter], heads=router.shape[0], has_router=True),
        scaling=layer.scaling[adapter],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"r": 1, "num_heads": 1}, {"r": 5, "num_heads": 2, "use_rslora": True}])
@pytest.mark.parametrize("shape", [(4, 13), (2, 6, 13)])
def test_forward_agrees_with_reference(dtype: torch.dtype, options: dict[str, int], shape: tuple[int, ...]) -> None:
    layer = adapted(dtype, **options).base_model.model.up
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        expected = reference.linear(
            layer.base_layer(x).view(-1, 24), x.view(-1, 13), [0] * x.view(-1, 13).shape[0],
            [[weights_of(layer)]], [24], torch.float64,
        )  # fmt: skip
        got = layer(x)
    assert got.dtype == dtype
    assert max_error(got.view(-1, 24), expected) < TOLERANCE[dtype]


def test_gradients_agree_with_autograd_through_reference() -> None:
    layer = adapted(torch.float64).base_model.model.up
    x = torch.randn(9, 13, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(9, 24, dtype=torch.float64)
    parameters = [layer.hydralora_A["default"].weight, layer.hydralora_B["default"].weight]
    parameters += [layer.hydralora_router["default"].weight, x]
    got = torch.autograd.grad((layer.delta(x, "default") * seed).sum(), parameters)
    expected = torch.autograd.grad((reference.delta(x, weights_of(layer), torch.float64) * seed).sum(), parameters)
    for g, e in zip(got, expected, strict=True):
        # float32 softmax in the layer, float64 in the reference
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


def test_new_adapter_changes_nothing_and_can_learn() -> None:
    torch.manual_seed(0)
    base = TwoLinear()
    x = torch.randn(5, 13)
    before = base(x)
    model = get_peft_model(base, HydraLoraConfig(target_modules=["up"]))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    layer = model.base_model.model.up
    assert layer.hydralora_B["default"].weight.grad.abs().sum() > 0
    assert layer.base_layer.weight.grad is None


def test_initialisation_is_that_of_the_authors() -> None:
    torch.manual_seed(0)
    layer = get_peft_model(nn.Sequential(nn.Linear(400, 4)), HydraLoraConfig(r=64, num_heads=32, target_modules=["0"]))
    layer = layer.base_model.model[0]
    for weight in (layer.hydralora_A["default"].weight, layer.hydralora_router["default"].weight):
        assert weight.abs().max() <= 1 / 20  # kaiming uniform with a = sqrt 5: U(-1/sqrt(in), 1/sqrt(in))
        assert weight.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert layer.hydralora_B["default"].weight.abs().max() == 0


def test_bfloat16_base_has_float32_adapter_by_default() -> None:
    model = get_peft_model(TwoLinear(torch.bfloat16), HydraLoraConfig(target_modules=["up"]))
    layer = model.base_model.model.up
    assert layer.hydralora_B["default"].weight.dtype == torch.float32
    assert model(torch.randn(2, 13, dtype=torch.bfloat16)).dtype == torch.bfloat16
    kept = get_peft_model(
        TwoLinear(torch.bfloat16), HydraLoraConfig(target_modules=["up"]), autocast_adapter_dtype=False
    )
    assert kept.base_model.model.up.hydralora_A["default"].weight.dtype == torch.bfloat16


def test_dropout_spares_the_router_and_is_off_in_eval() -> None:
    model = adapted(lora_dropout=0.5)
    x = torch.randn(3, 13)
    with record_routing(model.base_model.model.up) as routing:
        dropped = model(x)
        model.eval()
        first = model(x)
    assert not torch.allclose(dropped, first)
    assert torch.equal(model(x), first)
    assert torch.equal(routing.weights["up"][0], routing.weights["up"][1])


def test_recorded_routing_is_the_routers_softmax() -> None:
    model = adapted()
    x = torch.randn(2, 6, 13)
    with record_routing(model) as routing:
        model(x)
    model(x)  # outside the block: not recorded
    layer = model.base_model.model.up
    assert [w.shape for w in routing.weights["up"]] == [(2, 6, 5)]
    torch.testing.assert_close(routing.tokens("up"), reference.routing_weights(x.view(-1, 13), weights_of(layer)))
    assert routing.usage()["down"].sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="without HydraLoRA layers"), record_routing(TwoLinear()):
        pass


class Int8Linear(nn.Module):
    """A quantised layer of a library that PEFT does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 13, 24


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(TypeError, match="0: got a Int8Linear, expected a linear layer"):
        get_peft_model(nn.Sequential(Int8Linear()), HydraLoraConfig(target_modules=["0"]))


def test_quantised_subclass_of_linear_is_called_not_copied() -> None:
    class Quantised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = self.weight.abs().max() / 7
            return nn.functional.linear(x, (self.weight / scale).round() * scale)

    base = Quantised(13, 24, bias=False)
    x = torch.randn(4, 13)
    expected = base(x)
    model = get_peft_model(nn.Sequential(base), HydraLoraConfig(target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    torch.testing.assert_close(model(x) - layer.delta(x, "default"), expected)
