"""Checks return every problem with its place; none hides another, and none is reported in place of its cause."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from mergekit_lfm.errors import PlanError, Refusal
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.files import Where
from mergekit_lfm.recipe.form import ModelEntry
from mergekit_lfm.recipe.problems import InnerError, Problem, attempt, refuse
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.roles import assign_roles, read_base, read_scope
from mergekit_lfm.store.elsewhere import EXPECTED


def refusal(error: ValueError) -> Any:
    raise error


def test_a_result_or_its_problems() -> None:
    assert attempt(lambda: 3, "x") == (3, [])
    assert attempt(lambda: refusal(ValueError("found 1\nand 2")), "x") == (
        None,
        [Problem("x", "found 1"), Problem("", "and 2")],
    )
    assert attempt(lambda: refusal(InnerError("[1].value", "found 1")), "x") == (
        None,
        [Problem("x[1].value", "found 1")],
    )


def test_problems_are_refused_together() -> None:
    refuse([])
    with pytest.raises(PlanError, match=r"^a: found 1\nb: found 2\nand 3$"):
        refuse([Problem("a", "found 1"), Problem("b", "found 2"), Problem("", "and 3")])


def test_every_line_of_models_has_its_problems_at_its_place(tmp_path: Path) -> None:
    lines = [
        ModelEntry(model="nowhere", parameters={"weight": [1, "x"], "wait": 1}),
        ModelEntry(model="gone", align={"to": "nowhere", "method": "ot", "cost": 3}, edits=("lost.st",)),
    ]
    scope, _, wrong = read_scope({"normalize": 2}, [METHODS["linear"]], "parameters")
    roles, _, problems = assign_roles([METHODS["linear"]], lines, None, (scope,), Where(tmp_path))
    problems += wrong
    assert [problem.place for problem in problems] == [
        "models[0].model",
        "models[0].parameters.weight[1]",
        "models[0].parameters.wait",
        "models[1].model",
        "models[1].edits[0]",
        "models[1].align.cost",
        "parameters.normalize",
    ]
    assert [line.place for line in roles.lines] == ["models[0]", "models[1]"]


def test_a_line_is_its_model_whatever_its_settings(tmp_path: Path) -> None:
    """The base that is listed with a weight is the base."""
    (tmp_path / "a").mkdir()
    lines = [ModelEntry(model="./a", parameters={"weight": 2})]
    base, _ = read_base("a", Where(tmp_path), "base_model")
    roles, _, problems = assign_roles([METHODS["linear"]], lines, base, (), Where(tmp_path))
    assert problems == [] and roles.base is not None
    assert roles.inputs == (roles.base,) and hash(roles.inputs[0]) == hash(roles.base)
    assert (roles.inputs[0].place, roles.base.place) == ("models[0]", "base_model")
    assert roles.inputs[0].settings and not roles.base.settings


def test_a_wrong_key_is_not_reported_as_missing_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = {"merge_method": "regmean", "models": [{"model": "a", "stat": "s.st"}]}
    with pytest.raises(PlanError, match=r"^recipe: models\[0\]\.stat: unknown key, did you mean stats\?$"):
        Recipe.parse(recipe, tmp_path)


def test_a_refusal_is_its_sentence_and_knows_its_parts() -> None:
    refusal = Refusal("{place} is {found}; {cure} by {who}", place=Path("a"), found="{b}", cure="mend it", who="you")
    assert str(refusal) == "a is {b}; mend it by you"
    assert refusal.parts == {"place": "a", "found": "{b}", "cure": "mend it"}
    assert (str(Refusal("a {b}")), Refusal("a {b}").parts) == ("a {b}", {})
    again = pickle.loads(pickle.dumps(PlanError("{place}: no", place="{x}")))
    assert (str(again), again.parts) == ("{x}: no", {"place": "{x}"})


NUMBER = {"found": "'heavy'", "expected": "a number"}
KEY = {"found": "merge_metod", "cure": "did you mean merge_method?"}


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("parameters", {"weight": "heavy"}, {"place": "r: parameters.weight", **NUMBER}),
        ("parameters", {"weight": [1, "heavy"]}, {"place": "r: parameters.weight[1]", **NUMBER}),
        (
            "parameters",
            {"weight": [{"filter": "a", "value": "heavy"}]},
            {"place": "r: parameters.weight[0].value"} | NUMBER,
        ),
        ("merge_metod", "linear", {"place": "r: merge_metod", **KEY}),
        ("merge_method", "liner", {"place": "r: merge_method", "found": "'liner'", "cure": "did you mean linear?"}),
        ("seed", -1, {"place": "r: seed", "found": "-1", "expected": "greater than or equal to 0"}),
        (
            "dtype",
            "fp16",
            {"place": "r: dtype", "found": "'fp16'", "expected": "a dtype", "cure": "did you mean float16?"},
        ),
        (
            "base_model",
            "nowhere",
            {
                "place": "r: base_model",
                "found": "'nowhere'",
                "expected": EXPECTED,
                "cure": "on the Hub models are called org/name; one without an owner is written nowhere@main",
            },
        ),
        (
            "base_model",
            "https://huggingface.co/org/name/tree/main",
            {
                "place": "r: base_model",
                "found": "'https://huggingface.co/org/name/tree/main'",
                "expected": EXPECTED,
                "cure": "for this model on the Hub write org/name",
            },
        ),
        ("parameters", {"weight": "heavy", "wait": 1}, {"place": "r"}),
    ],
)
def test_a_problem_that_stands_alone_has_its_parts_by_name(
    key: str, value: object, parts: dict[str, str], tmp_path: Path
) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path)}], "parameters": {"weight": 1}, key: value}
    with pytest.raises(PlanError) as caught:
        Recipe.parse(recipe, label="r")
    assert caught.value.parts == parts
    assert all(part in str(caught.value) for name, part in parts.items() if name != "place")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"slices": "x"}, "slices: found 'x', expected a list of slices, each with `sources`"),
        ({"slices": [None]}, r"slices\[0\]: found None, expected a mapping such as \{sources: "),
        ({"slices": [{"sources": [None]}]}, r"sources\[0\]: found None, expected a mapping such as \{model: path"),
        ({"modules": []}, r"modules: found \[\], expected a mapping from the names of modules to \{models: "),
        ({"modules": {"lm_head": None}}, r"modules\.lm_head: found None, expected a mapping such as \{models: "),
        ({"models": [{"model": ""}]}, r"models\[0\]\.model: found '', expected text"),
        ({"models": [{"model": "a", 3: 4}]}, r"found 3, expected a key that is text; put it in quotes"),
    ],
)
def test_a_message_says_which_form_was_expected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Recipe.parse({"merge_method": "passthrough", **keys})


@pytest.mark.parametrize(
    "recipe",
    [
        {"models": [{"model": "."}], "slices": None, "modules": None},
        {"models": None, "slices": [{"sources": [{"model": ".", "layer_range": [0, 1]}]}], "modules": None},
        {"models": None, "slices": None, "modules": {"lm_head": {"models": [{"model": "."}], "slices": None}}},
    ],
)
def test_models_slices_and_modules_may_be_null_beside_one_another(recipe: dict[str, Any]) -> None:
    assert [part.method_name for part in Recipe.parse(recipe).parts] == ["passthrough"]
