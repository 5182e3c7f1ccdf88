"""Base models: short names, the embedded demo, and what can be known of one without its weights.

Importing this is cheap: torch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

from hydraserve.models.demo import demo_model
from hydraserve.models.memory import check_fits
from hydraserve.models.names import BASE_MODELS, BaseModel, hub_name, resolve_model
from hydraserve.models.shapes import ModelAccess, base_shapes

__all__ = [
    "BASE_MODELS",
    "BaseModel",
    "ModelAccess",
    "base_shapes",
    "check_fits",
    "demo_model",
    "hub_name",
    "resolve_model",
]
