"""The one place where PEFT itself is extended.

Cause: `peft.utils.register_peft_method` only accepts names that are members of the `PeftType` enum, and an enum
cannot be extended from outside (PEFT 0.21, https://github.com/huggingface/peft/issues/2273). A plain string as
`peft_type` passes some of PEFT's checks and fails others (issue 2634), so the enum gets a real member.
Remove when: PEFT registers methods under names of their own, or has HydraLoRA itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

if TYPE_CHECKING:
    from hydraserve.tuner.config import HydraLoraConfig
    from hydraserve.tuner.model import HydraLoraModel

METHOD = "hydralora"
PREFIX = f"{METHOD}_"  # of every attribute of ours in a layer, and so of every key in a saved adapter


def peft_type() -> PeftType:
    """The member PeftType.HYDRALORA, added on the first call."""
    name = METHOD.upper()
    member = PeftType._member_map_.get(name)
    return PeftType(member) if member is not None else _add_member(name)


def _add_member(name: str) -> PeftType:
    """What `enum` itself does for a member with a string value, after the class is made."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    setattr(PeftType, name, member)  # before the maps: afterwards the metaclass refuses
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type[HydraLoraConfig], model_cls: type[HydraLoraModel]) -> None:
    """Make HydraLoRA known to PEFT. May be called more than once.

    Raises ImportError when this PEFT already has another method of that name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if known is config_cls:
        return
    if known is not None:
        raise ImportError(
            f"PEFT {peft.__version__}: got a method named {METHOD} from {known.__module__}, expected none; "
            f"import only one of the two packages"
        )
    register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
