"""The checkpoint tensor of each parameter: by name, through prefixes, by content, and never by name alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_collect import OutOfSight, Tied, arrays, image_model, mlp, texts, transformer
from safetensors.torch import save_file, save_model
from torch import nn

from mergekit_lfm.collect.run import collect
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.locate import locate_tensors
from mergekit_lfm.store.checkpoint import open_checkpoint


def saved(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """The folder to which transformers saves the model, in a dtype."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)  # type: ignore[operator]
    return folder


def layer_names(model: nn.Module, data: Any, out: Path, **options: Any) -> tuple[set[str], dict[str, str]]:
    stats = collect("gram", model, data, out, **options)
    for layer in stats.info.layers.values():
        assert layer.inputs + 1 == len(stats.read(layer.entry))
    return set(stats.info.layers), stats.info.skipped


def test_a_module_has_the_digest_of_its_saved_state(tmp_path: Path) -> None:
    model = OutOfSight().bfloat16()
    model.register_buffer("steps", torch.tensor(3))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    stats = collect("gram", model, arrays(6)([3]), tmp_path / "gram")
    assert stats.info.models == (open_checkpoint(tmp_path / "model.safetensors").content,)
    given = collect("gram", model, arrays(6)([3]), tmp_path / "given", checkpoint=tmp_path / "model.safetensors")
    assert given.info == stats.info


def test_a_folder_is_loaded_under_the_names_of_its_files(tmp_path: Path) -> None:
    folder = saved(transformer("llama"), tmp_path / "llama")
    stats = collect("gram", folder, texts(6)([2]), tmp_path / "gram", task="lm")
    assert stats.info.models == (open_checkpoint(folder).content,)
    weights = {layer.weight for layer in stats.info.layers.values()}
    assert weights == {name for name, spec in open_checkpoint(folder).items() if len(spec.shape) == 2} - {
        "model.embed_tokens.weight"
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_prefix_that_the_model_does_not_have(dtype: torch.dtype, tmp_path: Path) -> None:
    """A BertModel from a classifier's checkpoint, as transformers loads it; loaded wider than it was saved."""
    import transformers

    folder = saved(transformer("bert"), tmp_path / "bert", dtype)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float64)
    names, skipped = layer_names(model, texts(6)([2]), tmp_path / "gram", checkpoint=folder)
    assert "bert.encoder.layer.0.attention.self.query" in names
    assert "bert.pooler.dense" in names
    assert skipped == {}
    fisher = collect(
        "fisher", model, texts(6)([2]), tmp_path / "fisher", checkpoint=folder, task="embedding", labels="sampled"
    )
    assert all(name.startswith("fisher/bert.") for name in fisher.tensors)
    assert fisher.info.skipped.keys() == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_a_prefix_that_the_checkpoint_does_not_have(tmp_path: Path) -> None:
    """A classifier whose body was loaded from a bare encoder: its head has no tensor there."""
    model = transformer("bert")
    folder = saved(model.bert, tmp_path / "encoder")  # type: ignore[arg-type]
    names, skipped = layer_names(model, texts(6)([2]), tmp_path / "gram", checkpoint=folder)
    assert "encoder.layer.0.attention.self.query" in names
    assert skipped == {"classifier": "the checkpoint has no tensor of its own for it"}


def test_the_model_is_loaded_narrower_than_it_was_saved(tmp_path: Path) -> None:
    folder = saved(transformer("bert"), tmp_path / "bert", torch.float32)
    model = transformer("bert").float().bfloat16()
    names, _ = layer_names(model, texts(6)([2]), tmp_path / "gram", checkpoint=folder)
    assert len(names) == 2 * 6 + 2


def test_other_names_are_found_by_content(tmp_path: Path) -> None:
    model = mlp(6, 5, 3)
    tensors = {f"net.layer_{name}": x for name, x in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    names, skipped = layer_names(model, arrays(6)([3]), tmp_path / "gram", checkpoint=tmp_path / "model.safetensors")
    assert names == {"net.layer_0", "net.layer_2"}
    assert skipped == {}


def test_content_that_is_not_unique_proves_nothing(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.copy_(model[0].weight)
    tensors = {f"x{i}": x for i, x in enumerate(model.state_dict().values())}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="no linear layer in the model"):
        collect("gram", model, arrays(4)([3]), tmp_path / "gram", checkpoint=tmp_path / "model.safetensors")
    stats = collect(
        "fisher", model.double(), arrays(4)([3]), tmp_path / "fisher", checkpoint=tmp_path / "model.safetensors"
    )
    several = "several tensors of the checkpoint hold the same values"
    assert stats.info.skipped == {"0.weight": several, "1.weight": several}
    assert stats.tensors.keys() == {"fisher/x1", "fisher/x3"}


@pytest.mark.parametrize("kind", ["vit", "dinov2", "beit"])
def test_renamed_layers_are_found_though_values_repeat(kind: str, tmp_path: Path) -> None:
    """A fresh model has equal biases and norms; in the same model with random numbers, values identify all."""
    fresh, random = image_model(kind), image_model(kind)
    with torch.no_grad():
        for parameter in random.parameters():
            parameter.normal_()
    folders = [saved(model, tmp_path / name) for model, name in ((fresh, "fresh"), (random, "random"))]
    expected, _ = locate_tensors(random, open_checkpoint(folders[1]))
    assert sorted(expected.values()) == sorted(open_checkpoint(folders[1]))
    assert locate_tensors(fresh, open_checkpoint(folders[0])) == (expected, frozenset())
    names, skipped = layer_names(fresh, arrays(1, 8, 8)([2]), tmp_path / "gram", checkpoint=folders[0])
    assert len(names) == 2 * 6 + 1
    assert all(reason == "not the weight of a Linear layer" for reason in skipped.values())


def test_a_lone_equal_tensor_of_another_name_proves_nothing(tmp_path: Path) -> None:
    """The bias of a new head is 0, and another tensor may be, too: only values that vary identify a tensor."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    nn.init.zeros_(model[1].bias)
    tensors = {"a.weight": model[0].weight, "a.bias": model[0].bias, "means": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    expected = {"0.weight": "a.weight", "0.bias": "a.bias"}
    assert locate_tensors(model, open_checkpoint(tmp_path / "model.safetensors")) == (expected, frozenset())


def test_a_model_trained_since_it_was_loaded_is_refused(tmp_path: Path) -> None:
    model: Any = mlp(6, 5, 3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        model[0].bias[1] += 1
        model[2].weight[0, 0] += 1
    with pytest.raises(FormatError) as raised:
        collect("gram", model, arrays(6)([3]), tmp_path / "gram", checkpoint=tmp_path / "model.safetensors")
    lines = str(raised.value).splitlines()
    assert "is not the checkpoint of this model" in lines[0]
    assert lines[1:3] == ["  0.bias: differs from 0.bias", "  2.weight: differs from 2.weight"]
    assert "changed since it was loaded? Save it" in lines[3]
    assert not (tmp_path / "gram").exists()


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="none of its tensors is a parameter of the model"):
        collect("gram", mlp(6, 3), arrays(6)([3]), tmp_path / "gram", checkpoint=tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", ["gpt2", "module"])
def test_a_tied_head_is_left_to_the_embedding(kind: str, tmp_path: Path) -> None:
    if kind == "gpt2":
        model = transformer("gpt2")
        place = saved(model, tmp_path / "gpt2")
        head, table = "lm_head", "transformer.wte.weight"
    else:
        model, place = Tied().double(), tmp_path / "model.safetensors"
        save_model(model, str(place))
        head, table = "head", "embed.weight"
    names, skipped = layer_names(model, texts(6)([2]), tmp_path / "gram", checkpoint=place, task="lm")
    assert head not in names
    assert skipped == {head: "another module uses its weight too (tied weights)"}
    stats = collect("fisher", model, texts(6)([2]), tmp_path / "fisher", checkpoint=place, task="lm")
    stored = open_checkpoint(place)
    assert {name.removeprefix("fisher/") for name in stats.tensors} == set(stored)
    assert table in stored or "head.weight" in stored


def test_cross_moments_are_named_by_the_checkpoints(tmp_path: Path) -> None:
    import transformers

    folder = saved(transformer("bert"), tmp_path / "bert")
    body = transformers.BertModel.from_pretrained(folder, dtype=torch.float64)
    whole = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    stats = collect(
        "cross",
        body,
        texts(6)([2]),
        tmp_path / "cross",
        other=whole,
        checkpoint=folder,
        other_checkpoint=folder,
        layers=["bert."],
    )
    assert len(stats.info.layers) == 2 * 6 + 1
    assert stats.info.models[0] == stats.info.models[1]


def test_a_computed_weight_is_not_a_tensor_of_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2))
    names, skipped = layer_names(model, [torch.ones(3, 6)], tmp_path / "gram")
    assert names == {"1"}
    assert skipped == {"0": "its weight is computed from other parameters"}
