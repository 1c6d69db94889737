"""The distance of two models' outputs, on inputs that are made for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import bert_config, llama_config, save_model, transformers
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_lfm.arch import Symmetries, Units, find_symmetries
from mergekit_lfm.arch.table import read_axis
from mergekit_lfm.artifacts.transform import Transform, TransformInfo, UnitsElement
from mergekit_lfm.judge.same import compare_outputs
from mergekit_lfm.runtime.batches import Batch
from mergekit_lfm.runtime.load import Loaded, load_model
from mergekit_lfm.runtime.probe import difference, outputs_of, probe
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.rewritten import Rewritten

IMAGES: dict[str, Any] = {
    "ViT": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    | {"image_size": 8, "patch_size": 4, "num_channels": 1},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


def made(folder: Path, kind: str) -> Loaded:
    """A random model of the kind, loaded."""
    if kind in IMAGES:
        config = getattr(transformers, f"{kind}Config")(**IMAGES[kind])
        return load_model(save_model(folder, f"{kind}ForImageClassification", config), "classification")
    if kind == "llama":
        return load_model(save_model(folder, "LlamaForCausalLM", llama_config()), "lm")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=90, n_embd=16, n_layer=1, n_head=2, n_positions=9, bos_token_id=0, eos_token_id=1
        )
        return load_model(save_model(folder, "GPT2LMHeadModel", config), "lm")
    if kind == "roberta":
        config = transformers.RobertaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
        config.max_position_embeddings = 12
        return load_model(save_model(folder, "RobertaModel", config), "embedding")
    return load_model(save_model(folder, "BertForSequenceClassification", bert_config()), "classification")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta", "bert", *IMAGES])
def test_a_probe_fits_the_model_and_differs_by_seed(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    inputs, again, other = (probe(model, seed) for seed in (0, 0, 1))
    assert len(outputs_of(model, inputs)) == len(inputs) == 4
    assert all(torch.equal(x, again.kwargs[name]) for name, x in inputs.kwargs.items())
    assert not any(torch.equal(x, other.kwargs[name]) for name, x in inputs.kwargs.items())
    assert difference(model, model, inputs) == 0


def test_the_difference_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    one, other = (nn.Linear(3, 5) for _ in range(2))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        one.bias.add_(1e6)  # says nothing about the inputs
        other.bias.copy_(one.bias)
        other.bias[2] += 0.5
    one, other = one.double(), other.double()
    x = torch.randn(7, 3, dtype=torch.float64)
    batch = Batch(tuple(range(7)), (x,))
    with torch.no_grad():
        y = one(x)
        expected = float((y - other(x)).abs().max() / (y - y.mean(0)).abs().max())
    assert difference(one, other, batch) == pytest.approx(expected)
    assert 0.05 < expected < 5


def test_outputs_that_cannot_be_compared_are_infinitely_far_apart() -> None:
    batch = Batch((0, 1), (torch.ones(2, 3),))
    torch.manual_seed(0)
    one, other = nn.Linear(3, 5), nn.Linear(3, 5)  # all inputs are equal: they measure nothing
    assert difference(one, other, batch) == math.inf
    assert difference(one, nn.Linear(3, 4), batch) == math.inf
    varied = Batch((0, 1), (torch.randn(2, 3),))
    with torch.no_grad():
        other.weight[0, 0] = math.nan
    assert difference(one, other, varied) == math.inf
    assert difference(other, one, varied) == math.inf


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta", "bert", *IMAGES])
def test_a_view_of_a_checkpoint_loads_as_its_folder_does(kind: str, tmp_path: Path) -> None:
    """Through the names on the disk, which for some models differ from those of the modules."""
    by_folder = made(tmp_path, kind)
    by_view = load_model(open_checkpoint(tmp_path), by_folder.task)
    assert type(by_view.model) is type(by_folder.model)
    for name, x in by_folder.model.state_dict().items():
        assert torch.equal(x, by_view.model.state_dict()[name]), name
    assert difference(by_folder, by_view, probe(by_folder)) == 0


def test_a_rewritten_llama_is_the_same_function_and_a_negative_control_is_not(tmp_path: Path) -> None:
    model = made(tmp_path / "a", "llama")
    checkpoint = model.checkpoint
    symmetries = find_symmetries(checkpoint)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

    def loaded(element: UnitsElement) -> Loaded:
        transform = Transform(symmetries, {"ffn.0": element}, TransformInfo("planted"))
        return load_model(Rewritten(checkpoint, transform, {"planted": 1}), "lm")

    inputs = probe(model)
    assert 0 < difference(model, loaded(UnitsElement(order=order)), inputs) < 1e-5
    wrong = UnitsElement(matrix=torch.eye(24, dtype=torch.float64)[order], dual=torch.eye(24, dtype=torch.float64))
    assert difference(model, loaded(wrong), inputs) > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_are_compared_up_to_rounding(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(tmp_path / "a", kind)
    model.model.to(dtype).save_pretrained(tmp_path / "a")  # type: ignore[operator]
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    groups = {"hidden": Units(7, "nonzero")}
    idle = Symmetries(
        groups, {name: tuple(read_axis("kernel", groups) for _ in x.shape) for name, x in tensors.items()}
    )
    still = Transform(idle, {"hidden": UnitsElement(order=torch.arange(7))}, TransformInfo("still"))
    scaled = Transform(idle, {"hidden": UnitsElement(scale=torch.ones(7))}, TransformInfo("scaled"))
    copied = tmp_path / "b"
    copied.mkdir()
    for file in (tmp_path / "a").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert compare_outputs(tmp_path / "a", copied, still) == (0, 1e-4)
    same, rough = compare_outputs(tmp_path / "a", copied, scaled)
    assert same == 0 and (rough == 1e-4 if dtype == torch.float32 else 1e-3 < rough < 1)
    for name, x in tensors.items():
        torch.manual_seed(len(name))
        noise = torch.finfo(dtype).eps * (torch.rand(x.shape) - 0.5)
        tensors[name] = (x.float() * (1 + noise)).to(dtype)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert 0 < compare_outputs(tmp_path / "a", copied, scaled)[0] < rough
    save_file({name: x.flip(0) for name, x in tensors.items()}, copied / "model.safetensors", {"format": "pt"})
    assert compare_outputs(tmp_path / "a", copied, scaled)[0] > rough
