"""Arena: blocks are apart, aligned and zero, and mappings are given back."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from hydra_kernels.ops.arena import ALIGNMENT, CHUNK, Arena


def mapped(address: int) -> bool:
    """Whether this process has memory at the address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return True
    return False


@pytest.mark.parametrize("nbytes", [1, ALIGNMENT, 100_003, CHUNK // 4, CHUNK // 4 + 1, CHUNK + 5])
def test_blocks_are_aligned_zero_and_apart(nbytes: int) -> None:
    arena = Arena()
    blocks = [arena.take(nbytes) for _ in range(9)]
    for i, block in enumerate(blocks):
        assert len(block) == nbytes
        assert block.data_ptr() % ALIGNMENT == 0
        assert not block.any()
        block.fill_(i + 1)
    assert all((block == i + 1).all() for i, block in enumerate(blocks))


def test_small_blocks_share_a_mapping_that_goes_with_the_last_of_them() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc to read the process's mappings from")
    arena = Arena()
    blocks = [arena.take(CHUNK // 8) for _ in range(16)]
    addresses = [block.data_ptr() for block in blocks]
    assert addresses[7] - addresses[0] == 7 * CHUNK // 8
    del blocks[1:8]
    assert mapped(addresses[0])
    del blocks[0]
    assert not mapped(addresses[0])
    assert mapped(addresses[8])


def test_weights_ask_for_huge_pages() -> None:
    flags = Path("/proc/self/smaps")
    if not (hasattr(mmap, "MADV_HUGEPAGE") and flags.exists()):
        pytest.skip("no huge pages on this system")
    block = Arena().take(1 << 20)
    address = block.data_ptr()
    inside, found = False, []
    for line in flags.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, _, end = head.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and head == "VmFlags:":
            found = line.split()[1:]
    assert "hg" in found
