"""Adapters in the forms in which other programs leave them: read by their formulas, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lfm import PlanError
from mergekit_lfm.views.adapted import open_model

Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm"
PEFT = f"base_model.model.{Q}"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


A, B = draw(2, 8), draw(8, 2)
LORA: Mapping[str, Tensor] = {f"{PEFT}.lora_A.weight": A, f"{PEFT}.lora_B.weight": B}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Some tensors of a Llama, in float64."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {f"{Q}.weight": draw(8, 8).T.contiguous(), "model.layers.0.mlp.down_proj.weight": draw(8, 12)}
    tensors |= {f"{NORM}.weight": draw(8), f"{NORM}.alpha": draw(1)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


def write(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    """Write a file of an adapter, each tensor on memory of its own."""
    file.parent.mkdir(exist_ok=True)
    save_file({name: x.clone().contiguous() for name, x in tensors.items()}, file, metadata=metadata or None)
    return file


def folder_of(file: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """The folder of a file, with a config beside it."""
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    return file.parent


def check(base: Path, adapter: object, changes: Mapping[str, Tensor]) -> None:
    """Assert that an adapter makes these changes, by the names of tensors, and no other."""
    view, model = open_model(f"{base}+{adapter}"), open_model(base)
    assert {name for name in model if view.digest_of(name) != model.digest_of(name)} == {*changes}
    for name, change in changes.items():
        torch.testing.assert_close(view.read(name) - model.read(name), change.flatten(), rtol=1e-12, atol=1e-12)


def test_the_file_of_a_folder_has_the_folders_config(base: Path, tmp_path: Path) -> None:
    """Without it the scale of PEFT's tensors is not known."""
    file = write(tmp_path / "adapter/adapter_model.safetensors", LORA)
    folder_of(file)
    check(base, file, {f"{Q}.weight": 4 * B @ A})
    (tmp_path / "adapter/adapter_config.json").unlink()
    with pytest.raises(PlanError, match=r"adapter has no adapter_config\.json"):
        open_model(f"{base}+{file}")
    with pytest.raises(PlanError, match=r"alone\.safetensors is PEFT's, .* put that beside it"):
        open_model(f"{base}+{write(tmp_path / 'alone.safetensors', LORA)}")


def test_a_file_with_two_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    """Neither of them is lost in silence."""
    for end in ("lora_A", "modules_to_save"):
        names = (f"{PEFT}.{end}.{name}.weight" for name in ("default", "other"))
        adapter = folder_of(write(tmp_path / end / "adapter_model.safetensors", dict.fromkeys(names, A)))
        with pytest.raises(PlanError, match=r"has two tensors for one: \S+default\.weight and \S+other\.weight"):
            open_model(f"{base}+{adapter}")
