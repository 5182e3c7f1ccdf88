"""Builds the native CPU operator (csrc/) with the system's C++ compiler, once, and loads it.

    python -m hydra_kernels.ops.build        builds it ahead of time and says what it runs with

The library lies in a cache folder under a name made of everything it depends on: the sources, the flags, torch's
version, the machine and the compiler. Environment, read when the library is first needed:

    HYDRA_KERNELS_NATIVE   0: do not use the native operator
    HYDRA_KERNELS_CACHE    the cache folder; default $XDG_CACHE_HOME/hydra_kernels or ~/.cache/hydra_kernels
    HYDRA_KERNELS_ISA      avx512bf16, avx512, avx2 or portable: use this instruction set, not the best one
    CXX                    the compiler; GCC; default the first of g++ and c++
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
COMPILERS = ("g++", "c++")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
# GCC takes the intrinsics' deliberately undefined registers for mistakes (GCC bug 105593).
WARNINGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_avx512bf16": [*AVX512, "-mavx512bf16"]}


class BuildError(RuntimeError):
    """The library cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Native:
    """What `load` found: the instruction set in use, or the reason why there is none."""

    isa: str | None
    reason: str = ""


@functools.cache
def load() -> Native:
    """Loads the library, built first when it has to be, and registers its ops. Never raises.

    When it cannot be had (no compiler, the build fails), that is said once, as a warning with the reason.
    """
    if os.environ.get("HYDRA_KERNELS_NATIVE", "1") == "0":
        return Native(None, "switched off by HYDRA_KERNELS_NATIVE=0")
    try:
        torch.ops.load_library(library())  # type: ignore[no-untyped-call]
        isa: str = torch.ops.hydra_kernels.cpu_isa(os.environ.get("HYDRA_KERNELS_ISA", ""))
    except (BuildError, OSError, RuntimeError) as error:
        reason = str(error).strip()
        warnings.warn(f"CPU kernels: using the slower torch path: {reason}", RuntimeWarning, stacklevel=2)
        return Native(None, reason)
    _register_fakes()
    return Native(isa)


def library() -> Path:
    """The library's file in the cache, built when it is not there.

    Raises BuildError when it is neither there nor can be built.
    """
    if sys.platform != "linux" or sys.byteorder != "little":
        raise BuildError(f"got {sys.platform}, {sys.byteorder}-endian; the native kernels are for little-endian Linux")
    folder = cache_folder()
    compiler = find_compiler()
    if compiler is None:
        built = sorted(folder.glob(f"cpu-{_sources_key()}-*.so"))
        if not built:
            raise BuildError("no C++ compiler found; install g++, or set CXX to one, and start again")
        return built[0]
    target = folder / f"cpu-{_sources_key()}-{_compiler_key(compiler)}.so"
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "build.lock"):
                if not target.exists():
                    _build(compiler, target)
        except OSError as error:
            raise BuildError(
                f"the cache folder cannot be used ({error}); set HYDRA_KERNELS_CACHE to another"
            ) from error
    return target


def cache_folder() -> Path:
    """Where built libraries are kept."""
    chosen = os.environ.get("HYDRA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra_kernels"


def find_compiler() -> str | None:
    """The path of the C++ compiler, None when there is none."""
    chosen = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [chosen] if chosen else COMPILERS)), None)


def _build(compiler: str, target: Path) -> None:
    """Compiles every source on its own, as each has its instruction set, and links them to `target`."""
    logger.warning("building the CPU kernels with %s into %s (once, under a minute)", compiler, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
            list(pool.map(functools.partial(_compile, compiler), sources, objects))
        torch_libraries = Path(torch.__file__).with_name("lib")
        linked = Path(folder) / target.name
        # OpenMP's functions stay undefined: they resolve to the runtime that torch itself is linked to (or to the
        # one preloaded over it), so that a process never has two runtimes with a pool of threads each.
        _run(
            [compiler, "-shared", *map(str, objects), f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", "-o", str(linked)]
        )
        linked.rename(target)  # whole or not at all


def _compile(compiler: str, source: Path, target: Path) -> None:
    flags = [*FLAGS, *WARNINGS]
    if source.stem == "ops":
        include = Path(torch.__file__).with_name("include")
        flags += ["-fopenmp", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        flags += ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    elif platform.machine() == "x86_64":
        flags += [flag for flag in ISA_FLAGS.get(source.stem, []) if _accepts(compiler, flag)]
    _run([compiler, *flags, "-c", str(source), "-o", str(target)])


@functools.cache
def _accepts(compiler: str, flag: str) -> bool:
    """Whether the compiler knows a flag; a source without its instruction set compiles to nothing."""
    command = [compiler, flag, "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'exit status {done.returncode}'}")


def _sources_key() -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((FLAGS, sorted(ISA_FLAGS.items()), torch.__version__, platform.machine())).encode())
    return digest.hexdigest()[:16]


def _compiler_key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    return hashlib.sha256(compiler.encode() + version).hexdigest()[:8]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the operating system drops it when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _register_fakes() -> None:
    register: Callable[[str, Callable[..., object]], object] = torch.library.register_fake
    register("hydra_kernels::cpu_linear_", _nothing)
    register("hydra_kernels::cpu_expand_", _nothing)
    register("hydra_kernels::cpu_shrink", _empty_z)


def _nothing(*_: torch.Tensor | None) -> None:
    """An op that only writes into its arguments."""


def _empty_z(x: torch.Tensor, table: torch.Tensor, _: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty((table.shape[1], x.shape[0], rows), dtype=torch.float32)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    native = load()
    if native.isa is None:
        raise SystemExit(f"no native CPU kernels: {native.reason}")
    print(f"CPU kernels: {library()}, instruction set {native.isa}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
