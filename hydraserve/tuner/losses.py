"""Optional losses on the router: load balance and z-loss.

Both depend on one layer's logits alone, so each layer adds its own where the logits are: the loss is attached to
the routing weights by an identity whose backward passes a constant gradient to it. No trainer has to know: it
works with any loss that a trainer computes (TRL's SFTTrainer never looks at the model's own `loss`) and under
gradient checkpointing, whose recomputation attaches it again.

What a trainer does to its loss before `backward()` does not reach a loss attached this way. With gradient
accumulation pass `RouterLossCallback()` to the Trainer, which divides by the number of steps. Loss scaling
(fp16) is not followed, and the callback refuses it; train in bfloat16 or float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from hydraserve.tuner.config import HydraLoraConfig


class _AttachLoss(torch.autograd.Function):
    """Identity on `weights`; in the backward pass `loss` gets the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale, ctx.loss = scale, (loss.dtype, loss.device)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        dtype, device = ctx.loss
        return grads[0], torch.tensor(ctx.scale, dtype=dtype, device=device), None


@dataclass
class RouterLosses:
    """What the layers of one model share about their router losses.

    scale:        factor on the gradient, 1 / gradient accumulation steps.
    token_mask:   [batch, sequence] of the step's tokens that count, or None for all: padding must not.
    num_layers:   adapted layers, over which the losses are averaged.
    """

    scale: float = 1.0
    token_mask: torch.Tensor | None = None
    num_layers: int = 1

    def attach(self, weights: torch.Tensor, logits: torch.Tensor, config: HydraLoraConfig) -> torch.Tensor:
        """`weights` [..., E] unchanged, with this layer's losses of `logits` [..., E] in its backward pass."""
        weights_, logits_ = self.select(weights), self.select(logits)
        loss = config.load_balance_coef * load_balance_loss(weights_)
        loss = loss + config.router_z_coef * router_z_loss(logits_)
        attached: torch.Tensor = _AttachLoss.apply(weights, loss / self.num_layers, self.scale)  # type: ignore[no-untyped-call]
        return attached

    def select(self, t: torch.Tensor) -> torch.Tensor:
        """[tokens, E], without padding where the mask fits (layers may see other shapes, as in MoE blocks)."""
        if self.token_mask is not None and self.token_mask.shape == t.shape[:-1]:
            return t[self.token_mask.bool()]
        return t.reshape(-1, t.shape[-1])


def load_balance_loss(weights: torch.Tensor) -> torch.Tensor:
    """E * sum_i mean_t(w_ti)^2 of weights [T, E]: 1 for equal shares, E when one head takes every token.

    The loss of arXiv:2101.03961, eq. 4, for a router that uses every head for each token: the share of tokens
    sent to head i is then its mean weight itself.
    """
    return weights.shape[-1] * weights.float().mean(0).square().sum()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """mean_t(logsumexp_i(g_ti)^2) of logits [T, E] (arXiv:2202.08906, eq. 5)."""
    return torch.logsumexp(logits.float(), dim=-1).square().mean()


class RouterLossCallback(TrainerCallback):
    """Gives router losses their true weight under gradient accumulation: `Trainer(..., callbacks=[...])`.

    Raises ValueError for a training with router losses in fp16, whose loss scaling they would not follow.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for module in kwargs["model"].modules():
            losses = getattr(module, "router_losses", None)
            if isinstance(losses, RouterLosses):
                configs = getattr(module, "configs", {}).values()
                if args.fp16 and any(c.load_balance_coef or c.router_z_coef for c in configs):
                    raise ValueError(
                        "router losses: got fp16=True, whose scaling they do not follow; expected bf16=True"
                    )
                losses.scale = 1.0 / args.gradient_accumulation_steps
