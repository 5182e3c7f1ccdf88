"""KV blocks of adapters that are gone: found, and taken out of the prefix cache.

vLLM's cache key has an adapter's name and path in it, so blocks of an adapter that is gone can never be hit. They
would stay until the space is needed; an operator who removes a tenant's adapter wants them gone at once. The key is
a hash, from which the adapter cannot be read back: so the pool notes whose each block is when it is cached.
"""

from __future__ import annotations

from typing import Any

_OWNERS = "_hydraserve_owners"


def note_owner(pool: Any, request: Any, blocks: list[Any], start: int, stop: int) -> None:
    """Called after `pool` (vLLM's BlockPool) cached blocks[start:stop] of `request`."""
    owners: dict[int, str] = pool.__dict__.setdefault(_OWNERS, {})
    adapter = request.lora_request.lora_name if request.lora_request else None
    if adapter is None and not owners:
        return
    for block in blocks[start:stop]:
        if adapter is None:
            owners.pop(block.block_id, None)
        else:
            owners[block.block_id] = adapter


def evict(pool: Any, adapter: str) -> int:
    """Take the blocks that no request uses and that were last cached for `adapter` out of the prefix cache."""
    owners: dict[int, str] = pool.__dict__.get(_OWNERS, {})
    unused = [i for i, owner in owners.items() if owner == adapter and pool.blocks[i].ref_cnt == 0]
    cached = {i for i in unused if pool.blocks[i].block_hash is not None}
    pool.evict_blocks(cached)
    for block_id in unused:
        del owners[block_id]
    return len(cached)


def counts(pool: Any) -> tuple[int, int, int]:
    """(blocks, free ones, those with a prefix that a request could hit)."""
    return pool.num_gpu_blocks, pool.get_num_free_blocks(), len(pool.cached_block_hash_to_block)
