"""Short names of well-known bases, and what a person may write for one."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from hydraserve.errors import ModelNotFoundError
from hydraserve.models.demo import demo_model

DEMO = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class BaseModel:
    """A well-known base: what a person types, where it is on the Hugging Face Hub, parameters in billions."""

    name: str
    hub_id: str
    billions: float


_TUNED = ("", "-Instruct")
_QWEN25 = (("0.5", 0.494), ("1.5", 1.54), ("3", 3.09), ("7", 7.62), ("14", 14.8), ("32", 32.8), ("72", 72.7))
_QWEN3 = (("0.6", 0.596), ("1.7", 1.72), ("4", 4.02), ("8", 8.19), ("14", 14.8), ("32", 32.8))
_SMOLLM2 = (("135M", 0.135), ("360M", 0.362), ("1.7B", 1.71))
# name, Hub id, billions of parameters
_ROWS = [
    ("llama2-7b", "meta-llama/Llama-2-7b-hf", 6.74),
    ("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", 6.74),
    ("llama2-13b", "meta-llama/Llama-2-13b-hf", 13.0),
    ("llama2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", 13.0),
    ("llama2-70b", "meta-llama/Llama-2-70b-hf", 69.0),
    ("llama3-8b", "meta-llama/Meta-Llama-3-8B", 8.03),
    ("llama3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct", 8.03),
    ("llama3-70b", "meta-llama/Meta-Llama-3-70B", 70.6),
    ("llama3.1-8b", "meta-llama/Llama-3.1-8B", 8.03),
    ("llama3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 8.03),
    ("llama3.1-70b", "meta-llama/Llama-3.1-70B", 70.6),
    ("llama3.1-70b-instruct", "meta-llama/Llama-3.1-70B-Instruct", 70.6),
    ("llama3.2-1b", "meta-llama/Llama-3.2-1B", 1.24),
    ("llama3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1.24),
    ("llama3.2-3b", "meta-llama/Llama-3.2-3B", 3.21),
    ("llama3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 3.21),
    ("llama3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct", 70.6),
    ("mistral-7b", "mistralai/Mistral-7B-v0.3", 7.25),
    ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", 7.25),
    *((f"qwen2.5-{size}b{end.lower()}", f"Qwen/Qwen2.5-{size}B{end}", n) for size, n in _QWEN25 for end in _TUNED),
    *((f"qwen3-{size}b", f"Qwen/Qwen3-{size}B", n) for size, n in _QWEN3),
    ("gemma2-2b", "google/gemma-2-2b", 2.61),
    ("gemma2-2b-instruct", "google/gemma-2-2b-it", 2.61),
    ("gemma2-9b", "google/gemma-2-9b", 9.24),
    ("gemma2-9b-instruct", "google/gemma-2-9b-it", 9.24),
    ("gemma2-27b", "google/gemma-2-27b", 27.2),
    ("gemma2-27b-instruct", "google/gemma-2-27b-it", 27.2),
    ("phi3-mini-instruct", "microsoft/Phi-3-mini-4k-instruct", 3.82),
    ("phi4", "microsoft/phi-4", 14.7),
    ("phi4-mini-instruct", "microsoft/Phi-4-mini-instruct", 3.84),
    *(
        (f"smollm2-{size.lower()}{end.lower()}", f"HuggingFaceTB/SmolLM2-{size}{end}", n)
        for size, n in _SMOLLM2
        for end in _TUNED
    ),
    ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1),
]
BASE_MODELS = tuple(BaseModel(*row) for row in _ROWS)
_BY_NAME = {model.name: model for model in BASE_MODELS}


def resolve_model(name: str) -> str:
    """A base model as vLLM wants it: a Hub id, or the path of a folder.

    name: a short name of BASE_MODELS, `demo`, a path, or a Hub id (`owner/name`). Short names come first: to serve
    a folder that is called like one, write `./NAME`.

    Raises ModelNotFoundError for what is none of these, ModelError when the demo base cannot be made.
    """
    short = name.lower().replace("_", "-")
    if short == DEMO:
        return str(demo_model())
    if short in _BY_NAME:
        return _BY_NAME[short].hub_id
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    if is_hub_id:
        return name
    close = difflib.get_close_matches(short, [DEMO, *_BY_NAME], n=1)
    raise ModelNotFoundError(
        what="base model",
        got=repr(name),
        expected="a short name, an existing folder, or a Hub id (owner/name)",
        fix=f"did you mean {close[0]}?" if close else "`hydraserve models` lists the short names",
    )


def hub_name(name: str) -> str:
    """The public name of a base model: the Hub id of a short name (of `demo`: of what it is made from), else `name`."""
    short = name.lower().replace("_", "-")
    return DEMO_HUB_ID if short == DEMO else _BY_NAME[short].hub_id if short in _BY_NAME else name
