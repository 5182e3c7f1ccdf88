"""What a pickle would do, found by reading its opcodes; nothing is executed."""

from __future__ import annotations

import pickletools

# What a dict of tensors saved by torch.save refers to. Storage types and dtypes are added by `_is_tensor_part`.
_BUILDERS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch.storage UntypedStorage",
    }
)


def forbidden_pickle(data: bytes) -> str | None:
    """Why a pickle is not a plain dict of tensors, or None when it could be one.

    torch.load's weights_only mode has an allow-list of its own; this one is narrower (no bytearray(10**12), no
    sparse or quantised tensors), names the import at fault, and looks at the whole pickle before anything runs.

    Raises ValueError when the bytes are not a whole pickle.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST") and not _is_tensor_part(str(argument)):
                return f"the import {str(argument).replace(' ', '.')}"
            if opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                return _stack_global(data)
            if opcode.name in ("BYTEARRAY8", "NEXT_BUFFER", "NEWOBJ_EX"):
                return f"the opcode {opcode.name}"
    except Exception as error:  # pickletools raises whatever a damaged stream leads to
        raise ValueError(f"a damaged pickle ({error})") from error
    return None


def _is_tensor_part(name: str) -> bool:
    module, _, symbol = name.partition(" ")
    is_type = symbol.endswith("Storage") or symbol.startswith(("float", "bfloat", "int", "uint", "bool", "complex"))
    return name in _BUILDERS or (module == "torch" and symbol.isidentifier() and is_type)


def _stack_global(data: bytes) -> str:
    """Name what a STACK_GLOBAL most likely imports: the last two strings before it."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            break
        if isinstance(argument, str):
            strings.append(argument)
    return f"the import {'.'.join(strings[-2:])}" if len(strings) > 1 else "an import"
