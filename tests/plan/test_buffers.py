"""Tensors besides the parameters: statistics, counters, and what loaders compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_merges import Tensors, load_all
from safetensors.torch import save_file

from mergekit_lfm import merge
from mergekit_lfm.arch.kinds import kind_of
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.tensors import TensorSpec


def net(seed: int, steps: int) -> Tensors:
    """A convolution with batch normalisation."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=draw),
        "bn.weight": torch.randn(4, generator=draw),
        "bn.running_mean": torch.randn(4, generator=draw),
        "bn.running_var": torch.rand(4, generator=draw) + 0.1,
        "bn.num_batches_tracked": torch.tensor(steps),
    }


def merge_files(tmp_path: Path, recipe: dict[str, Any], **models: Tensors) -> Tensors:
    """The merge of these models, each a file; the one named base is the base."""
    for name, tensors in models.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    lines = [{"model": str(tmp_path / f"{name}.safetensors")} for name in models if name != "base"]
    base = {"base_model": str(tmp_path / "base.safetensors")} if "base" in models else {}
    return load_all(Path(merge({"models": lines, **base, **recipe}, tmp_path / "out")))


@pytest.mark.parametrize(
    "recipe",
    [
        {"merge_method": "task_arithmetic", "parameters": {"weight": 3.0}},
        {"merge_method": "task_arithmetic", "parameters": {"weight": -1.0}},
        {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.2}},
        {"merge_method": "dare_linear", "parameters": {"weight": 1.0, "density": 0.2}},
    ],
)
def test_statistics_are_averaged_whatever_the_method(tmp_path: Path, recipe: dict[str, Any]) -> None:
    base, a, b = net(0, 10), net(1, 300), net(2, 200)
    merged = merge_files(tmp_path, recipe, base=base, a=a, b=b)
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.equal(merged[name], ((a[name].double() + b[name].double()) / 2).float())
    assert (merged["bn.running_var"] > 0).all()
    assert merged["bn.num_batches_tracked"] == 300 and merged["bn.num_batches_tracked"].dtype == torch.int64
    assert not torch.equal(merged["conv.weight"], base["conv.weight"])


def test_weights_of_one_sign_hold_for_statistics(tmp_path: Path) -> None:
    a, b = net(1, 5), net(2, 7)
    for name, tensors in (("a", a), ("b", b)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(tmp_path / "a.safetensors"), "parameters": {"weight": 1.0}},
            {"model": str(tmp_path / "b.safetensors"), "parameters": {"weight": 3.0}},
        ],
    }
    merged = load_all(Path(merge(recipe, tmp_path / "out")))
    expected = (a["bn.running_var"].double() + 3 * b["bn.running_var"].double()) / 4
    assert torch.equal(merged["bn.running_var"], expected.float())


def test_a_counter_that_one_model_lacks(tmp_path: Path) -> None:
    a, b = net(1, 5), net(2, 7)
    del b["bn.num_batches_tracked"]
    assert merge_files(tmp_path, LINEAR, a=a, b=b)["bn.num_batches_tracked"] == 5


LINEAR = {"merge_method": "linear", "parameters": {"weight": 1.0}}


@pytest.mark.parametrize("theirs", [torch.arange(3.0).half(), torch.zeros(3), torch.arange(5)])
def test_tensors_that_loaders_compute_are_the_template_s(tmp_path: Path, theirs: torch.Tensor) -> None:
    """In another type, with other values, and of another length."""
    names = ("text.position_ids", "blocks.0.attn_mask", "rotary_emb.inv_freq", "relative_position_index")
    a = {"w": torch.ones(2), **{name: torch.arange(3) for name in names}}
    b = {"w": torch.zeros(2), **{name: theirs.clone() for name in names}}
    merged = merge_files(tmp_path, LINEAR, a=a, b=b)
    assert merged["w"].tolist() == [0.5, 0.5]
    assert all(merged[name].tolist() == [0, 1, 2] and merged[name].dtype == torch.int64 for name in names)


def test_a_mask_may_be_infinite_and_a_parameter_may_not(tmp_path: Path) -> None:
    mask = torch.full((3, 3), -torch.inf).triu(1)
    models = [{"w": torch.ones(2), "attn.masked_bias": torch.tensor(-torch.inf), "m.attn_mask": mask} for _ in "ab"]
    merged = merge_files(tmp_path, LINEAR, a=models[0], b=models[1])
    assert torch.equal(merged["m.attn_mask"], mask) and merged["attn.masked_bias"] == -torch.inf
    broken = {**models[0], "w": torch.tensor([1.0, torch.inf])}
    (tmp_path / "x").mkdir()
    with pytest.raises(FormatError, match=r"w of b.safetensors holds NaN or infinity"):
        merge_files(tmp_path / "x", LINEAR, a=models[0], b=broken)


def test_copies_are_compared_by_value(tmp_path: Path) -> None:
    """Whole numbers in other types; and the line to add where they differ."""
    ids = torch.arange(4)
    a, b = {"w": torch.ones(2), "ids": ids}, {"w": torch.ones(2), "ids": ids.to(torch.int32)}
    merged = merge_files(tmp_path, LINEAR, a=a, b=b)
    assert merged["ids"].dtype == torch.int64 and merged["ids"].tolist() == [0, 1, 2, 3]
    (tmp_path / "x").mkdir()
    with pytest.raises(PlanError, match=r"ids \[4\] int64 differs between .*choose one's with `keep: {ids: base}`"):
        merge_files(tmp_path / "x", LINEAR, a=a, b={**b, "ids": ids + 1})


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("bn1.running_var", "float32", "statistic"),
        ("running_mean", "float16", "statistic"),
        ("bn.num_batches_tracked", "int64", "counter"),
        ("bn.num_batches_tracked", "float32", "parameter"),
        ("h.0.attn.bias", "uint8", "constant"),
        ("text_model.causal_attention_mask", "float32", "constant"),
        ("layers.0.attn_mask", "float32", "constant"),
        ("sqrt_one_minus_alphas_cumprod", "float32", "constant"),
        ("layer.weight_mask", "float32", "parameter"),
        ("embeddings.mask_token", "float32", "parameter"),
        ("attn.qkv.bias", "float32", "parameter"),
    ],
)
def test_the_kind_of_a_name(name: str, dtype: str, kind: str) -> None:
    assert kind_of(TensorSpec(name, (4,), dtype)) == kind
