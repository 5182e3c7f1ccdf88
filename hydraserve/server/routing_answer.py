"""From a trace of routing weights to the answer of POST /v1/routing: summaries, and JSON, npz or safetensors."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors

from hydraserve.adapters.observation import RoutingTrace
from hydraserve.errors import InvalidRequestError
from hydraserve.server.routing_schemas import RoutingFormat

# Numbers in a JSON answer: some megabytes, which take some tens of milliseconds to write.
MAX_JSON_NUMBERS = 400_000
# Bytes of weights in a binary answer.
MAX_BINARY_BYTES = 256 * 2**20

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_DIGITS = 6  # of weights in JSON: a sixth digit is below what float32 sums are good for


@dataclass(frozen=True)
class Generated:
    """What the model was given and made of it. texts: of each token, so that all together are the whole text."""

    prompt_ids: list[int]
    token_ids: list[int]
    texts: list[str]
    finish_reason: str

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


def layer_of(router: str) -> int:
    """The layer number in a path: 3 of "model.layers.3.mlp.up_proj"; -1 where there is none."""
    match = _LAYER.search(router)
    return int(match[1]) if match else -1


def module_of(router: str) -> str:
    """The last component of a path."""
    return router.rpartition(".")[2]


def select(trace: RoutingTrace, modules: Sequence[str] | None, layers: Sequence[int] | None) -> RoutingTrace:
    """Only the routers asked for. Raises InvalidRequestError as `choose`."""
    keep = choose(trace.routers, modules, layers)
    heads = tuple(trace.heads[i] for i in keep)
    return RoutingTrace(tuple(trace.routers[i] for i in keep), heads, trace.weights[:, keep, : max(heads)])


def choose(routers: Sequence[str], modules: Sequence[str] | None, layers: Sequence[int] | None) -> list[int]:
    """Which of the routers are asked for. Raises InvalidRequestError for names or numbers that no router has."""
    _refuse_unknown("modules", modules, {module_of(name) for name in routers})
    _refuse_unknown("layers", layers, {layer_of(name) for name in routers})
    keep = [
        i
        for i, name in enumerate(routers)
        if (modules is None or module_of(name) in modules) and (layers is None or layer_of(name) in layers)
    ]
    if not keep:
        raise InvalidRequestError("modules and layers", got="no router that is in both", expected="at least one router")
    return keep


def check_size(form: RoutingFormat, tokens: int, heads: Sequence[int]) -> None:
    """Raises InvalidRequestError when the weights of so many tokens are too large an answer. heads: of each router."""
    numbers, nbytes = tokens * sum(heads), tokens * len(heads) * max(heads) * np.dtype(np.float32).itemsize
    if form is RoutingFormat.JSON and numbers > MAX_JSON_NUMBERS:
        raise InvalidRequestError(
            "format",
            got=f"json, for {numbers:,} routing weights",
            expected=f"at most {MAX_JSON_NUMBERS:,}",
            fix="ask for npz or safetensors, or for fewer tokens, modules or layers",
        )
    if nbytes > MAX_BINARY_BYTES:
        raise InvalidRequestError(
            "answer",
            got=f"{nbytes:,} bytes of routing weights",
            expected=f"at most {MAX_BINARY_BYTES:,}",
            fix="ask for fewer tokens, modules or layers",
        )


def _refuse_unknown(what: str, asked: Sequence[Any] | None, known: set[Any]) -> None:
    unknown = [value for value in asked or () if value not in known]
    if unknown:
        shown = ", ".join(str(value) for value in sorted(known))
        raise InvalidRequestError(what, got=repr(unknown[0]), expected=f"of this adapter's routers: {shown}")


def token_texts(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character that several tokens make up is given to the last of them."""
    texts: list[str] = []
    start = shown = 0  # ids[start:shown] is the context that decoders need for the next token
    for end in range(1, len(ids) + 1):
        before, after = decode(list(ids[start:shown])), decode(list(ids[start:end]))
        if after.endswith("\ufffd") and not _stays(decode, ids[start:], end - start, after):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        start, shown = shown, end
    return texts


def _stays(decode: Callable[[list[int]], str], ids: Sequence[int], end: int, text: str) -> bool:
    """Whether `text` of ids[:end] stays, whatever follows: it may end in a part of a character, whose sign later
    tokens replace, or in that very sign. A character has four bytes at most."""
    return all(decode(list(ids[:more])).startswith(text) for more in range(end + 1, min(end + 3, len(ids)) + 1))


class RoutingAnswer:
    """The parts of an answer. trace: of the routers asked for; its last token may be one that no layer has seen."""

    def __init__(self, model: str, request_id: str, generated: Generated, trace: RoutingTrace) -> None:
        self._model, self._id, self._generated, self._trace = model, request_id, generated, trace
        weights = np.full((generated.tokens, *trace.weights.shape[1:]), np.nan, dtype=np.float32)
        count = min(generated.tokens, len(trace.weights))
        weights[:count] = trace.weights[:count]
        self.weights: npt.NDArray[np.float32] = weights
        self._seen: npt.NDArray[np.bool_] = np.logical_not(np.isnan(weights).all(axis=(1, 2)))
        self._entropy = self._entropies()  # [tokens, routers]

    def _entropies(self) -> npt.NDArray[np.float32]:
        w = np.nan_to_num(self.weights)
        nats = -(w * np.log(np.where(w > 0, w, 1.0))).sum(axis=2)
        entropies: npt.NDArray[np.float32] = (nats / np.log(np.maximum(self._trace.heads, 2))).astype(np.float32)
        return entropies

    def summary(self) -> dict[str, Any]:
        """Everything but the weights of single routers."""
        trace, generated = self._trace, self._generated
        return {
            "object": "routing",
            "id": self._id,
            "model": self._model,
            "prompt_tokens": len(generated.prompt_ids),
            "finish_reason": generated.finish_reason,
            "text": "".join(generated.texts[len(generated.prompt_ids) :]),
            "heads": max(trace.heads),
            "routers": [
                {"name": name, "layer": layer_of(name), "module": module_of(name), "heads": heads}
                for name, heads in zip(trace.routers, trace.heads, strict=True)
            ],
            "usage": self._usage(),
            "tokens": [self._token(i) for i in range(generated.tokens)],
        }

    def _usage(self) -> dict[str, Any]:
        """Over the seen tokens and the routers: mean weight of each head, share of tokens it leads, mean entropy."""
        w = self.weights[self._seen]
        leads = np.bincount(self._leading()[self._seen], minlength=w.shape[2]) / max(1, len(w))
        return {
            "weights": _rounded(np.nan_to_num(w).sum(axis=(0, 1)) / max(1, w.shape[0] * w.shape[1])),
            "leads": _rounded(leads),
            "entropy": round(float(self._entropy[self._seen].mean()), _DIGITS),
        }

    def _leading(self) -> npt.NDArray[np.int64]:
        """[tokens] the head with most weight over all routers."""
        heads: npt.NDArray[np.int64] = np.nan_to_num(self.weights).sum(axis=1).argmax(axis=1)
        return heads

    def _token(self, index: int) -> dict[str, Any]:
        generated, seen = self._generated, bool(self._seen[index])
        in_prompt = index < len(generated.prompt_ids)
        ids = generated.prompt_ids if in_prompt else generated.token_ids
        return {
            "id": ids[index if in_prompt else index - len(generated.prompt_ids)],
            "text": generated.texts[index],
            "kind": "prompt" if in_prompt else "generated",
            "head": int(np.nan_to_num(self.weights[index]).sum(axis=0).argmax()) if seen else None,
            "entropy": round(float(self._entropy[index].mean()), _DIGITS) if seen else None,
        }

    def _token_weights(self, index: int) -> list[list[float]] | None:
        """[routers][heads of each]."""
        if not self._seen[index]:
            return None
        return [_rounded(w[:heads]) for w, heads in zip(self.weights[index], self._trace.heads, strict=True)]

    async def json(self) -> AsyncIterator[bytes]:
        """The JSON document in pieces, so that writing a large one holds up nobody else for long."""
        head = self.summary()
        tokens = head.pop("tokens")
        yield json.dumps(head)[:-1].encode() + b', "tokens": ['
        for i, token in enumerate(tokens):
            token["weights"] = self._token_weights(i)
            yield (b"," if i else b"") + json.dumps(token, separators=(",", ":")).encode()
            await asyncio.sleep(0)
        yield b"]}"

    def npz(self) -> bytes:
        """Arrays weights [tokens, routers, heads], routers, heads, token_ids, prompt_tokens; summary as JSON text."""
        buffer = io.BytesIO()
        texts = {"routers": np.array(self._trace.routers), "summary": np.array(json.dumps(self.summary()))}
        np.savez_compressed(buffer, allow_pickle=False, **self._arrays(), **texts)
        return buffer.getvalue()

    def safetensors(self) -> bytes:
        """The same arrays; the summary in the metadata, under "routing"."""
        return save_safetensors(self._arrays(), metadata={"routing": json.dumps(self.summary())})

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "weights": self.weights,
            "heads": np.array(self._trace.heads, dtype=np.int64),
            "token_ids": np.array(self._generated.prompt_ids + self._generated.token_ids, dtype=np.int64),
            "prompt_tokens": np.array([len(self._generated.prompt_ids)], dtype=np.int64),
        }


def _rounded(values: npt.NDArray[Any]) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
