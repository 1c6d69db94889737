"""The contract of every aligner: outputs stay the same, files hold everything, equal inputs give equal files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_align import furthest, loaded, tensors_of, texts
from torch import Tensor

from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.align.find import find_transform
from mergekit_lfm.arch import Units
from mergekit_lfm.artifacts.transform import Transform, open_transform
from mergekit_lfm.collect.run import collect
from mergekit_lfm.recipe.registry import ALIGN_METHODS
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.rewritten import rewrite

transformers = pytest.importorskip("transformers")

KINDS = ("llama", "qwen3")


class Two:
    """Two independent models of a kind, in float64, and their cross moments."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = folder
        self.a, self.b = (loaded(kind, seed, folder / str(seed), torch.float64) for seed in range(2))
        self.statistics = collect(
            "cross", self.a.path, texts(), folder / "cross", other=self.b.path, task="lm", dtype="float64"
        ).path

        self.plain: dict[tuple[str, bool], Transform] = {}

    def found(self, method: str, with_statistics: bool = False) -> Transform:
        """`aligned` without further options, computed once for all tests that look at it."""
        if (method, with_statistics) not in self.plain:
            given = {"statistics": self.statistics} if with_statistics else {}
            self.plain[method, with_statistics] = self.aligned(method, **given)
        return self.plain[method, with_statistics]

    def aligned(self, method: str, **given: Any) -> Transform:
        if ALIGN_METHODS[method].statistics == "required":
            given["statistics"] = self.statistics
        if method in ("weight_matching", "rotation") and "statistics" not in given:
            given = {"restarts": 2, "sweeps": 4, **given}
        return find_transform(self.b, self.a, method, **given)


@pytest.fixture(scope="module", params=KINDS)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(request.param, tmp_path_factory.mktemp(request.param))


def outputs(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Tensor:
    """The logits of a model with these tensors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)
    model.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        logits: Tensor = model(**texts(count=1)[0]).logits
    return logits


def variants() -> list[tuple[str, bool]]:
    """The methods, with statistics if they accept them and without if they do not require them."""
    return [
        (name, with_statistics)
        for name, method in ALIGN_METHODS.items()
        for with_statistics in (False, True)
        if method.statistics in ("optional", "required" if with_statistics else "no")
    ]


@pytest.mark.parametrize(("method", "with_statistics"), variants())
def test_outputs_stay_where_it_is_exact(two: Two, method: str, with_statistics: bool) -> None:
    transform = two.found(method, with_statistics)
    before, moved = tensors_of(two.b), rewrite(tensors_of(two.b), transform)
    expected, found = outputs(two.b, before), outputs(two.b, moved)
    difference = float((found - expected).abs().max() / (expected - expected.mean()).abs().max())
    assert furthest(moved, before) > 0.1
    assert transform.info.exact
    assert difference < 1e-5  # a part of these models always computes in float32


def test_outputs_change_where_it_is_soft(two: Two) -> None:
    transform = two.aligned("ot", regularisation=0.05)
    expected, found = (outputs(two.b, x) for x in (tensors_of(two.b), rewrite(tensors_of(two.b), transform)))
    assert not transform.info.exact
    assert float((found - expected).abs().max() / expected.abs().max()) > 1e-2


@pytest.mark.parametrize(("method", "with_statistics"), variants())
def test_brings_the_models_nearer(two: Two, method: str, with_statistics: bool) -> None:
    scores = two.found(method, with_statistics).info.scores
    assert scores["distance_after"] < scores["distance_before"]


@pytest.mark.parametrize("method", ALIGN_METHODS)
def test_files_hold_all_and_repeat(two: Two, method: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        two.aligned(method).save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    facts = open_transform(tmp_path / "first").info
    assert facts.method == method
    assert facts.models == (two.b.content, two.a.content)
    assert facts.options.keys() == {parameter.name for parameter in ALIGN_METHODS[method].parameters}


@pytest.mark.parametrize(("method", "with_statistics"), variants())
def test_the_facts_name_the_options_that_had_an_effect(two: Two, method: str, with_statistics: bool) -> None:
    """Every method accepts an order and a start; those that ignore them find the same without, and record that."""
    given = {"statistics": two.statistics} if with_statistics else {}
    plain = two.found(method, with_statistics)
    start = random_transform({}, plain.symmetries, seed=1, kinds=("order",))
    names = [name for name, group in plain.symmetries.groups.items() if isinstance(group, Units)]
    of_units = replace(start, elements={name: start.elements[name] for name in names})
    heeded = set() if with_statistics else {"order"} if method == "ot" else {"order", "initial"}
    for initial in (of_units, start):
        found = two.aligned(method, **given, initial=initial, order=names[:1])
        keeps_heads = method == "ot" and initial is start
        told = {name: value for name, value in found.info.options.items() if name not in plain.info.options}
        expected = {"order": names[:1], "initial": "random"}
        assert told.keys() == heeded | ({"initial"} if keeps_heads else set())
        assert told.items() <= expected.items()
        if not told:
            one, other = (rewrite(tensors_of(two.b), transform) for transform in (plain, found))
            assert all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("method", ALIGN_METHODS)
def test_takes_an_initial_transform(two: Two, method: str) -> None:
    first = two.found(method)
    again = two.aligned(method, initial=first)
    assert again.info.scores["inner_after"] >= first.info.scores["inner_after"] * (1 - 1e-12)
