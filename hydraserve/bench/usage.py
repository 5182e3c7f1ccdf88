"""Memory and processor time of a server's processes, and how much of the machine others use meanwhile (Linux)."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# Fields of /proc/PID/stat after the command's closing parenthesis (proc(5) counts from 1, and these from field 3).
_STATE, _SESSION, _UTIME, _STIME = 0, 3, 11, 12


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory of a group of processes.

    pss:       now, pages that several processes share counted once.
    allocated: the part of pss that no file stands behind: what the processes asked for. Only this can leak; the rest
               also changes when another program that maps the same libraries starts or ends.
    peak:      the largest resident size each process had since it started or since `reset_peak`, added up; shared
               pages count in each.
    """

    pss: int
    allocated: int
    peak: int


def session_processes(leader: int) -> list[int]:
    """The living processes of the session that `leader` started (see ServerProcess)."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    stats = {pid: stat for pid in pids if (stat := _stat(pid))}
    # A zombie has ended, and waits for a parent (in a container, for a first process) to take note of it.
    return [pid for pid, stat in stats.items() if int(stat[_SESSION]) == leader and stat[_STATE] != "Z"]


def memory(leader: int) -> Memory:
    """Of a whole session. Reading it walks the page tables, so do it between runs, not during them."""
    pss = allocated = peak = 0
    for pid in session_processes(leader):
        pss += _kib(pid, "smaps_rollup", "Pss:")
        allocated += _kib(pid, "smaps_rollup", "Pss_Anon:") + _kib(pid, "smaps_rollup", "Pss_Shmem:")
        peak += _kib(pid, "status", "VmHWM:")
    return Memory(pss * 1024, allocated * 1024, peak * 1024)


def reset_peak(leader: int) -> None:
    """Let Memory.peak of a session begin anew. Where the kernel does not let us, it goes on from before."""
    for pid in session_processes(leader):
        with contextlib.suppress(OSError):  # ended, or another user's
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def gpu_memory(leader: int) -> int | None:
    """Bytes of GPU memory of a whole session; None where nvidia-smi knows none of its processes: without a GPU, and in
    containers that do not share the host's process ids."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        used = [(int(pid), int(mib)) for pid, mib in (line.split(",") for line in listed.splitlines())]
    except (OSError, subprocess.SubprocessError, ValueError):  # "[N/A]", or no driver
        return None
    ours = set(session_processes(leader))
    found = [mib << 20 for pid, mib in used if pid in ours]
    return sum(found) if found else None


def processor_seconds(leader: int) -> float:
    """User and system time of a whole session so far."""
    stats = [stat for pid in session_processes(leader) if (stat := _stat(pid))]
    return sum(int(stat[_UTIME]) + int(stat[_STIME]) for stat in stats) / TICKS_PER_S


def machine_seconds() -> tuple[float, float]:
    """(busy, total) processor seconds of the whole machine since it started, all cores together.

    Time that the hypervisor gave to other guests counts as busy: it is as lost as time that a neighbour used.
    """
    fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle and waiting for a disk
    return (sum(fields) - idle) / TICKS_PER_S, sum(fields) / TICKS_PER_S


class Neighbours:
    """How much of the machine other processes took between two moments: the noise of a measurement.

    leader: of the server's session; this process's own time is not counted as a neighbour's either.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self._ours, (self._busy, self._total) = self._own(), machine_seconds()

    def _own(self) -> float:
        times = os.times()
        return processor_seconds(self.leader) + times.user + times.system

    def share(self) -> float:
        """From 0 to 1, of all cores, since this object was made."""
        busy, total = machine_seconds()
        theirs = (busy - self._busy) - (self._own() - self._ours)
        return min(1.0, max(0.0, theirs / max(total - self._total, 1e-9)))


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on, or None when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _kib(pid: int, file: str, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:  # ended, or another user's
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)
