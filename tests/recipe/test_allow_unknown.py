"""Unknown keys as notices: at every level of a recipe, without a change of the merge."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import refusal, run
from helpers_merges import load_all
from models import save_checkpoint

from mergekit_lfm import Finding, PlanError, Recipe, merge, plan_merge

T = "model.layers.0.w"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for value, name in enumerate("ab"):
        save_checkpoint(tmp_path / name, {T: torch.full((2, 2), float(value))}, {"model_type": "llama"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe() -> dict[str, Any]:
    """A recipe with a key for every level."""
    return {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": {"model": {"path": "a"}}, "layer_range": [0, 1], "parameters": {"weight": 1}},
                    {"model": "b", "layer_range": [0, 1], "parameters": {"weight": [{"filter": "w", "value": 3}]}},
                ],
            }
        ],
        "parameters": {"normalize": True},
        "push": {"repo": "me/model"},
    }


PLACES: dict[str, list[Any]] = {
    "bogus": [],
    "parameters.bogus": ["parameters"],
    "push.bogus": ["push"],
    "slices[0].bogus": ["slices", 0],
    "slices[0].sources[1].bogus": ["slices", 0, "sources", 1],
    "slices[0].sources[0].parameters.bogus": ["slices", 0, "sources", 0, "parameters"],
    "slices[0].sources[0].model.bogus": ["slices", 0, "sources", 0, "model"],
    "slices[0].sources[0].model.model.bogus": ["slices", 0, "sources", 0, "model", "model"],
    "slices[0].sources[1].parameters.weight[0].bogus": ["slices", 0, "sources", 1, "parameters", "weight", 0],
}


def with_bogus(*places: str) -> dict[str, Any]:
    data = deepcopy(recipe())
    for place in places:
        part: Any = data
        for step in PLACES[place]:
            part = part[step]
        part["bogus"] = 1
    return data


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_key_is_an_error_or_a_notice(place: str) -> None:
    with pytest.raises(PlanError, match=r"unknown key|no such parameter"):
        Recipe.parse(with_bogus(place))
    read = Recipe.parse(with_bogus(place), allow_unknown=True)
    (notice,) = read.notices
    assert notice.startswith(f"{place} has no effect here: ")
    assert read.normalised() == Recipe.parse(recipe()).normalised()


def test_all_unknown_keys_are_named_at_once_and_other_problems_stay_errors() -> None:
    assert len(Recipe.parse(with_bogus(*PLACES), allow_unknown=True).notices) == len(PLACES)
    broken = with_bogus(*PLACES)
    broken["dtype"] = "flat32"
    with pytest.raises(PlanError, match="flat32") as refused:
        Recipe.parse(broken, allow_unknown=True)
    assert "bogus" not in str(refused.value)


def test_a_key_that_is_known_and_not_supported_stays_an_error() -> None:
    with pytest.raises(PlanError, match="put `stats` beside it"):
        Recipe.parse({**recipe(), "stats": "x"}, allow_unknown=True)


def test_the_options_of_requests_may_be_unknown() -> None:
    lines = [{"model": "a"}, {"model": "b", "align": {"to": "a", "method": "weight_matching", "bogus": 1}}]
    data = {"merge_method": "linear", "models": lines, "parameters": {"weight": 1}}
    (notice,) = Recipe.parse(data, allow_unknown=True).notices
    assert notice.startswith("models[1].align.bogus has no effect here: weight_matching has no such parameter")


def test_the_merge_goes_on_and_warns() -> None:
    data = with_bogus("parameters.bogus")
    del data["push"]
    assert plan_merge(data, "out", allow_unknown=True).result.plan.tensors
    with pytest.warns(Finding, match=r"parameters\.bogus has no effect here"):
        merged = load_all(Path(merge(data, "out", allow_unknown=True)))
    assert merged[T].tolist() == [[0.75, 0.75], [0.75, 0.75]]


TEXT = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, wieght: 2}\n"


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize("stages", [False, True])
def test_the_option_does_the_same(command: str, stages: bool) -> None:
    text = TEXT + ("name: first\n---\n" + TEXT.replace("model: b", "model: first") if stages else "")
    Path("recipe.yaml").write_text(text)
    assert "did you mean weight?" in refusal(run(command, "recipe.yaml", "out"))
    assert run(command, "recipe.yaml", "out", "--allow-unknown").exit_code == 0
    if command == "merge" and not stages:
        assert run("verify", "out", "--against-inputs", "recipe.yaml").exit_code == 0
    if not stages:
        assert run(command, "-", "out", "--allow-unknown", standard_input=text).exit_code == 0
