"""Every format of the family: recognised by its content, and computing what the format's own layers compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family import Expert, Member, family
from hydra_kernels import reference

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.adapters.formats.molora import save_molora
from hydraserve.adapters.save import save_loramoe
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import AdapterError, AdapterFormatError, UnsupportedFeatureError

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 24),
    "model.layers.0.mlp.gate_proj": (24, 40),
    "model.layers.0.mlp.down_proj": (40, 24),
    "model.layers.11.mlp.down_proj": (40, 24),
}
FAMILY = family(SHAPES)


@pytest.mark.parametrize("name", FAMILY)
def test_a_folder_computes_what_its_own_layers_do(name: str, tmp_path: Path) -> None:
    member = FAMILY[name]
    folder = member.write(tmp_path)
    summary, adapter = inspect_adapter(folder), load_adapter(folder)
    assert summary.format == adapter.format == member.format
    assert set(adapter.modules) == set(SHAPES)
    for path, layer in member.layers.items():
        weights = adapter.modules[path]
        assert summary.modules[path].layout == weights.layout
        x = torch.randn(9, weights.in_features, dtype=torch.float64)
        expected = layer.double()(x)
        layer.float()
        torch.testing.assert_close(reference.delta(x, weights, torch.float64), expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 0.05, "an adapter that does nothing proves nothing"


@pytest.mark.parametrize("name", FAMILY)
def test_the_reason_names_what_was_seen(name: str, tmp_path: Path) -> None:
    reason = inspect_adapter(FAMILY[name].write(tmp_path)).reason
    assert "tensors" in reason
    known = {part for tensor in FAMILY[name].tensors() for part in tensor.split(".")}
    assert any(word.strip(",:") in known for word in reason.replace(".", " ").split())


@pytest.mark.parametrize("name", FAMILY)
def test_the_folders_name_means_nothing(name: str, tmp_path: Path) -> None:
    assert inspect_adapter(FAMILY[name].write(tmp_path / "loramoe-molora-hydralora")).format == FAMILY[name].format


@pytest.mark.parametrize("name", FAMILY)
def test_every_tensor_is_needed_and_has_one_shape(name: str, tmp_path: Path) -> None:
    """Without any one tensor of a module, or with one row more, the folder is refused before anything is loaded."""
    member = FAMILY[name]
    tensors = member.tensors()
    first = next(iter(member.layers))
    for i, tensor in enumerate(
        t for t in tensors if t.startswith(f"{member.prefix}{first.removeprefix(member.left_out)}.")
    ):
        whole = tensors[tensor]
        alone = isinstance(member.layers[first], Expert) and "lora_B" in tensor  # nothing else has `out` rows
        larger = torch.cat([whole, whole[:, :1]], 1) if alone else torch.cat([whole, whole[:1]])
        changed = {**tensors, tensor: larger}
        _refused(member, changed, tmp_path / f"shape{i}")
        if not tensor.endswith("bias"):  # without its bias a router is another router
            _refused(member, {n: t for n, t in tensors.items() if n != tensor}, tmp_path / f"missing{i}")


def _refused(member: Member, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(member.config))
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterError) as caught:
        inspect_adapter(folder)
    assert str(folder) in str(caught.value)


def test_tensors_of_two_formats_are_refused(tmp_path: Path) -> None:
    """The tuner's tensors beside the PEFT fork's, and both would have the peft_type: it is not guessed which one."""
    member = FAMILY["peft fork"]
    module = "base_model.model.model.layers.0.mlp.up_proj"
    both = member.tensors() | {f"{module}.hydralora_A.weight": torch.ones(8, 24)}
    folder = member.write(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(both, folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match=r"hydralora-peft \(.*hydralora-list \("):
        inspect_adapter(folder)


def test_tied_a_that_is_not_equal(tmp_path: Path) -> None:
    member = FAMILY["lease, all heads"]
    member = Member(member.format, {**member.config, "shared_lora_a": True}, member.layers)
    with pytest.raises(AdapterError, match=r"shared_lora_a: got true, and .*lora_A1\.weight differs"):
        load_adapter(member.write(tmp_path))


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_can_be_written_as_molora(name: str, tmp_path: Path) -> None:
    adapter = load_adapter(FAMILY[name].write(tmp_path / "source"))
    save_molora(adapter, tmp_path / "copy")
    copy = load_adapter(tmp_path / "copy")
    assert copy.format == "molora"
    assert copy.digest == adapter.digest


def test_loramoe_comes_back(tmp_path: Path) -> None:
    adapter = load_adapter(FAMILY["loramoe"].write(tmp_path / "source"))
    save_loramoe(adapter, tmp_path / "copy")
    copy = load_adapter(tmp_path / "copy")
    assert (copy.format, copy.digest) == ("loramoe", adapter.digest)


@pytest.mark.parametrize("name", sorted(set(FAMILY) - {"loramoe", "lease, all heads"}))
def test_loramoe_has_no_place_for_other_gates(name: str, tmp_path: Path) -> None:
    adapter = load_adapter(FAMILY[name].write(tmp_path / "source"))
    with pytest.raises(UnsupportedFeatureError, match="the LoRAMoE layout cannot hold this"):
        save_loramoe(adapter, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_modules_that_disagree_about_top_k_fit_no_layout(tmp_path: Path) -> None:
    adapter = load_adapter(FAMILY["molora, top-2"].write(tmp_path / "source"))
    first, weights = next(iter(adapter.modules.items()))
    other = replace(weights, layout=replace(weights.layout, top_k=1))
    with pytest.raises(UnsupportedFeatureError, match="top-"):
        save_molora(HydraAdapter.of({**adapter.modules, first: other}), tmp_path / "copy")


@pytest.mark.parametrize("name", FAMILY)
def test_alpha_pattern_means_one_thing_everywhere(name: str, tmp_path: Path) -> None:
    member = FAMILY[name]
    plain = load_adapter(member.write(tmp_path / "plain"))
    config = {**member.config, "alpha_pattern": {"q_proj": 2 * member.config["lora_alpha"]}}
    changed = load_adapter(replace(member, config=config).write(tmp_path / "changed"))
    for path, weights in plain.modules.items():
        factor = 2 if path.endswith("q_proj") else 1
        assert changed.modules[path].scaling == factor * weights.scaling


def test_a_bias_keeps_its_own_precision_in_the_transposed_form(tmp_path: Path) -> None:
    member = FAMILY["transposed"]
    tensors = {name: tensor.bfloat16() for name, tensor in member.tensors().items()}
    biases = {
        name.replace(".weight", ".bias"): torch.full((len(tensor),), 0.1)
        for name, tensor in tensors.items()
        if name.endswith(".lora_router.weight")
    }
    folder = member.write(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors | biases, folder / "adapter_model.bin")
    for weights in load_adapter(folder).modules.values():
        assert weights.bias is not None
        assert torch.equal(weights.bias, torch.full_like(weights.bias, 0.1, dtype=torch.float32))
