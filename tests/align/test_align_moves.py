"""Transforms that only move entries: permutations within heads are exact gathers, and are recognised as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_align import Tensors, loaded, planted, rewritten_model, table, tensors_of

from mergekit_lfm.align.find import find_transform
from mergekit_lfm.arch import Heads, read_table
from mergekit_lfm.artifacts.transform import HeadsElement, Transform, TransformInfo
from mergekit_lfm.commands.show.transforms import alignment_text, transform_data
from mergekit_lfm.judge.same import SAME_WITHIN, compare_outputs
from mergekit_lfm.views.maps import only_moves
from mergekit_lfm.views.rewritten import rewrite

pytest.importorskip("transformers")

FACTS = TransformInfo("by hand")


def heads(per_group: int, seed: int) -> tuple[Tensors, HeadsElement, Transform]:
    """Attention of 3 groups of heads, 4 wide, and permutations of all that can be permuted."""
    group = Heads(3, per_group, 4, "linear")
    text = "q heads:query input\nk heads:key input\nv heads:value input\no class heads:output"
    symmetries = read_table(text, {"heads": group}, ())
    draw = torch.Generator().manual_seed(seed)
    wide, narrow = group.size("query"), group.size("key")
    shapes = {"q": (wide, 5), "k": (narrow, 5), "v": (narrow, 5), "o": (5, wide)}
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    one = torch.eye(4, dtype=torch.float64)

    def orders(count: int, size: int) -> torch.Tensor:
        return torch.stack([torch.randperm(size, generator=draw) for _ in range(count)])

    element = HeadsElement(orders(1, 3)[0], orders(3, per_group), one[orders(3, 4)], one[orders(3, 4)])
    return tensors, element, Transform(symmetries, {"heads": element}, FACTS)


def attention(tensors: Tensors, per_group: int) -> torch.Tensor:
    """q, k, v and o on fixed inputs [6, 5], in float64."""
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (x @ tensors[name].double().T for name in "qkv")
    q, k, v = (y.view(6, -1, 4).movedim(1, 0) for y in (q, k, v))
    k, v = (y.repeat_interleave(per_group, 0) for y in (k, v))
    read = (q @ k.mT).softmax(-1) @ v
    return read.movedim(0, 1).flatten(1) @ tensors["o"].double().T


@pytest.mark.parametrize("per_group", [1, 2])
@pytest.mark.parametrize("part", ["query_key", "value_output", "both"])
def test_permutations_within_heads_are_those_of_their_matrices(per_group: int, part: str) -> None:
    tensors, element, transform = heads(per_group, 1)
    left = {"query_key": "value_output", "value_output": "query_key"}.get(part)
    if left:
        element = replace(element, **{left: None})
    transform = replace(transform, elements={"heads": element})
    assert only_moves(transform)
    moved = rewrite(tensors, transform)
    torch.testing.assert_close(attention(moved, per_group), attention(tensors, per_group), rtol=1e-12, atol=1e-12)
    # matrices that differ from a permutation by one bit take the products
    near = {
        name: x * (1 + 1e-15) if name in ("query_key", "value_output") and x is not None else x
        for name, x in vars(element).items()
    }
    other = replace(transform, elements={"heads": HeadsElement(**near)})
    assert not only_moves(other) and not only_moves(other, "heads")
    for name, x in rewrite(tensors, other).items():
        torch.testing.assert_close(x, moved[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_they_keep_every_bit(dtype: torch.dtype) -> None:
    tensors, _, transform = heads(2, 2)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    for x in tensors.values():
        x.flatten()[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for name, x in rewrite(tensors, transform).items():
        assert torch.equal(x.view(bits).flatten().sort()[0], tensors[name].view(bits).flatten().sort()[0])
        assert not torch.equal(x.view(bits), tensors[name].view(bits))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),  # 0 and 1, and invertible
        torch.diag(torch.tensor([1.0, 1, 1, -1])),
        torch.eye(4) + torch.diag(torch.tensor([0.5, 0, 0]), 1),
        2 * torch.eye(4),
    ],
)
def test_other_matrices_are_not_taken_for_permutations(wrong: torch.Tensor) -> None:
    _, element, transform = heads(1, 3)
    assert element.value_output is not None
    mixed = replace(element, value_output=torch.stack([*element.value_output[:2], wrong.double()]))
    keys = replace(mixed, value_output=None, query_key=mixed.value_output)
    assert not only_moves(replace(transform, elements={"heads": mixed}))
    assert not only_moves(replace(transform, elements={"heads": keys}))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_weight_matching_only_moves(kind: str, tmp_path: Path) -> None:
    a, b = (loaded(kind, seed, tmp_path / str(seed)) for seed in range(2))
    transform = find_transform(b, a, restarts=1, sweeps=2)
    inside = [element for element in transform.elements.values() if getattr(element, "value_output", None) is not None]
    assert inside and only_moves(transform)
    moved = rewritten_model(b, rewrite(tensors_of(b), transform), tmp_path / "moved")
    found, tolerance = compare_outputs(b.path, moved.path, transform)
    assert tolerance == SAME_WITHIN and found < tolerance
    assert " mixed" not in alignment_text(transform_data(transform), "t")


def test_rotations_mix(tmp_path: Path) -> None:
    a, b = (loaded("llama", seed, tmp_path / str(seed)) for seed in range(2))
    transform = find_transform(b, a, "rotation", sweeps=1)
    assert not only_moves(transform)
    assert transform_data(transform)["mixed"] == 3  # the residual and the heads of two layers; not the inner units
    assert alignment_text(transform_data(transform), "t").endswith("stand elsewhere, 3 groups mixed")


def test_query_heads_count_as_moved(tmp_path: Path) -> None:
    a = loaded("llama", 0, tmp_path)  # 2 groups of 2 query heads
    swapped = torch.tensor([[1, 0], [0, 1]])
    cases: list[tuple[dict[str, Any], int]] = [
        ({"queries": swapped}, 2),
        ({"groups": torch.tensor([1, 0])}, 4),
        ({"groups": torch.tensor([1, 0]), "queries": swapped}, 4),
        ({"value_output": torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)}, 0),
    ]
    for parts, expected in cases:
        transform = Transform(table(a), {"heads.0": HeadsElement(**parts)}, FACTS)
        told = transform_data(transform)
        assert told["groups"]["heads.0"] == {"kind": "heads", "size": 32, "moved": expected, "acts": list(parts)}
        assert told["groups"]["heads.1"]["moved"] == told["mixed"] == 0
    every = planted(tensors_of(a), table(a), 1)
    assert transform_data(every)["mixed"] == 0
