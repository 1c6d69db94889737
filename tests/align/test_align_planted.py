"""Models that were rewritten into equivalents are brought back: permutations exactly, rotations to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_align import (
    convolutions,
    furthest,
    loaded,
    mlp,
    mlp_table,
    planted,
    table,
    tensors_of,
)

from mergekit_lfm.align.find import find_transform
from mergekit_lfm.arch import Heads
from mergekit_lfm.views.rewritten import rewrite

WIDTHS = (7, 12, 9, 10, 4)
NETWORKS = {
    "gpt2": {},
    "bert": {},
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "resnet": {},
}


@pytest.mark.parametrize("seed", range(3))
def test_permutations_of_an_mlp_are_recovered_exactly(seed: int) -> None:
    original, symmetries = mlp(WIDTHS, seed, dtype=torch.float32), mlp_table(WIDTHS)
    moved = rewrite(original, planted(original, symmetries, seed))
    assert not torch.equal(moved["1.weight"], original["1.weight"])
    found = rewrite(moved, find_transform(moved, original, symmetries=symmetries))
    assert all(torch.equal(found[name], x) for name, x in original.items())


def test_permutations_of_convolutions_are_recovered_exactly() -> None:
    model, symmetries = convolutions(0)
    original = model.state_dict()
    moved = rewrite(original, planted(original, symmetries, 1))
    found = rewrite(moved, find_transform(moved, original, symmetries=symmetries, restarts=1))
    assert not torch.equal(moved["head.weight"], original["head.weight"])
    assert all(torch.equal(found[name], x) for name, x in original.items())


@pytest.mark.parametrize(("kind", "options"), NETWORKS.items())
def test_permutations_of_networks_are_recovered_exactly(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = loaded(kind, 0, tmp_path, **options)
    original, symmetries = tensors_of(checkpoint), table(checkpoint)
    plant = planted(original, symmetries, 1)
    moved = rewrite(original, plant)
    transform = find_transform(moved, checkpoint, symmetries=symmetries, restarts=1)
    found = rewrite(moved, transform)
    assert furthest(moved, original) > 0.1
    assert all(torch.equal(found[name], x) for name, x in original.items())
    assert transform.elements.keys() == plant.elements.keys()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_rotations_are_recovered(
    kind: str, options: dict[str, Any], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    checkpoint = loaded(kind, 0, tmp_path, dtype, **options)
    original, symmetries = tensors_of(checkpoint), table(checkpoint)
    moved = rewrite(original, planted(original, symmetries, 2, rotate=True))
    transform = find_transform(moved, original, "rotation", symmetries=symmetries, restarts=1)
    assert furthest(moved, original) > 0.5
    assert furthest(rewrite(moved, transform), original) < tolerance
    assert transform.info.exact


def test_permutations_do_not_recover_rotations(tmp_path: Path) -> None:
    checkpoint = loaded("llama", 0, tmp_path)
    original, symmetries = tensors_of(checkpoint), table(checkpoint)
    moved = rewrite(original, planted(original, symmetries, 2, rotate=True))
    found = rewrite(moved, find_transform(moved, original, symmetries=symmetries))
    assert furthest(found, original) > 0.5


def test_planted_transforms_move_every_part_of_a_group(tmp_path: Path) -> None:
    checkpoint = loaded("llama", 0, tmp_path)
    symmetries = table(checkpoint)
    plant = planted(tensors_of(checkpoint), symmetries, 2, rotate=True)
    heads = [name for name, group in symmetries.groups.items() if isinstance(group, Heads)]
    assert all(part is not None for name in heads for part in vars(plant.elements[name]).values())
    assert plant.elements.keys() == symmetries.groups.keys()
