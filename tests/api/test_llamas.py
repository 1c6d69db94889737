"""Tiny Llamas that were trained separately: the worth of aligning them, by the script, the benchmark and the recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_commands import run

from mergekit_lfm import merge
from mergekit_lfm.judge.evaluate import perplexity

script = pytest.importorskip("recipes.make.llamas")
benchmark = pytest.importorskip("benchmarks.llama_alignment")

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1) if "LONG_TESTS" in os.environ else (0,)
STEPS = 300  # of the script's 1,500; with fewer steps there is hardly a barrier
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(made_once: Callable[..., Path]) -> list[Path]:
    """Pairs, in folders as the script makes them."""

    def make(root: Path) -> None:
        torch.set_num_threads(1)
        for seed in SEEDS:
            script.make_llamas(root / str(seed) / "llamas", seed=seed, steps=STEPS)

    root = made_once("llamas", make)
    return [root / str(seed) / "llamas" for seed in SEEDS]


def test_rotations_leave_less_than_six_tenths_of_the_barrier_of_permutations(pairs: list[Path]) -> None:
    found = benchmark.heights([benchmark.lines(folder, points=3) for folder in pairs])
    mean = {label: sum(values) / len(values) for label, values in found.items()}
    assert mean[benchmark.NAIVE] > mean["permutations, by weights"] > 0.5
    permutations = min(mean[f"permutations, by {what}"] for what in ("weights", "activations"))
    for what in ("weights", "activations"):
        assert mean[f"rotations, by {what}"] <= 0.6 * permutations


def test_the_recipe_and_its_commands_make_the_average_better(
    pairs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = pairs[0].parent
    monkeypatch.chdir(root)
    shutil.copy(ROOT / "recipes" / "llamas_aligned.yaml", root)
    arguments = [
        "llamas/a",
        "llamas/b",
        "--data",
        "llamas/sample.txt",
        "--task",
        "lm",
        "-o",
        "llamas/ab.cross.safetensors",
    ]
    assert run("stats", "cross", *arguments, "-q", "--overwrite").exit_code == 0
    aligned = Path(merge("llamas_aligned.yaml", "aligned"))
    plain = {"merge_method": "linear", "models": [{"model": "llamas/a"}, {"model": "llamas/b"}]}
    naive = Path(merge({**plain, "parameters": {"weight": 1}}, "naive"))
    text = (root / "llamas" / "held_out.txt").read_text("utf-8")[:8000]
    losses = {folder.name: perplexity(folder, text).bits_per_byte for folder in (aligned, naive, root / "llamas" / "a")}
    assert losses["a"] < losses["aligned"] < losses["naive"] - 0.5
