"""Transforms applied to tensors: the algebra by hand, streaming against memory, and the transform file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fixtures_llama import base_tensors, cast, save
from safetensors.torch import load_file, save_file

from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.arch import Heads, Units, find_symmetries, read_table
from mergekit_lfm.arch.table import check_fit
from mergekit_lfm.artifacts.transform import HeadsElement, Transform, TransformInfo, UnitsElement, open_transform
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.store.tensors import read_header
from mergekit_lfm.views.rewritten import Rewritten, rewrite

FACTS = TransformInfo("by hand")


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}


@pytest.fixture
def llama(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save(tmp_path / "llama", base_tensors()))


def test_units_by_hand() -> None:
    table = read_table("up ffn input\ngate ffn:order input\ndown class ffn'", {"ffn": Units(2, "nonzero")}, ())
    old = {
        "up": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "gate": torch.tensor([[5.0], [6.0]]),
        "down": torch.tensor([[7.0, 8.0]]),
    }
    swapped = UnitsElement(torch.tensor([1, 0]), torch.tensor([2.0, -4.0], dtype=torch.float64))
    new = rewrite(old, Transform(table, {"ffn": swapped}, FACTS))
    assert new["up"].tolist() == [[6.0, 8.0], [-4.0, -8.0]]
    assert new["gate"].tolist() == [[6.0], [5.0]]
    assert new["down"].tolist() == [[4.0, -1.75]]


def test_heads_by_hand() -> None:
    groups = {"heads": Heads(2, 2, 1, "linear")}
    table = read_table("q heads:query\nk heads:key\nv heads:value\no class heads:output", groups, ())
    old = {
        "q": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "k": torch.tensor([5.0, 6.0]),
        "v": torch.tensor([7.0, 8.0]),
        "o": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
    }
    matrices = torch.tensor([[[2.0]], [[4.0]]], dtype=torch.float64)
    element = HeadsElement(torch.tensor([1, 0]), torch.tensor([[1, 0], [0, 1]]), matrices, -matrices)
    new = rewrite(old, Transform(table, {"heads": element}, FACTS))
    assert new["q"].tolist() == [2.0, 1.5, 0.25, 0.5]  # group 1's heads, swapped, over 2; group 0's over 4
    assert new["k"].tolist() == [12.0, 20.0]
    assert new["v"].tolist() == [-16.0, -28.0]
    assert new["o"].tolist() == [[-2.0, -1.5, -0.25, -0.5]]


def test_parts_and_entries_that_lie_in_a_row() -> None:
    groups = {"a": Units(2), "b": Units(1)}
    table = read_table("fused a|b\nflat class a'", groups, ())
    swap = Transform(table, {"a": UnitsElement(torch.tensor([1, 0]))}, FACTS)
    old = {"fused": torch.tensor([1, 2, 3]), "flat": torch.arange(6.0)[None]}
    new = rewrite(old, swap)
    assert new["fused"].tolist() == [2, 1, 3] and new["fused"].dtype == torch.int64
    assert new["flat"].tolist() == [[3.0, 4.0, 5.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_order_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = open_checkpoint(save(tmp_path / "m", cast(base_tensors(), dtype)))
    old = tensors_of(model)
    old["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    new = rewrite(old, random_transform(old, find_symmetries(model), seed=1, kinds=["order"]))
    for name, x in old.items():
        bits = [t.view(torch.int16 if dtype.itemsize == 2 else torch.int32).flatten() for t in (x, new[name])]
        assert torch.equal(bits[0].sort()[0], bits[1].sort()[0])
        assert name.endswith("_norm.weight") or not torch.equal(*bits)


@pytest.mark.parametrize("panel, narrow", [(1 << 18, 1024), (512, 1024), (700, 16), (100, 3)])
def test_any_range_read_in_any_thread_is_part_of_the_whole(llama: Checkpoint, panel: int, narrow: int) -> None:
    """Panels, blocks of rows and whole tensors agree, and so do ranges, to the bit."""
    old = tensors_of(llama)
    transform = random_transform(old, find_symmetries(llama), seed=2)
    plain = rewrite(old, transform)
    view = Rewritten(llama, transform, {"transform": "x"}, panel=panel, narrow=narrow)
    whole = rewrite(old, transform, panel=panel, narrow=narrow)
    with ThreadPoolExecutor(2) as pool:
        for name, spec in view.items():
            assert torch.allclose(whole[name], plain[name], rtol=1e-6, atol=1e-7)
            starts = range(0, spec.numel, 97 if spec.numel < 5000 else 1999)
            parts = pool.map(lambda i, name=name, n=starts.step: view.read(name, i, i + n), starts)
            assert torch.equal(torch.cat(list(parts)), whole[name].flatten())


def test_a_view_has_an_identity_and_a_content_of_its_own(llama: Checkpoint, tmp_path: Path) -> None:
    old = tensors_of(llama)
    transform = random_transform(old, find_symmetries(llama), seed=2, kinds=["order"])
    view = Rewritten(llama, transform, {"transform": "x"})
    assert view.identity[1:] == llama.identity and view.digest != llama.digest
    saved = open_checkpoint(save(tmp_path / "saved", rewrite(old, transform)))
    assert view.content == saved.content != llama.content


def test_the_file_holds_all_of_a_transform(llama: Checkpoint, tmp_path: Path) -> None:
    old = tensors_of(llama)
    transform = random_transform(old, find_symmetries(llama), seed=3)
    transform.save(tmp_path / "t.safetensors")
    again = open_transform(tmp_path / "t.safetensors")
    assert again.symmetries == transform.symmetries
    assert again.info == transform.info
    new, same = rewrite(old, transform), rewrite(old, again)
    assert all(torch.equal(new[name], same[name]) for name in old)
    transform.save(tmp_path / "u.safetensors")
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "u.safetensors").read_bytes()
    assert "order/ffn.0" in load_file(tmp_path / "t.safetensors")  # the official reader opens it


@pytest.mark.parametrize(
    "part, value",
    [
        ("order/ffn.0", torch.zeros(96, dtype=torch.int64)),
        ("order/ffn.0", torch.arange(95)),
        ("scale/ffn.0", torch.zeros(96, dtype=torch.float64)),
        ("groups/heads.0", torch.tensor([0, 2])),
        ("queries/heads.0", torch.tensor([[0, 0], [0, 1]])),
        ("value_output/heads.0", torch.full((2, 16, 16), torch.inf, dtype=torch.float64)),
    ],
)
def test_a_transform_that_fits_no_group_is_refused(
    llama: Checkpoint, tmp_path: Path, part: str, value: torch.Tensor
) -> None:
    file = tmp_path / "t.safetensors"
    old = tensors_of(llama)
    random_transform(old, find_symmetries(llama), seed=3, kinds=("order", "scale", "inside")).save(file)
    damaged = tmp_path / "damaged.safetensors"
    save_file({**load_file(file), part: value}, damaged, read_header(file).metadata)
    with pytest.raises(FormatError, match=f"{part.split('/')[0]} of {part.split('/')[1]} does not fit"):
        open_transform(damaged)


def test_other_files_are_not_transforms(llama: Checkpoint, tmp_path: Path):
    with pytest.raises(FormatError, match="is not a transform file; make one with `mergekit-lfm align`"):
        open_transform(llama.files[0].path)
    with pytest.raises(FileNotFoundError, match="no such transform file"):
        open_transform(tmp_path / "absent")


def test_one_message_lists_all_that_does_not_fit_a_table(llama: Checkpoint):
    table = find_symmetries(llama)
    specs = dict(llama)
    specs["extra"] = specs["model.norm.weight"]
    specs["model.norm.weight"] = specs["lm_head.weight"]
    del specs["lm_head.weight"]
    with pytest.raises(PlanError) as refused:
        check_fit(table, specs, "the model")
    text = str(refused.value)
    assert "is not in the table" in text
    assert "lm_head.weight is in the table, but missing" in text
    assert "has 2 axes, the table names 1" in text


def test_messages_name_entries_that_a_table_does_not_know():
    with pytest.raises(PlanError, match="'resdual' is neither a group nor a free axis"):
        read_table("w resdual", {"residual": Units(2)}, ())
    with pytest.raises(PlanError, match="'ffn:query' has an unknown view"):
        read_table("w ffn:query", {"ffn": Units(2)}, ())
