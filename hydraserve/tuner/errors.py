"""Errors of the tuner."""

from __future__ import annotations


class MergeError(NotImplementedError):
    """Raised where PEFT would fold an adapter into the base weights, which HydraLoRA does not allow."""

    def __init__(self) -> None:
        super().__init__(
            "got a request to merge a HydraLoRA adapter, expected none: its router mixes the heads anew for every "
            "token, so no single matrix can stand for it. Keep the adapter beside the base model: serve it with "
            "hydraserve, or call the PeftModel as it is; unload() gives the base model back without the adapter"
        )
