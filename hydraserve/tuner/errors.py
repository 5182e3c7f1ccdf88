"""Errors of the tuner."""

from __future__ import annotations

from hydraserve.errors import HydraServeError


class MergeError(HydraServeError, NotImplementedError):
    """Raised where PEFT would fold an adapter into the base weights, which HydraLoRA does not allow.

    Also a NotImplementedError, because that is what PEFT's own methods without merging raise, and callers catch.
    """

    @classmethod
    def new(cls) -> MergeError:
        """The error with its one message."""
        return cls(
            "merging",
            got="a HydraLoRA adapter, whose router mixes the heads anew for every token, so that no single matrix "
            "can stand for it",
            expected="an adapter of fixed weights, such as plain LoRA",
            fix="keep the adapter beside the base model: serve it with `hydraserve --adapter PATH`, or call the "
            "PeftModel as it is; unload() gives the base model back without the adapter",
        )
