"""The linear layers of a base model, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydraserve.errors import ModelError, ModelNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def base_shapes(model: str | Path | PreTrainedConfig, *, trust_remote_code: bool = False) -> dict[str, tuple[int, int]]:
    """Every linear layer of a base model: its path in transformers' module tree -> (in, out).

    model: a checkpoint folder, a Hub id, or a configuration. Only the configuration is read: the layers are made
    on torch's meta device, without weights. Fused expert weights of mixtures are no linear layers and are left out.

    Raises ModelNotFoundError when there is no configuration, ModelError when transformers cannot build the model.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    shapes = {}
    for path, module in skeleton(model, trust_remote_code).named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, whose weight is [in, out]
            shapes[path] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
    return shapes


def skeleton(model: str | Path | PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: every module, no weights; 0.2 to 0.4 s. Arguments and errors as `base_shapes`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(model, trust_remote_code) if isinstance(model, str | Path) else model
    try:
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as e:
        raise ModelError(
            what=f"base model {config.name_or_path or config.model_type}",
            got=_first_line(e),
            expected="a causal language model that transformers knows",
            fix="serve another base, or update transformers",
        ) from e
    return built


def read_config(model: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint folder or Hub id. Raises ModelNotFoundError."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(
            what=f"base model {model}",
            got=_first_line(e),
            expected="a configuration that transformers can read",
            fix="check the name and the network; for a gated model log in with `hf auth login` or set HF_TOKEN",
        ) from e
    return config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
