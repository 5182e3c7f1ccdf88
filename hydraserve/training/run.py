"""One training run: from settings to an adapter that the server loads.

OUTPUT/
  adapter_config.json  adapter_model.safetensors   the adapter
  training.json                                    settings, data, losses, time
  heads.png                                        with `heads="auto"`: the curve whose elbow was taken
  checkpoints/checkpoint-N/                        what --resume goes on from
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
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hydraserve.errors import ConfigError, ModelNotFoundError
from hydraserve.models import resolve_model
from hydraserve.training.batches import PackedCollator, PaddedCollator, Rows, accepts_short_logits, pack
from hydraserve.training.data import DataError, Example, load_examples, split
from hydraserve.training.heads import choose_heads, plot
from hydraserve.training.progress import ProgressLog
from hydraserve.training.report import print_heads
from hydraserve.training.settings import TrainSettings
from hydraserve.training.template import Template, Tokens
from hydraserve.tuner import HydraLoraConfig, RouterLossCallback

WEIGHTS_FILE = "adapter_model.safetensors"


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
    checkpoint = _checkpoint(settings)
    examples = load_examples(settings.data)
    settings = _settle_heads(settings, examples, console)
    torch.manual_seed(settings.seed)
    tokenizer, base = _load_base(settings)
    data = _tokenize(settings, examples, tokenizer)
    short_logits = accepts_short_logits(base)
    model = get_peft_model(base, _peft_config(settings))
    progress = ProgressLog(console)
    trainer = _trainer(settings, model, tokenizer, data, progress, short_logits)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    eval_loss = _last_eval_loss(trainer) if data.evaluation else None
    _save(settings, model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    summary = TrainSummary(
        output=settings.output,
        method=settings.method,
        heads=1 if settings.method == "lora" else int(settings.heads),
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        adapter_bytes=(settings.output / WEIGHTS_FILE).stat().st_size,
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


def _checkpoint(settings: TrainSettings) -> str | None:
    """The checkpoint to go on from. Raises ConfigError where --resume and what is in the folder disagree."""
    # The trainer's state is the last file that a checkpoint gets: one without it was interrupted.
    complete = [path.parent for path in settings.checkpoints.glob("checkpoint-*/trainer_state.json")]
    found = str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
    if settings.resume and found is None:
        raise ConfigError(
            "--resume",
            got=f"no checkpoint in {settings.checkpoints}",
            expected="one",
            fix="start without --resume; --save-every N writes checkpoints",
        )
    if not settings.resume and found is not None:
        raise ConfigError(
            "--output",
            got=f"{settings.output}, which holds checkpoints of an earlier run",
            expected="a new folder",
            fix="--resume to go on with that run, or name another folder",
        )
    return found


def _settle_heads(settings: TrainSettings, examples: list[Example], console: Console) -> TrainSettings:
    if settings.method == "lora" or settings.heads != "auto":
        return settings
    choice = choose_heads(examples, seed=settings.seed)
    print_heads(choice, console)
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
    whole, cut, parts = 2**31, 0, []
    for part in split(examples, settings.eval_share, settings.seed):
        tokens = [template.tokens(example, whole) for example in part]
        cut += sum(len(t.ids) > settings.max_length for t in tokens)
        short = [Tokens(t.ids[: settings.max_length], t.labels[: settings.max_length]) for t in tokens]
        parts.append([t for t in short if t.trained])
    if not parts[0]:
        raise DataError(
            "training data",
            got=f"no example with an answer within {settings.max_length} tokens",
            expected="at least one",
            fix="raise --max-length",
        )
    return _Data(parts[0], parts[1], cut, len(examples) - len(parts[0]) - len(parts[1]))


def _peft_config(settings: TrainSettings) -> PeftConfig:
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": list(settings.target_modules) or "all-linear",
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
    return TrainingArguments(
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


def _last_eval_loss(trainer: Trainer) -> float:
    """Of the finished adapter: measured now, unless the last step was followed by an evaluation."""
    last = trainer.state.log_history[-1] if trainer.state.log_history else {}
    measured = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e and e["step"] == last["step"]]
    return float(measured[-1] if measured else trainer.evaluate()["eval_loss"])


def _save(settings: TrainSettings, model: PeftModel) -> None:
    """The adapter in `save_dtype`, under the base model's public name."""
    model.peft_config["default"].base_model_name_or_path = settings.base_name or settings.model
    model.save_pretrained(str(settings.output), save_embedding_layers=False)  # "auto" asks the hub about the base
    (settings.output / "README.md").unlink(missing_ok=True)  # PEFT's model card: a form to fill in
    path = settings.output / WEIGHTS_FILE
    dtype = getattr(torch, settings.save_dtype)
    save_file({key: t.to(dtype).contiguous() for key, t in load_file(path).items()}, path, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; the server often runs as another user.
    path.chmod((settings.output / "adapter_config.json").stat().st_mode)


def _write_record(settings: TrainSettings, summary: TrainSummary, history: list[dict[str, float]]) -> None:
    record = {"settings": asdict(settings), "summary": asdict(summary), "history": history}
    text = json.dumps(record, indent=2, default=str)
    (settings.output / "training.json").write_text(text + "\n", encoding="utf-8")
