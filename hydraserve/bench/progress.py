"""The progress bar of a measurement, on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hydraserve.bench import runner

# Redraws per second: the bar is drawn by the process that measures, on the cores that serve.
_REFRESH = 1


class BarProgress(runner.Progress):
    """One bar over the measured runs, with what happens now and how many requests were answered. A context manager."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("runs, {task.fields[requests]} requests"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=_REFRESH,
        )
        self._requests = 0
        self._task = self._bar.add_task("preparing", total=None, requests=0)

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, runs: int) -> None:
        self._bar.update(self._task, total=runs)

    def note(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def request_done(self) -> None:
        self._requests += 1
        self._bar.update(self._task, requests=self._requests)

    def run_done(self) -> None:
        self._bar.advance(self._task)
