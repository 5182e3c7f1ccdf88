"""Batches: examples padded to one length, or packed several to a row.

In a packed row, `position_ids` start again at each example. For most models transformers reads the borders from them
and keeps examples from attending to one another; for others (Falcon, OPT, Mamba, ...) it does not, and nothing says
so: `keeps_examples_apart` finds out.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from hydraserve.training.template import IGNORE, Tokens

# Of the logits' size. The same example behind different ones of the same length: without a leak the very same numbers,
# with a leak, in pretrained models, tenths. In between lies what rounding may do in a mixture of experts.
LARGEST_LEAK = 0.02
SHORT = 32  # tokens: enough for any leak, which is largest right behind the border
MAX_OPEN_ROWS = 64  # rows that still take examples; more would fill no better and cost time quadratic in the data


class Rows(Dataset[list[Tokens]]):
    """Rows of one or several examples, for transformers' Trainer."""

    def __init__(self, rows: Sequence[list[Tokens]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Tokens]:
        return self.rows[index]


def pack(examples: Sequence[Tokens], length: int, seed: int) -> list[list[Tokens]]:
    """Rows of at most `length` tokens, filled first-fit from the examples in random order.

    Every example is in exactly one row; none is cut. Random, and not longest first, which would fill a little
    better: a row of equally long examples tends to hold one kind of task only, and every step one kind of row.
    """
    order = list(examples)
    random.Random(seed).shuffle(order)
    rows: list[list[Tokens]] = []
    open_rows: list[tuple[int, list[Tokens]]] = []  # (free tokens, row), oldest first
    for example in order:
        size = len(example.ids)
        fits = next((i for i, (free, _) in enumerate(open_rows) if size <= free), None)
        if fits is None:
            rows.append([])
            open_rows = [*open_rows[1 - MAX_OPEN_ROWS :], (length, rows[-1])]
            fits = len(open_rows) - 1
        free, row = open_rows[fits]
        row.append(example)
        open_rows[fits] = (free - size, row)
    return rows


def keeps_examples_apart(model: nn.Module, examples: Sequence[Tokens]) -> bool:
    """Whether, in a packed row, the second of two examples is computed without a look at the first."""
    first, second = (example.ids[:SHORT] for example in examples)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    other = [(i + 1) % embeddings.num_embeddings for i in first]
    training = model.training
    model.eval()
    logits = []
    for before in (first, other):
        batch = PackedCollator()([[Tokens(ids, ids) for ids in (before, second)]])
        del batch["labels"]
        with torch.no_grad():
            output = model(**{name: t.to(embeddings.weight.device) for name, t in batch.items()})
        logits.append(output.logits[0, len(first) :].float())
    model.train(training)
    one, two = logits
    size = (one - one.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((one - two).norm(dim=-1) <= LARGEST_LEAK * size).all())


Batch = dict[str, torch.Tensor]


class PackedCollator:
    """Rows of a batch one after another: input_ids, position_ids, labels, all [1, tokens].

    short_logits: see `shorten_logits`.
    """

    def __init__(self, *, short_logits: bool = False) -> None:
        self.short_logits = short_logits

    def __call__(self, rows: Sequence[list[Tokens]]) -> Batch:
        examples = [example for row in rows for example in row]
        columns = {
            "input_ids": [i for e in examples for i in e.ids],
            "position_ids": [i for e in examples for i in range(len(e.ids))],
            "labels": [i for e in examples for i in e.labels],
        }
        batch = {name: torch.tensor([values]) for name, values in columns.items()}
        return shorten_logits(batch) if self.short_logits else batch


class PaddedCollator:
    """One example a row, padded on the right: input_ids, attention_mask, labels, all [batch, longest].

    short_logits: see `shorten_logits`.
    """

    def __init__(self, pad_id: int, *, short_logits: bool = False) -> None:
        self.pad_id, self.short_logits = pad_id, short_logits

    def __call__(self, rows: Sequence[list[Tokens]]) -> Batch:
        examples = [example for row in rows for example in row]
        longest = max(len(e.ids) for e in examples)

        def padded(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (longest - len(values))

        batch = {
            "input_ids": torch.tensor([padded(e.ids, self.pad_id) for e in examples]),
            "attention_mask": torch.tensor([padded([1] * len(e.ids), 0) for e in examples]),
            "labels": torch.tensor([padded(e.labels, IGNORE) for e in examples]),
        }
        return shorten_logits(batch) if self.short_logits else batch


def shorten_logits(batch: Batch) -> Batch:
    """The batch with what transformers' causal models need to compute logits only where there is something to learn.

    Prompts are most of the tokens, and the output layer is a fifth of the work for a small model. Adds
    `logits_to_keep` [K], the positions of which the next token is trained on in any row, and `shift_labels`
    [batch, K], those next tokens.
    """
    labels = batch["labels"]
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], dim=1)
    keep = (following != IGNORE).any(dim=0).nonzero().squeeze(1)
    return batch | {"logits_to_keep": keep, "shift_labels": following[:, keep]}


def accepts_short_logits(model: nn.Module) -> bool:
    """Whether this model, without adapters, computes its loss from `shorten_logits`' additions."""
    forward = inspect.signature(model.forward).parameters
    loss = getattr(model, "loss_function", None)
    return "logits_to_keep" in forward and loss is not None and "shift_labels" in inspect.signature(loss).parameters
