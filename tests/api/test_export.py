"""Patches as adapters: the model that peft makes with one is the patched model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapters import logits, tiny_model, with_adapter
from helpers_commands import answer, run
from helpers_lora import save_lora
from models import files_of
from torch import Tensor

from mergekit_lfm import apply_patches, export_patches, merge_adapters
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.artifacts.patch import Patch, PatchInfo, TensorChange
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.adapted import open_model

LAYER = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}


def patch(path: Path, model: Any, changes: Mapping[str, str], seed: int = 0) -> Path:
    """A patch file with random changes of these kinds to a model's tensors."""
    draw = torch.Generator().manual_seed(seed)
    tensors, info = dict[str, Tensor](), {}
    for name, kind in changes.items():
        shape = model.state_dict()[name].shape
        axis = None if len(shape) < 2 else int("c_" not in name)
        if kind == "low_rank":
            tensors[f"{name}.left"] = torch.randn(shape[0], 2, generator=draw)
            tensors[f"{name}.right"] = torch.randn(2, shape[1], generator=draw)
            info[name] = TensorChange("low_rank", tuple(shape), "float32", axis)
        elif kind == "add":
            tensors[f"{name}.add"] = torch.randn(shape, generator=draw)
            info[name] = TensorChange("add", tuple(shape), "float32", axis)
        else:
            tensors[name] = torch.randn(shape, generator=draw)
            info[name] = TensorChange("replace", tuple(shape), "float32", axis)
    Patch(PatchInfo("test", info), tensors).save(path)
    return path


@pytest.fixture(params=LAYER)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def check(tmp_path: Path, model: Any, patches: list[Path], **options: Any) -> Any:
    """Export patches, and compare what peft makes with the patched model; the outcome."""
    model.save_pretrained(tmp_path / "base")
    outcome = export_patches(patches, tmp_path / "out", **options)
    apply_patches(tmp_path / "base", patches, tmp_path / "patched", verify=False, any_base=True)
    patched = type(model).from_pretrained(tmp_path / "patched")
    torch.testing.assert_close(logits(with_adapter(model, tmp_path / "out")), logits(patched), atol=1e-3, rtol=1e-3)
    return outcome.result


@pytest.mark.parametrize("with_base", [True, False])
def test_products_keep_their_rank_and_lie_side_by_side(tmp_path: Path, kind: str, with_base: bool) -> None:
    model = tiny_model(kind)
    weight = f"{LAYER[kind]}.weight"
    files = [patch(tmp_path / f"{i}.safetensors", model, {weight: "low_rank"}, i) for i in range(2)]
    result = check(tmp_path, model, files, base=tmp_path / "base" if with_base else None)
    assert [(each.name, each.rank) for each in result] == [(weight, 4)]


def test_dense_changes_become_their_best_product(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    file = patch(tmp_path / "a.safetensors", model, {f"{LAYER[kind]}.weight": "add"})
    with pytest.warns(Finding, match="products of full rank, as the changes have it; --rank bounds it"):
        (whole,) = check(tmp_path, model, [file])
    assert whole.rank == 16 and whole.kept == pytest.approx(1, abs=1e-6)
    (part,) = export_patches([file], tmp_path / "part", rank=3).result
    change = open_checkpoint(file).read(f"{LAYER[kind]}.weight.add").view(whole_shape(model, kind)).double()
    energies = torch.linalg.svdvals(change).square()
    assert part.rank == 3 and part.kept == pytest.approx(float(energies[:3].sum() / energies.sum()), abs=1e-5)


def whole_shape(model: Any, kind: str) -> Any:
    return model.state_dict()[f"{LAYER[kind]}.weight"].shape


def test_other_changes_are_whole_with_their_modules(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    norm = "model.norm.weight" if kind == "llama" else "transformer.ln_f.weight"
    changes = {f"{LAYER[kind]}.weight": "replace", norm: "add"}
    other = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.attn.c_attn"}[kind]
    changes |= {f"{other}.bias": "add", f"{other}.weight": "low_rank"}
    file = patch(tmp_path / "a.safetensors", model, changes)
    result = check(tmp_path, model, [file], base=tmp_path / "base")
    assert {each.name: each.rank for each in result if each.name in changes} == {
        name: 2 if kind == "low_rank" else None for name, kind in changes.items()
    }
    assert f"{LAYER[kind]}.bias" in [each.name for each in result]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", "add", r"model.norm.weight \[16\], add\nGive the model .* with --base"),
        ("model.layers.1.mlp.down_proj.weight", "replace", r"down_proj.weight \[16, 24\], replace\nGive the model"),
    ],
)
def test_without_the_model_no_tensor_is_whole(tmp_path: Path, name: str, change: str, message: str) -> None:
    file = patch(tmp_path / "a.safetensors", tiny_model("llama"), {name: change})
    with pytest.raises(PlanError, match=message):
        export_patches([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_expert_alone_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "base")
    name = next(name for name in open_checkpoint(tmp_path / "base") if ".experts.1." in name)
    shape = open_checkpoint(tmp_path / "base")[name].shape
    info = PatchInfo("test", {name: TensorChange("add", shape, "float32", 1)})
    Patch(info, {f"{name}.add": torch.ones(shape)}).save(tmp_path / "a.safetensors")
    with pytest.raises(PlanError, match="one product for all experts of a layer; apply the patches instead"):
        export_patches([tmp_path / "a.safetensors"], tmp_path / "out", base=tmp_path / "base")


def test_the_command_prints_the_ranks(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = patch(tmp_path / "a.safetensors", model, {f"{LAYER['llama']}.weight": "low_rank"})
    arguments = ("patch", "export", str(file))
    data = answer(run(*arguments, "-o", str(tmp_path / "x" / "out"), "--json"))
    assert data["tensors"] == [{"name": f"{LAYER['llama']}.weight", "rank": 2, "kept": 1.0}]
    result = run(*arguments, "-o", str(tmp_path / "y" / "out"))
    assert "down_proj.weight     2  100.00%" in result.stderr and files_of(tmp_path / "x") == files_of(tmp_path / "y")


def test_an_exported_patch_is_an_adapter_among_others(tmp_path: Path) -> None:
    """After a LoRA in turn, and merged with it to one adapter: in both ways the patched model with the LoRA."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    name = f"{LAYER['llama']}.weight"
    file = patch(tmp_path / "patch.safetensors", model, {name: "low_rank"})
    export_patches([file], tmp_path / "edit")
    lora = save_lora(model, tmp_path / "lora", 1, r=2, target_modules=["down_proj", "q_proj"])
    apply_patches(tmp_path / "base", [file], tmp_path / "patched", verify=False, any_base=True)
    expected = open_model(f"{tmp_path}/patched+{lora}")
    in_turn = open_model(f"{tmp_path}/base+{lora}+{tmp_path}/edit")
    with pytest.warns(Finding, match="does not change 3 of 4 modules"):
        merge_adapters([lora, tmp_path / "edit"], tmp_path / "both", method="cat")
    at_once = open_model(f"{tmp_path}/base+{tmp_path}/both")
    for key in expected:
        for view in (in_turn, at_once):
            torch.testing.assert_close(view.read(key), expected.read(key), rtol=1e-5, atol=1e-6)
