"""Runs the tests of the Triton kernels in Triton's interpreter where there is no GPU.

The interpreter must be chosen before Triton is imported, and other tests of this process may have imported it, so
each file gets a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = ("test_op_shrink.py", "test_op_expand.py", "test_op_linear.py", "test_op_record.py", "test_carry.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the files run on it, as they are")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton", reason="the interpreter is part of Triton, which is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", run.stdout), run.stdout
