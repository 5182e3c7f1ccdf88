"""What one sees of a running training: a bar with loss and learning rate, or lines in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressLog(TrainerCallback):
    """A progress bar on a terminal; everywhere, one line for each log entry: step, loss, learning rate, speed.

    Used as a context around the training, whose end, good or bad, takes the bar away and gives the cursor back.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._start, self._first_step = 0.0, 0

    def __enter__(self) -> ProgressLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._first_step = time.monotonic(), state.global_step
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("training"), *columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = dict(logs or {})
        if not {"loss", "eval_loss"} & logs.keys():
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        names = (("loss", "loss"), ("eval_loss", "eval loss"), ("learning_rate", "lr"), ("grad_norm", "grad norm"))
        parts += [f"{label} {float(logs[name]):.4g}" for name, label in names if name in logs]
        done = state.global_step - self._first_step
        if done and "loss" in logs:
            parts.append(f"{(time.monotonic() - self._start) / done:.2f} s/step")
        self.console.print("  ".join(parts), highlight=False)
