"""Recipes with `job: adapters`: read without torch, every problem in one message, and one canonical form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_lfm import PlanError, merge
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.adapter_recipe import AdapterRecipe, merges_changes
from mergekit_lfm.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with adapters `one` and `two`, as far as a recipe looks at them."""
    for name in ("one", "two", "base"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def recipe(**keys: Any) -> dict[str, Any]:
    lines = [{"adapter": "one", "parameters": {"density": 0.5}}, {"adapter": "two", "scale": 2}]
    return {"job": "adapters", "merge_method": "ties", "adapters": lines, "parameters": {"weight": 1}, **keys}


def refused(**keys: Any) -> str:
    with pytest.raises(PlanError) as caught:
        AdapterRecipe.parse(recipe(**keys))
    return str(caught.value)


def test_the_canonical_form_parses_back_to_itself() -> None:
    read = AdapterRecipe.parse(recipe(space="knots", rank=4, base_model="base", dtype="bfloat16", seed=3))
    assert [(line.input.label, line.scale) for line in read.lines] == [("one", 1.0), ("two", 2.0)]
    assert AdapterRecipe.parse(read.normalised()).normalised() == read.normalised()
    assert read.normalised() == {
        "job": "adapters",
        "merge_method": "ties",
        "adapters": [
            {"adapter": "one", "parameters": {"density": 0.5}},
            {"adapter": "two", "scale": 2.0, "parameters": {}},
        ],
        "parameters": {"weight": 1.0},
        "space": "knots",
        "rank": 4,
        "base_model": "base",
        "dtype": "bfloat16",
        "seed": 3,
    }


def test_all_problems_are_in_one_message() -> None:
    lines = [{"adapter": "one", "parameters": {"densty": 0.5, "lambda": 2}}, {"adapter": "two", "scale": "x"}]
    text = refused(adapters=lines, space="knot", ranks=3, parameters={"weight": -1, "density": 3})
    assert text.splitlines() == [
        "recipe: 6 problems",
        "  adapters[1].scale: found 'x', expected a valid number",
        "  space: found 'knot', expected 'product', 'knots' or 'core'",
        "  ranks: unknown key, did you mean rank?",
        "  parameters.density: found 3, expected a number of at most 1",
        "  adapters[0].parameters.densty: ties has no such parameter, did you mean density?",
        "  adapters[0].parameters.lambda: lambda is shared by all inputs; move it to the top-level `parameters`",
    ]
    assert "adapters[0].adapter: found 'nowhere', but there is no" in refused(adapters=[{"adapter": "nowhere"}])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"merge_method": "tise"}, "merge_method: unknown method 'tise', did you mean ties?"),
        ({"merge_method": "ties_svd"}, "ties_svd is a method of peft that is not here; nearest: ties"),
        ({"merge_method": "slerp"}, "slerp needs models or their statistics, expected a method that merges changes"),
        ({"merge_method": "regmean"}, "regmean needs models or their statistics"),
        ({"parameters": {}}, "adapters[0].parameters.weight: one has no weight, required by ties"),
        ({"rank": 0}, "rank: found 0, expected greater than or equal to 1"),
        ({"energy": 1.5}, "energy: found 1.5, expected less than or equal to 1"),
        ({"rank": 2, "energy": 0.5}, "rank: found `rank` and `energy`, expected one of them"),
        ({"adapters": []}, "adapters: ties takes at least 1 adapter; found 0"),
        ({"adapters": "one"}, "adapters: found 'one', expected a list of adapters"),
        ({"adapters": ["one"]}, "adapters[0]: found 'one', expected a mapping such as {adapter: path"),
        ({"parameters": {"weight": 1, "scope": "global"}}, "parameters.scope: adapters are merged module by module"),
        ({"base_model": "base+one"}, "base_model: found 'base+one', a model with adapters"),
        ({"adapters": [{"adapter": "one"}], "merge_method": "magmax"}, "magmax takes at least 2 adapters; found 1"),
        ({"dtype": "fp16"}, "dtype: found 'fp16', expected a dtype; did you mean float16?"),
        ({"models": []}, "models: unknown key, "),
    ],
)
def test_refused_with_its_place(keys: dict[str, Any], expected: str) -> None:
    assert expected in refused(**keys)


def test_unknown_keys_are_notices_if_allowed() -> None:
    read = AdapterRecipe.parse(recipe(ranks=3), allow_unknown=True)
    assert read.notices == ("ranks has no effect here: unknown key, did you mean rank?",)


def test_every_method_that_merges_changes_is_one_of_adapters() -> None:
    names = {name for name, method in METHODS.items() if merges_changes(method)}
    assert names >= {
        "linear",
        "task_arithmetic",
        "ties",
        "dare_ties",
        "della",
        "sce",
        "magmax",
        "pcb",
        "consensus",
        "tsv",
    }
    assert not names & {"slerp", "karcher", "fisher", "regmean", "passthrough", "nearswap"}


def test_a_recipe_is_read_without_torch() -> None:
    code = (
        "import sys; from mergekit_lfm.recipe.adapter_recipe import AdapterRecipe\n"
        f"AdapterRecipe.parse({recipe()!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_sums_of_peft_are_not_normalised() -> None:
    for name, expected in (("cat", False), ("svd", False), ("linear", True)):
        read = AdapterRecipe.parse(recipe(merge_method=name, adapters=[{"adapter": "one"}, {"adapter": "two"}]))
        assert read.part.settings("x.weight", None).shared == {"normalize": expected}
    read = AdapterRecipe.parse(recipe(merge_method="cat", parameters={"weight": 1, "normalize": True}))
    assert read.part.settings("x.weight", None).shared == {"normalize": True}


def test_a_merge_of_models_says_where_adapters_are_merged() -> None:
    with pytest.raises(PlanError, match=r"recipe: job adapters: a merge has no `job`: give the recipe to `merge`"):
        Recipe.parse(recipe())
    with pytest.raises(PlanError, match=r"recipe: job adapters makes an adapter, expected a merge, .* run_recipe"):
        merge(recipe())
