"""Fields of adapter_config.json that ask for something else than a low-rank delta of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydraserve.errors import UnsupportedFeatureError

# Initialisations that only choose where training starts. All the others (PiSSA, OLoRA, CorDA, LoftQ, ...) also
# change the base model's weights, so the adapter is not one for the base model as it is.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

_FEATURES: dict[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias of B",
    "modules_to_save": "full weight matrices",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "weights of parameters that are no linear layers (mixture-of-experts)",
    "trainable_token_indices": "trained token embeddings",
    "megatron_config": "Megatron's parallel layers",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "enable_lora": "LoRA for parts of a merged projection",
}


def refuse_features(fields: Mapping[str, Any]) -> None:
    """Raises UnsupportedFeatureError, naming the field, for what would be served wrongly if it were ignored.

    The table follows peft 0.21's LoraConfig. Fields that only matter in training are not in it.
    """
    for name, feature in _FEATURES.items():
        if fields.get(name):
            raise _unsupported(name, fields[name], feature, "false or null")
    if fields.get("bias") not in (None, "none"):
        raise _unsupported("bias", fields["bias"], "biases of the base model", "'none'")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise UnsupportedFeatureError(
            "init_lora_weights",
            got=f"{init!r}: an initialisation that changes the base model's weights",
            expected=f"true or one of {', '.join(sorted(_PLAIN_INITS))}",
            fix="convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _unsupported(name: str, value: Any, feature: str, expected: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        name, got=f"{value!r}: {feature}", expected=expected, fix=f"train or export the adapter without {name}"
    )
