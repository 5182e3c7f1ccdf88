"""HydraLoRA under transformers' Trainer and TRL's SFTTrainer, both unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from hydraserve.tuner import HydraLoraConfig, HydraLoraLayer, RouterLossCallback
from hydraserve.tuner.losses import router_z_loss

VOCABULARY = 32
COMMON: dict[str, Any] = {
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 30,
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    # initializer_range: hidden states large enough for the frozen output layer to be steered in a few steps
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, **sizes)
    )


def config(**options: float) -> HydraLoraConfig:
    return HydraLoraConfig(
        r=4, num_heads=3, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )


def counting() -> Dataset:
    """Sequences that count up: each token follows from the one before."""
    rows = [[(start + i) % VOCABULARY for i in range(8)] for start in range(VOCABULARY)]
    return Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 8} for row in rows])


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1")


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_learned(trainer: Trainer, folder: Path) -> None:
    losses = losses_of(trainer)
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0], losses
    trainer.save_model(str(folder))
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    tokens = torch.tensor([counting()[3]["input_ids"]])
    # SFTTrainer trains in bfloat16 where nothing else is said; its model then always computes so.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):
        torch.testing.assert_close(loaded(tokens).logits.float(), trainer.model.eval()(tokens).logits.float())


def plain_trainer(folder: Path, **options: float) -> Trainer:
    return Trainer(
        model=get_peft_model(tiny_llama(), config(**options)),
        args=TrainingArguments(output_dir=str(folder), **COMMON),
        train_dataset=counting(),
        data_collator=default_data_collator,
    )


def sft_trainer(folder: Path, **options: float) -> Trainer:
    return SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(output_dir=str(folder), **COMMON),
        train_dataset=counting().remove_columns(["labels", "attention_mask"]),
        processing_class=tokenizer(),
        peft_config=config(**options),
    )


TRAINERS = pytest.mark.parametrize("make", [plain_trainer, sft_trainer])


@TRAINERS
def test_loss_falls_and_the_adapter_comes_back(make: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert_learned(trainer, tmp_path / "adapter")


def z_loss(trainer: Trainer) -> float:
    """Mean z-loss of all routers over the training data."""
    values: list[float] = []
    for layer in trainer.model.modules():
        if isinstance(layer, HydraLoraLayer):
            router = layer.parts("default").router
            router.register_forward_hook(lambda _, __, logits: values.append(router_z_loss(logits.view(-1, 3)).item()))
    with torch.no_grad():
        trainer.model.eval()(torch.tensor(counting()["input_ids"][:]))
    return sum(values) / len(values)


@TRAINERS
def test_router_losses_act_under_every_trainer(make: Callable[..., Trainer], tmp_path: Path) -> None:
    without, strong = make(tmp_path / "without"), make(tmp_path / "strong", router_z_coef=10.0)
    for trainer in (without, strong):
        trainer.train()
    assert z_loss(strong) < 0.5 * z_loss(without)


def router_gradients(folder: Path, steps: int, **options: float) -> dict[str, torch.Tensor]:
    """Of one optimiser step over the same 16 rows, as the optimiser gets them."""
    model = get_peft_model(tiny_llama(), config(**options))
    arguments = COMMON | {"max_steps": 1, "per_device_train_batch_size": 16 // steps, "max_grad_norm": 0.0}
    seen: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if "hydralora_router" in n})

    Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), gradient_accumulation_steps=steps, **arguments),
        train_dataset=counting().select(range(16)),
        data_collator=default_data_collator,
        callbacks=[RouterLossCallback(), Look()],
    ).train()
    return seen


def test_router_losses_weigh_the_same_under_accumulation(tmp_path: Path) -> None:
    at_once, in_four = (router_gradients(tmp_path, steps, router_z_coef=0.1) for steps in (1, 4))
    assert len(at_once) == 2 * 7
    for name, expected in at_once.items():
        torch.testing.assert_close(in_four[name], expected, msg=name)
        assert expected.abs().max() > 0, "every B is zero at first: this is the losses' own"


def test_router_losses_under_loss_scaling_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(router_z_coef=0.1))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    arguments.fp16 = True
    state, control = TrainerState(), TrainerControl()
    with pytest.raises(ValueError, match="router losses: got fp16=True"):
        RouterLossCallback().on_train_begin(arguments, state, control, model=model)
    RouterLossCallback().on_train_begin(arguments, state, control, model=get_peft_model(tiny_llama(), config()))
