"""The linear layers of a base model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydraserve.errors import ModelError, ModelNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelAccess:
    """How a model's configuration is got, for those that need more than a name. The names are vLLM's flags.

    trust_remote_code: run the code that the model brings for its configuration and its layers.
    revision, code_revision: branch, tag or commit of the model, and of its code where that is elsewhere.
    hf_token:       for a gated model; True: the one that `hf auth login` keeps.
    hf_config_path: folder or Hub id of the configuration, where it is not beside the model.
    """

    trust_remote_code: bool = False
    revision: str | None = None
    code_revision: str | None = None
    hf_token: str | bool | None = None
    hf_config_path: str | None = None


BY_NAME = ModelAccess()


def base_shapes(model: str | Path | PreTrainedConfig, access: ModelAccess = BY_NAME) -> dict[str, tuple[int, int]]:
    """Every linear layer of a base model: its path in transformers' module tree -> (in, out).

    model: a checkpoint folder, a Hub id, or a configuration. Only the configuration is read: the layers are made
    on torch's meta device, without weights. Fused expert weights of mixtures are no linear layers and are left out.

    Raises ModelNotFoundError when there is no configuration, ModelError when transformers cannot build the model.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    shapes = {}
    for path, module in skeleton(model, access).named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, whose weight is [in, out]
            shapes[path] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
    return shapes


def skeleton(model: str | Path | PreTrainedConfig, access: ModelAccess = BY_NAME) -> PreTrainedModel:
    """The model on the meta device: every module, no weights; 0.2 to 0.4 s. Arguments and errors as `base_shapes`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(model, access) if isinstance(model, str | Path) else model
    remote: dict[str, Any] = {"trust_remote_code": access.trust_remote_code}
    if access.code_revision is not None:
        remote["code_revision"] = access.code_revision
    try:
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, **remote)
    except (ValueError, ImportError) as e:
        raise ModelError(
            what=f"base model {config.name_or_path or config.model_type}",
            got=_first_line(e),
            expected="a causal language model that transformers knows",
            fix=_other_base(config),
        ) from e
    return built


def _other_base(config: PreTrainedConfig) -> str:
    inner = getattr(config, "text_config", None)
    if inner is not None:  # LLaVA and its like
        return f"serve its language model ({inner.model_type}) alone, saved as a checkpoint of its own"
    return "serve another base, or update transformers"


def read_config(model: str | Path, access: ModelAccess = BY_NAME) -> PreTrainedConfig:
    """The configuration of a checkpoint folder or Hub id. Raises ModelNotFoundError."""
    from transformers import AutoConfig

    options = {"trust_remote_code": access.trust_remote_code, "token": access.hf_token, "revision": access.revision}
    if access.code_revision is not None:
        options["code_revision"] = access.code_revision
    given = {name: value for name, value in options.items() if value is not None}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(access.hf_config_path or model, **given)
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(
            what=f"base model {model}",
            got=_first_line(e),
            expected="a configuration that transformers can read",
            fix="check the name, the --revision and the network; for a gated model log in with `hf auth login` or set "
            "HF_TOKEN; a model that brings code of its own needs --trust-remote-code",
        ) from e
    return config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
