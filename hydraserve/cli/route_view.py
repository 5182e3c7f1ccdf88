"""Routing weights for people: coloured tokens in the terminal, and a heat map as PNG."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.numpy import load

from hydraserve.errors import ConfigError, RequestError

# Okabe and Ito's colours, which people with any colour vision tell apart; the inspector page has the same.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a900", "#8c6bb1")
# Of a colour's full strength: a token whose heads are all alike, so that its leading head can still be seen.
FAINTEST = 0.2
# Tokens whose texts can be read below a picture of bearable width.
MOST_LABELS = 150
# C0 and C1 but for tab and line feed, and what deletes.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, eq=False)
class Routing:
    """One answer of POST /v1/routing.

    summary: its JSON part.
    weights: [tokens, routers, heads] float32, NaN where nothing was seen.
    """

    summary: dict[str, Any]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, data: bytes) -> Routing:
        """From the answer as safetensors. Raises RequestError when it is something else."""
        size = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + size])
            return cls(json.loads(header["__metadata__"]["routing"]), load(data)["weights"])
        except (ValueError, KeyError, TypeError, SafetensorError) as e:
            raise RequestError(
                "answer",
                got=f"{len(data):,} bytes that are no routing weights ({e})",
                expected="safetensors",
                fix="give the --url of a hydraserve server",
            ) from e

    @property
    def heads(self) -> int:
        return int(self.summary["heads"])

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """[tokens, heads]: what each head does of the routers' work; NaN for tokens that none has seen."""
        seen = np.array([token["head"] is not None for token in self.summary["tokens"]])
        shares: npt.NDArray[np.float64] = np.nan_to_num(self.weights).mean(axis=1, dtype=np.float64)
        shares[~seen] = np.nan
        return shares

    def by_layer(self) -> tuple[list[int], npt.NDArray[np.float64]]:
        """(layer numbers, [heads, layers, tokens]): the mean over the routers of a layer."""
        numbers = [router["layer"] for router in self.summary["routers"]]
        layers = sorted(set(numbers))
        unseen: npt.NDArray[np.bool_] = np.isnan(self.weights).all(axis=2, keepdims=True)  # type: ignore[assignment]
        weights = np.where(unseen, np.nan, np.nan_to_num(self.weights))
        means = [weights[:, [n == layer for n in numbers]].mean(axis=1) for layer in layers]
        return layers, np.stack(means).transpose(2, 0, 1)


def show(routing: Routing, console: Console | None = None) -> None:
    """Print the text with each token in the colour of its leading head; where there are no colours, a table."""
    console = console or Console()
    summary = routing.summary
    generated = len(summary["tokens"]) - summary["prompt_tokens"]
    console.print(
        f"{summary['model']}: {summary['prompt_tokens']} prompt tokens (underlined), {generated} generated, "
        f"{len(summary['routers'])} routers, entropy {summary['usage']['entropy']:.2f} of 1",
        highlight=False,
    )
    console.print(_legend(routing))
    console.print(_coloured(routing) if console.color_system else _table(routing))


def _legend(routing: Routing) -> Text:
    text = Text()
    for head, share in enumerate(np.nanmean(routing.shares, axis=0)):
        text.append(f" head {head} ", style=f"#000000 on {tint(head, 1.0)}").append(f" {share:.0%}   ")
    return text


def printable(text: str) -> str:
    """Text of a token, of which a terminal obeys nothing but line breaks and tabs: a model may write anything."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _coloured(routing: Routing) -> Text:
    shares, text = routing.shares, Text()
    equal = 1 / routing.heads
    furthest = max(1e-6, float(np.nanmax(shares)) - equal)
    for token, share in zip(routing.summary["tokens"], shares, strict=True):
        underline = "underline " if token["kind"] == "prompt" else ""
        if np.isnan(share).any():
            text.append(printable(token["text"]), style=underline.strip())
            continue
        head = int(share.argmax())
        strength = FAINTEST + (1 - FAINTEST) * (float(share[head]) - equal) / furthest
        text.append(printable(token["text"]), style=f"{underline}#000000 on {tint(head, strength)}")
    return text


def _table(routing: Routing) -> Table:
    table = Table()
    for column in ("token", "text", "head", "weight", "entropy"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for i, (token, share) in enumerate(zip(routing.summary["tokens"], routing.shares, strict=True)):
        cells = ("-", "-", "-")
        if not np.isnan(share).any():
            cells = (str(share.argmax()), f"{share.max():.3f}", f"{token['entropy']:.2f}")
        table.add_row(f"{i}{'*' if token['kind'] == 'generated' else ' '}", Text(repr(token["text"])[1:-1]), *cells)
    table.caption = "* generated; the last one was seen by no layer"
    return table


def tint(head: int, strength: float) -> str:
    """The colour of a head, mixed with white: black text can be read on all of them."""
    colour = PALETTE[head % len(PALETTE)]
    full = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    # Black on the darkest of the palette at full strength would be hard to read.
    return "#" + "".join(f"{round(255 + (part - 255) * 0.8 * strength):02x}" for part in full)


def draw(routing: Routing, path: Path) -> None:
    """Write a PNG: for each head its weight, layer by layer and token by token.

    Raises ConfigError when matplotlib is missing or the file cannot be written.
    """
    figure = _figure(routing, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a token of another script: an empty box
            figure.savefig(path, dpi=130)
    except (OSError, ValueError) as e:
        raise ConfigError("--output", got=f"{path}: {e}", expected="a PNG that can be written") from e


def _figure(routing: Routing, path: Path) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(
            what=f"--output {path}", got="no matplotlib", expected="matplotlib", fix="pip install matplotlib"
        ) from e
    layers, weights = routing.by_layer()
    heads, _, tokens = weights.shape
    width = min(40.0, max(6.5, 2 + 0.17 * tokens))
    height = 1.6 + heads * max(1.1, 0.055 * len(layers))
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(heads, 1, sharex=True, squeeze=False)[:, 0]
    images = []
    for head, axes in enumerate(panels):
        images.append(
            axes.imshow(weights[head], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        )
        axes.set_ylabel(f"head {head}\nlayer")
        step = max(1, math.ceil(len(layers) / 5))
        axes.set_yticks(range(0, len(layers), step), layers[::step])
        axes.axvline(routing.summary["prompt_tokens"] - 0.5, color="white", linewidth=1.5)
    _label_tokens(panels[-1], [token["text"] for token in routing.summary["tokens"]])
    figure.colorbar(images[0], ax=panels, label="routing weight", fraction=0.02, pad=0.01)
    modules = sorted({router["module"] for router in routing.summary["routers"]})
    what = modules[0] if len(modules) == 1 else f"mean of {len(modules)} modules"
    figure.suptitle(f"{routing.summary['model']}: {what}; the answer begins at the white line")
    return figure


def _label_tokens(axes: Any, texts: list[str]) -> None:
    if len(texts) > MOST_LABELS:
        axes.set_xlabel("token")
        return
    # "$" would begin a formula.
    labels = [text.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$") for text in texts]
    axes.set_xticks(range(len(texts)), labels, rotation=90, fontsize=7, family="monospace")
