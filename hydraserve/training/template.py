"""From a conversation to token ids and labels.

Three templates:

    chat    the tokenizer's own chat template, what /v1/chat/completions applies
    alpaca  the prompt of Stanford Alpaca; for base models
    plain   the user's text, a line break, the answer, end of text; the shortest, for /v1/completions

Each piece between the borders of prompt and answer is tokenized on its own, so a prompt has the same ids in
training as it will have when it is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hydraserve.errors import ConfigError
from hydraserve.training.data import Example, Turn

TEMPLATES = ("chat", "alpaca", "plain")
IGNORE = -100  # label of a token that is not trained on, as in torch and transformers

_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example, ready for the model. labels: the ids themselves in the answers, IGNORE elsewhere."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Number of tokens that are trained on."""
        return sum(label != IGNORE for label in self.labels)


class Template:
    """Renders examples for one tokenizer. Raises ConfigError when the tokenizer cannot do what the template needs."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        if name not in TEMPLATES:
            raise ConfigError("template", got=name, expected="one of " + ", ".join(TEMPLATES))
        if name == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "template chat", got="a tokenizer without a chat template", expected="one with", fix="--template alpaca"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError("tokenizer", got="no end-of-text token", expected="one: answers must end")
        self.name, self.tokenizer = name, tokenizer

    def tokens(self, example: Example, max_length: int) -> Tokens:
        """Ids and labels, cut at `max_length`. Prompts carry no labels, every answer does."""
        ids: list[int] = []
        labels: list[int] = []
        for text, trained in self.pieces(example.turns):
            # The tokenizer's own start of text, if it has one, comes once, in front: as it does in serving.
            piece = self.tokenizer(text, add_special_tokens=not ids)["input_ids"] if text else []
            if trained and self.name != "chat":
                piece = [*piece, self.tokenizer.eos_token_id]
            ids += piece
            labels += piece if trained else [IGNORE] * len(piece)
        return Tokens(ids[:max_length], labels[:max_length])

    def pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """[(text, trained)]: prompt and answer in turn."""
        if self.name == "chat":
            return self._chat(turns)
        if self.name == "plain":
            return [_plain(turn) for turn in turns]
        return [_alpaca(turn, first=i == 0) for i, turn in enumerate(turns)]

    def _chat(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in turns]
        pieces: list[tuple[str, bool]] = []
        done = ""
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(messages[:i], add_generation_prompt=True)
            whole = self._render(messages[: i + 1], add_generation_prompt=False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise ConfigError(
                    "template chat",
                    got="a chat template that rewrites earlier messages",
                    expected="one that only appends",
                    fix="--template alpaca, or data with one answer an example",
                )
            pieces += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return pieces

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return str(text).removeprefix(self.tokenizer.bos_token or "") if self._adds_bos() else str(text)

    def _adds_bos(self) -> bool:
        """Whether tokenizing adds a start of text, which the chat template must then not write a second time."""
        return bool(self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id])


def _plain(turn: Turn) -> tuple[str, bool]:
    if turn.role == "assistant":
        return turn.content, True
    return turn.content + "\n", False


def _alpaca(turn: Turn, *, first: bool) -> tuple[str, bool]:
    if turn.role == "assistant":
        return turn.content, True
    if turn.role == "system":
        return turn.content + "\n\n", False
    start = f"{_ALPACA}\n\n" if first else ""
    return f"{start}### Instruction:\n{turn.content}\n\n### Response:\n", False
