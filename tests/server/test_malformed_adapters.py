"""Faulty variants of a good adapter: every one is refused with an error that names its fault, and runs nothing."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from malformed_adapters import FAULTS, malformed

from hydraserve.adapters.checkpoint import check_base, load_adapter
from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.errors import HydraServeError

SHAPES = {f"model.layers.0.{name}": (64, 64) for name in ("self_attn.q_proj", "mlp.down_proj")}
CASES = int(os.environ.get("FUZZ_CASES", "2000"))  # about 5 ms each


def test_every_faulty_adapter_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good"
    save_adapter(make_adapter(SHAPES, rank=4, heads=3, seed=1), good)
    check_base(load_adapter(good), SHAPES)
    refused: Counter[str] = Counter()
    for fault, path in malformed(good, tmp_path, CASES):
        with pytest.raises(HydraServeError) as caught:
            check_base(load_adapter(path), SHAPES)
        message = str(caught.value)
        assert "got " in message, f"{path.name}: {message}"
        assert len(message) > 60, f"{path.name}: {message}"
        refused[fault] += 1
    assert set(refused) == {fault.__name__ for fault in FAULTS}
    assert not (tmp_path / "PWNED").exists()
