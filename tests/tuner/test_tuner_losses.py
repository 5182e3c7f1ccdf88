"""The router losses: values, gradients, padding, gradient accumulation."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hydraserve.tuner import HydraLoraConfig, record_routing
from hydraserve.tuner.losses import load_balance_loss, router_z_loss


def test_load_balance_is_one_for_equal_shares_and_e_for_one_head() -> None:
    one_head = torch.nn.functional.one_hot(torch.full((10,), 2), 4).float()
    even = torch.nn.functional.one_hot(torch.arange(12) % 4, 4).float()
    assert load_balance_loss(torch.full((7, 4), 0.25)).item() == pytest.approx(1)
    assert load_balance_loss(even).item() == pytest.approx(1)
    assert load_balance_loss(one_head).item() == pytest.approx(4)


def test_z_loss_is_the_square_of_the_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    expected = (torch.exp(logits).sum(-1).log() ** 2).mean()
    torch.testing.assert_close(router_z_loss(logits), expected)


class Masked(nn.Module):
    """A model that takes an attention mask, as transformers' do."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make(layers: int = 1, **coefs: float) -> nn.Module:
    torch.manual_seed(0)
    config = HydraLoraConfig(r=2, num_heads=3, target_modules=r"layers\.\d+", init_weights=False, **coefs)
    return get_peft_model(Masked(layers), config)


def router_grads(model: nn.Module) -> list[torch.Tensor]:
    return [layer.hydralora_router["default"].weight.grad for layer in model.base_model.model.layers]


def test_losses_reach_the_routers_whatever_loss_the_trainer_takes() -> None:
    x = torch.randn(2, 5, 6)
    plain, with_losses = make(layers=2), make(layers=2, load_balance_coef=0.3, router_z_coef=0.7)
    with record_routing(with_losses) as routing:
        output = with_losses(x)
    assert torch.equal(plain(x), output), "the losses must not change the forward pass"
    output.square().mean().backward()

    explicit = make(layers=2)
    y, total = x, torch.tensor(0.0)
    for layer in explicit.base_model.model.layers:
        logits = layer.hydralora_router["default"](y).view(-1, 3)
        total = total + (0.3 * load_balance_loss(logits.softmax(-1)) + 0.7 * router_z_loss(logits)) / 2
        y = layer(y)
    (y.square().mean() + total).backward()
    for got, expected in zip(router_grads(with_losses), router_grads(explicit), strict=True):
        torch.testing.assert_close(got, expected)
    assert routing.weights["layers.0"][0].requires_grad is False


def test_padding_does_not_count() -> None:
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded, short = make(load_balance_coef=1.0), make(load_balance_coef=1.0)
    # A loss of zero on the output leaves only the router's own.
    with record_routing(padded) as of_padded, record_routing(short) as of_short:
        (padded(x, attention_mask=mask) * 0).sum().backward()
        (short(x[mask.bool()][None]) * 0).sum().backward()
    assert of_padded.weights["layers.0"][0].shape == (2, 5, 3)
    torch.testing.assert_close(of_padded.tokens("layers.0"), of_short.tokens("layers.0"))
    torch.testing.assert_close(router_grads(padded), router_grads(short))
    unmasked = make(load_balance_coef=1.0)
    (unmasked(x) * 0).sum().backward()
    assert not torch.allclose(router_grads(unmasked)[0], router_grads(short)[0])


def test_off_in_eval_and_without_coefficients() -> None:
    x = torch.randn(2, 5, 6)
    for model in (make(load_balance_coef=1.0).eval(), make()):
        (model(x) * 0).sum().backward()
        assert router_grads(model)[0].abs().max() == 0


def test_balance_loss_evens_out_a_skewed_router() -> None:
    model = make(load_balance_coef=1.0)
    x = torch.randn(64, 6) + 1
    layer = model.base_model.model.layers[0]
    with torch.no_grad():
        layer.hydralora_router["default"].weight[0] += 1  # head 0 takes nearly every token
    optimizer = torch.optim.Adam(layer.hydralora_router.parameters(), lr=0.05)

    def shares() -> torch.Tensor:
        with record_routing(model) as routing:
            model(x)
        return routing.usage()["layers.0"]

    before = shares()
    for _ in range(60):
        optimizer.zero_grad()
        (model(x) * 0).sum().backward()
        optimizer.step()
    assert before.max() > 0.9
    assert shares().max() < 0.45
