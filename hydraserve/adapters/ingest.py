"""Reading adapters in a process of their own.

Files that somebody else wrote are parsed here and nowhere else: not beside the HTTP server, whose streams they would
hold up, and not in the process that runs the model. A file that crashes or hangs its reader costs that reader, which
is started again for the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from hydraserve.adapters.archives import opened
from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.compose import Recipe, compose, read_router
from hydraserve.adapters.derive import derive
from hydraserve.adapters.requirements import Requirements
from hydraserve.adapters.store import AdapterStore, StoredAdapter, read_stored
from hydraserve.errors import AdapterError, UnreadableFileError

# Reading 16 GiB from a slow network disk takes minutes; anything longer hangs.
READ_TIMEOUT_S = 1800.0
_PR_SET_PDEATHSIG = 1
# A tenth of a core that others keep busy: the server and the engine share the machine's cores with the reader, but on a
# machine without an idle one, the lowest priority would make an adapter wait for minutes.
_NICENESS = 10
_AUTOGROUP = Path("/proc/self/autogroup")


def ingest(path: Path, store: Path, requirements: Requirements) -> StoredAdapter:
    """Read an adapter (its folder, or an archive), check that it can be served, and put its content into the store.

    Raises AdapterError's subclasses.
    """
    try:
        with opened(path, requirements.limits, store) as folder:
            adapter = load_adapter(folder, limits=requirements.limits)
            requirements.check(adapter)
    except AdapterError as error:
        if error.where is None or path.is_file():  # where it was unpacked means nothing to anybody
            error.where = f"adapter {path}"
        raise
    return AdapterStore(store).add(adapter)


def ingest_derived(parent: Path, spec: str, store: Path) -> StoredAdapter:
    """Make an adapter of one in the store (see `derive`) and put that there too.

    Raises UnknownAdapterError for a `spec` that the adapter does not allow, AdapterError's subclasses.
    """
    return AdapterStore(store).add(derive(read_stored(parent), spec))


def ingest_composed(
    recipe: Recipe, parts: Sequence[Path], router: Path | None, store: Path, requirements: Requirements
) -> StoredAdapter:
    """Make an adapter of others in the store (`parts`, in the recipe's order) and put it there too.

    router: the folder of the router, or None.

    Raises AdapterError's subclasses.
    """
    limits = requirements.limits
    try:
        weighted = [(read_stored(path), weight) for path, (_, weight) in zip(parts, recipe.parts, strict=True)]
        adapter = compose(weighted, None if router is None else read_router(router, limits), limits)
        requirements.check(adapter)
    except AdapterError as error:
        error.where = f"composition {recipe}"
        raise
    return AdapterStore(store).add(adapter)


class Ingester:
    """`ingest`, `ingest_derived` and `ingest_composed` in a reader process, one at a time. Thread-safe; all block.

    Linux ends the reader with the thread that started it: use threads that live as long as the server.
    """

    def __init__(self, store: AdapterStore, requirements: Requirements, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._store, self._requirements, self._timeout_s = store, requirements, timeout_s
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def read(self, folder: Path) -> StoredAdapter:
        """Raises AdapterError's subclasses; UnreadableFileError also when the reader crashed or did not finish."""
        return self._do(partial(ingest, folder, self._store.root, self._requirements), folder)

    def derive(self, parent: StoredAdapter, spec: str) -> StoredAdapter:
        """Raises as `ingest_derived`, and UnreadableFileError as `read`."""
        path = Path(parent.path)
        return self._do(partial(ingest_derived, path, spec, self._store.root), path)

    def compose(self, recipe: Recipe, parts: Sequence[StoredAdapter], router: Path | None) -> StoredAdapter:
        """Raises as `ingest_composed`, and UnreadableFileError as `read`."""
        paths = [Path(part.path) for part in parts]
        work = partial(ingest_composed, recipe, paths, router, self._store.root, self._requirements)
        return self._do(work, paths[0])

    def _do(self, work: Callable[[], StoredAdapter], path: Path) -> StoredAdapter:
        with self._lock:
            try:
                return self._submit(work).result(self._timeout_s)
            except BrokenProcessPool as error:
                self._stop()
                raise _killed(path, "it crashed the process that reads adapters") from error
            except TimeoutError as error:
                self._stop()
                raise _killed(path, f"reading it took more than {self._timeout_s:.0f} s") from error

    def _submit(self, work: Callable[[], StoredAdapter]) -> Future[StoredAdapter]:
        try:
            return self._reader().submit(_then_release_memory, work)
        except BrokenProcessPool:  # it ended since the last adapter, which is not this one's fault
            self._stop()
            return self._reader().submit(_then_release_memory, work)

    def start(self) -> None:
        """Start the reader now, so that the first adapter does not wait for it."""
        with self._lock:
            self._reader().submit(os.getpid)

    def close(self) -> None:
        """End the reader."""
        with self._lock:
            self._stop()

    def _reader(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # the server has threads, and the engine's libraries loaded
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_reader)
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            self._pool = None


def _prepare_reader() -> None:
    import torch

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the server, however that ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    yield_to_others()
    torch.set_num_threads(1)


def yield_to_others() -> None:
    """Give this process a low priority on the machine.

    Linux may weigh sessions against each other and niceness only within one (autogroup, see sched(7)): in the server's
    session, the process would take turns as an equal with whatever else the machine runs.
    """
    os.nice(_NICENESS)
    with contextlib.suppress(OSError):  # it leads a session already; or the kernel does not group by session
        os.setsid()
        _AUTOGROUP.write_text(str(_NICENESS))


def _then_release_memory(work: Callable[[], StoredAdapter]) -> StoredAdapter:
    try:
        return work()
    finally:
        release_memory()


def release_memory() -> None:
    """Give what was freed back to the operating system; the allocator would keep it for the next adapter."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _killed(folder: Path, got: str) -> UnreadableFileError:
    return UnreadableFileError(
        "files",
        got=got,
        expected="files that can be read",
        fix="check them; they may be damaged",
        where=f"adapter {folder}",
    )
