"""`hydraserve models`: the short names of well-known base models."""

from __future__ import annotations

import argparse

HELP = "list the short names of well-known base models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(_: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from hydraserve.models import BASE_MODELS
    from hydraserve.models.names import DEMO

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("Hub id", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_row(DEMO, "embedded: SmolLM2-135M-Instruct", "135M")
    for model in BASE_MODELS:
        table.add_row(model.name, model.hub_id, parameters(model.billions))
    Console().print(table)
    print("Any other Hub id (owner/name) and any local folder work as they are.")
    return 0


def parameters(billions: float) -> str:
    """As model names write it: 135M, 6.7B, 70.6B."""
    return f"{billions * 1000:.0f}M" if billions < 1 else f"{billions:.1f}B"
