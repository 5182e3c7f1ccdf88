"""From a conversation to token ids and labels.

Three templates:

    chat    the tokenizer's own chat template, what /v1/chat/completions applies
    alpaca  the prompt of Stanford Alpaca; for base models
    plain   the user's text, a line break, the answer, end of text; the shortest, for /v1/completions

A server tokenizes a whole prompt, the conversation so far, at once. Here the text up to each border is therefore
tokenized from its beginning, and what is new is the piece's tokens: prompts have the ids that they have when they are
served, and answers those that a model goes on with.
"""

from __future__ import annotations

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
        end = tokenizer(str(tokenizer.eos_token), add_special_tokens=False)["input_ids"]
        if end[-1:] != [tokenizer.eos_token_id]:
            raise ConfigError(
                "tokenizer", got="an end of text that it does not read as one token", expected="one that is"
            )
        self.name, self.tokenizer = name, tokenizer

    def tokens(self, example: Example, max_length: int) -> Tokens:
        """Ids and labels, cut at `max_length`. Prompts carry no labels, every answer does."""
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for text, trained in self._pieces(example):
            piece = self._following(ids, done, text)
            done += text
            ids += piece
            labels += piece if trained else [IGNORE] * len(piece)
        return Tokens(ids[:max_length], labels[:max_length])

    def _following(self, ids: list[int], done: str, text: str) -> list[int]:
        """The tokens of `text` after the text `done`, whose tokens are `ids`."""
        # The chat template writes the start of text, if there is one; for plain text the server leaves that to the
        # tokenizer.
        whole: list[int] = self.tokenizer(done + text, add_special_tokens=self.name != "chat")["input_ids"]
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        # A token reaches over the border ("\n" and "\n" become one), but a prompt's tokens are there before its answer.
        alone: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return alone

    def _pieces(self, example: Example) -> list[tuple[str, bool]]:
        """[(text, trained)]: prompt and answer in turn. Raises ConfigError, naming the example."""
        if self.name == "chat":
            return self._chat(example)
        pieces: list[tuple[str, bool]] = []
        prompt = ""
        for i, turn in enumerate(example.turns):
            if turn.role == "assistant":
                pieces += [(prompt, False), (turn.content + str(self.tokenizer.eos_token), True)]
                prompt = ""
            else:
                prompt += f"{turn.content}\n" if self.name == "plain" else _alpaca(turn, first=i == 0)
        return pieces

    def _chat(self, example: Example) -> list[tuple[str, bool]]:
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        pieces: list[tuple[str, bool]] = []
        done = ""
        for i, turn in enumerate(example.turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(messages[:i], example, add_generation_prompt=True)
            whole = self._render(messages[: i + 1], example, add_generation_prompt=False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise ConfigError(
                    "template chat",
                    got="a chat template that rewrites earlier messages",
                    expected="one that only appends",
                    fix="--template alpaca, or data with one answer an example",
                    where=example.source,
                )
            pieces += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return pieces

    def _render(self, messages: list[dict[str, Any]], example: Example, *, add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as e:  # a template is the model authors' program: it raises what they please
            raise ConfigError(
                "template chat",
                got=f"{type(e).__name__}: {e}",
                expected="a chat template that takes this conversation",
                fix="--template alpaca, or other data: some templates take no system message",
                where=example.source,
            ) from e


def _alpaca(turn: Turn, *, first: bool) -> str:
    """first: whether the conversation begins with this turn."""
    if turn.role == "system":
        return f"{turn.content}\n\n"
    start = f"{_ALPACA}\n\n" if first else ""
    return f"{start}### Instruction:\n{turn.content}\n\n### Response:\n"
