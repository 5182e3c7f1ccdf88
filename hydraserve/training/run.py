"""One training run: from settings to an adapter that the server loads.

OUTPUT/
  adapter_config.json  adapter_model.safetensors   the adapter
  training.json                                    settings, data, losses, time
  heads.png                                        with `heads="auto"`: the curve whose elbow was taken
  checkpoints/checkpoint-N/                        what --resume goes on from
  checkpoints/run.json                             the settings and a digest of the data, which it must have too
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hydraserve.adapters.locate import SAFETENSORS_NAME
from hydraserve.errors import ConfigError, ModelNotFoundError
from hydraserve.models import hub_name, resolve_model
from hydraserve.training.batches import (
    PackedCollator,
    PaddedCollator,
    Rows,
    accepts_short_logits,
    keeps_examples_apart,
    pack,
)
from hydraserve.training.data import DataError, Example, load_examples, split
from hydraserve.training.heads import choose_heads, plot
from hydraserve.training.output import keep_record, open_output, save_adapter
from hydraserve.training.progress import ProgressLog
from hydraserve.training.report import print_heads
from hydraserve.training.settings import TrainSettings
from hydraserve.training.template import Template, Tokens
from hydraserve.tuner import HydraLoraConfig, RouterLossCallback
from hydraserve.tuner.model import is_linear


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a run did. Losses are means over a log interval (None: nothing was logged); `seconds` of this run only."""

    output: Path
    method: str
    heads: int
    trainable_parameters: int
    adapter_bytes: int
    examples: int
    eval_examples: int
    cut_examples: int
    dropped_examples: int
    trained_tokens: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    eval_loss: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Data:
    train: list[Tokens]
    evaluation: list[Tokens]
    cut: int
    dropped: int


def train(settings: TrainSettings, console: Console) -> TrainSummary:
    """Train an adapter and save it in `settings.output`.

    Raises ConfigError, DataError or ModelNotFoundError, before any training, for what cannot be used.
    """
    checkpoint = open_output(settings)
    examples = load_examples(settings.data)
    settings = _settle_heads(settings, examples, console)
    torch.manual_seed(settings.seed)
    tokenizer, base = _load_base(settings)
    data = _tokenize(settings, examples, tokenizer)
    short_logits = accepts_short_logits(base)
    _check_targets(settings, base)
    model = get_peft_model(base, _peft_config(settings))
    start = time.monotonic()
    with ProgressLog(console) as progress:
        trainer = _trainer(settings, model, tokenizer, data, progress, short_logits)
        _check_packing(settings, model, data)
        keep_record(settings, examples)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        eval_loss = _last_eval_loss(trainer) if data.evaluation else None
    save_adapter(settings, model, settings.base_name or hub_name(settings.model))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    summary = TrainSummary(
        output=settings.output,
        method=settings.method,
        heads=1 if settings.method == "lora" else int(settings.heads),
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        adapter_bytes=(settings.output / SAFETENSORS_NAME).stat().st_size,
        examples=len(data.train),
        eval_examples=len(data.evaluation),
        cut_examples=data.cut,
        dropped_examples=data.dropped,
        trained_tokens=sum(tokens.trained for tokens in data.train),
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        eval_loss=eval_loss,
        seconds=time.monotonic() - start,
    )
    _write_record(settings, summary, trainer.state.log_history)
    return summary


def _settle_heads(settings: TrainSettings, examples: list[Example], console: Console) -> TrainSettings:
    if settings.method == "lora" or settings.heads != "auto":
        return settings
    choice = choose_heads(examples, method=settings.heads_method, max_heads=settings.max_heads, seed=settings.seed)
    print_heads(choice, console)
    if choice.candidates:
        plot(choice, settings.output / "heads.png")
    return replace(settings, heads=choice.heads)


def _load_base(settings: TrainSettings) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    source = resolve_model(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, settings.dtype))
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(
            "--model",
            got=f"{settings.model}: {str(e).splitlines()[0]}",
            expected="a transformers model: name or folder",
        ) from e
    # Useless here, and with a cache transformers does not see the borders in packed rows.
    model.config.use_cache = False
    return tokenizer, model


def _tokenize(settings: TrainSettings, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> _Data:
    """Token ids of both parts of the split; examples of which nothing trainable is left after cutting are dropped."""
    name = settings.template if settings.template != "auto" else ("chat" if tokenizer.chat_template else "alpaca")
    template = Template(name, tokenizer)
    whole, cut = 2**31, 0
    kept: list[Tokens] = []
    for example in examples:
        tokens = template.tokens(example, whole)
        short = Tokens(tokens.ids[: settings.max_length], tokens.labels[: settings.max_length])
        if short.trained:
            kept.append(short)
            cut += len(tokens.ids) > settings.max_length
    if not kept:
        raise DataError(
            "training data",
            got=f"no example with an answer within {settings.max_length} tokens",
            expected="at least one",
            fix="raise --max-length",
        )
    train, evaluation = split(kept, settings.eval_share, settings.seed)
    return _Data(train, evaluation, cut, len(examples) - len(kept))


def _check_targets(settings: TrainSettings, base: PreTrainedModel) -> None:
    """Raises ConfigError for a name in target_modules that means no layer of the base, or not linear ones alone."""
    linear = {name.rpartition(".")[2] for name, module in base.named_modules() if is_linear(module)}
    for target in () if settings.all_linear else settings.target_modules:
        found = [m for name, m in base.named_modules() if name == target or name.endswith(f".{target}")]
        if not found or not all(map(is_linear, found)):
            kinds = ", ".join(sorted({type(module).__name__ for module in found}))
            raise ConfigError(
                "--target-modules",
                got=f"{target}, {f'a {kinds}' if kinds else 'which the base model does not have'}",
                expected=f"linear layers: {', '.join(sorted(linear))}",
            )


def _check_packing(settings: TrainSettings, model: PeftModel, data: _Data) -> None:
    """Raises ConfigError where packing would let examples see one another."""
    if settings.packing and len(data.train) > 1 and not keeps_examples_apart(model, data.train[:2]):
        raise ConfigError(
            "--packing",
            got=f"{type(model.get_base_model()).__name__}, which does not keep the examples of a row apart",
            expected="a model that restarts where position_ids do",
            fix="train it without --packing",
        )


def _peft_config(settings: TrainSettings) -> PeftConfig:
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": "all-linear" if settings.all_linear else list(settings.target_modules),
    }
    if settings.method == "lora":
        return LoraConfig(**common)
    return HydraLoraConfig(
        num_heads=int(settings.heads),
        load_balance_coef=settings.load_balance,
        router_z_coef=settings.router_z,
        **common,
    )


def _trainer(
    settings: TrainSettings,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: _Data,
    progress: ProgressLog,
    short_logits: bool,
) -> Trainer:
    collator: PackedCollator | PaddedCollator
    if settings.packing:
        collator = PackedCollator(short_logits=short_logits)
        rows, eval_rows = (pack(part, settings.max_length, settings.seed) for part in (data.train, data.evaluation))
    else:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        collator = PaddedCollator(pad_id, short_logits=short_logits)
        rows, eval_rows = ([[tokens] for tokens in part] for part in (data.train, data.evaluation))
    trainer = Trainer(
        model=model,
        args=_arguments(settings, bool(eval_rows)),
        train_dataset=Rows(rows),
        eval_dataset=Rows(eval_rows) if eval_rows else None,
        data_collator=collator,
        callbacks=[progress, RouterLossCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: TrainSettings, evaluates: bool) -> TrainingArguments:
    every = "steps" if settings.eval_every else "epoch"
    arguments = TrainingArguments(
        output_dir=str(settings.checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        weight_decay=settings.weight_decay,
        eval_strategy=every if evaluates else "no",
        eval_steps=settings.eval_every or None,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        logging_steps=settings.log_every,
        logging_first_step=True,
        gradient_checkpointing=settings.gradient_checkpointing,
        prediction_loss_only=True,
        remove_unused_columns=False,  # our collators make the batch
        disable_tqdm=True,  # ProgressLog shows it
        report_to="none",
        seed=settings.seed,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    # One process, one GPU. With more in sight, Trainer would wrap the model in nn.DataParallel, which cuts every
    # tensor of a batch along its first dimension: that of logits_to_keep is not the batch, nor is a packed row's.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _last_eval_loss(trainer: Trainer) -> float:
    """Of the finished adapter: measured now, unless the last step was followed by an evaluation."""
    last = trainer.state.log_history[-1] if trainer.state.log_history else {}
    measured = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e and e["step"] == last["step"]]
    return float(measured[-1] if measured else trainer.evaluate()["eval_loss"])


def _write_record(settings: TrainSettings, summary: TrainSummary, history: list[dict[str, float]]) -> None:
    record = {"settings": asdict(settings), "summary": asdict(summary), "history": history}
    text = json.dumps(record, indent=2, default=str)
    (settings.output / "training.json").write_text(text + "\n", encoding="utf-8")
