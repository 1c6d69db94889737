"""Recipes with `job: extract`: read without torch, every problem in one message, and one canonical form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_lfm import PlanError
from mergekit_lfm.recipe.extract_recipe import ExtractRecipe


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with models and an adapter, as far as a recipe looks at them."""
    for name in ("tuned", "base", "lora"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def recipe(**keys: Any) -> dict[str, Any]:
    return {"job": "extract", "model": "tuned", "base_model": "base", **keys}


def refused(**keys: Any) -> str:
    with pytest.raises(PlanError) as caught:
        ExtractRecipe.parse(recipe(**keys))
    return str(caught.value)


def test_the_canonical_form_parses_back_to_itself() -> None:
    read = ExtractRecipe.parse(
        recipe(size="5KB", include="q_proj", save=["norm", "bias"], exact=True, dtype="bfloat16")
    )
    assert read.normalised() == {
        "job": "extract",
        "model": "tuned",
        "base_model": "base",
        "size": 5000,
        "include": ["q_proj"],
        "save": ["norm", "bias"],
        "exact": True,
        "dtype": "bfloat16",
    }
    assert ExtractRecipe.parse(read.normalised()).normalised() == read.normalised()
    assert ExtractRecipe.parse(recipe()).normalised() == {**recipe(), "rank": 32, "dtype": "float32"}


def test_all_problems_are_in_one_message() -> None:
    text = refused(model="turned", rank=0, energie=0.5, include=["a(", "b"], exclude=["["], embed_lora="yes")
    assert text.splitlines() == [
        "recipe: 6 problems",
        "  rank: found 0, expected greater than or equal to 1",
        "  embed_lora: found 'yes', expected a valid boolean",
        "  energie: unknown key, did you mean energy?",
        f"  model: found 'turned', but there is no {Path.cwd() / 'turned'}; expected a folder, or a model on the Hub "
        "as org/name or org/name@revision, or in a bucket as s3://bucket/path; on the Hub models are called org/name; "
        "one without an owner is written turned@main",
        "  include[0]: found 'a(', expected a regular expression (missing ), unterminated subpattern at position 1); "
        "correct it",
        "  exclude[0]: found '[', expected a regular expression (unterminated character set at position 0); correct it",
    ]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"energy": 1.5}, "energy: found 1.5, expected less than or equal to 1"),
        ({"rank": 2, "energy": 0.5}, "rank: found `rank` and `energy`, expected one of rank, energy and size; leave"),
        ({"rank": 2, "energy": 0.5, "size": 9}, "found `rank` and `energy` and `size`, expected one"),
        ({"size": "5B"}, "size: found '5B', expected a size such as 50KB"),
        ({"size": True}, "size: found True, expected a valid integer"),
        ({"exclude": ["a", 5]}, "exclude[1]: found 5, expected text"),
        ({"include": {"a": 1}}, "include: found {'a': 1}, expected a regular expression, or a list of them"),
        ({"dtype": "float64"}, "dtype: found 'float64', expected one of float32, bfloat16, float16; did you mean"),
        ({"base_model": None}, "base_model: found None, expected text"),
        ({"base_model": "base+nowhere"}, "base_model: found 'nowhere', but there is no"),
        ({"models": []}, "models: unknown key, did you mean model?"),
        ({"push": "a/b"}, "push: unknown key"),
    ],
)
def test_refused_with_its_place(keys: dict[str, Any], expected: str) -> None:
    assert expected in refused(**keys)


def test_a_document_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(PlanError, match=r"recipe: found \[1\], expected a mapping with model and base_model"):
        ExtractRecipe.parse("[1]")


def test_models_are_references_as_in_merges(tmp_path: Path) -> None:
    read = ExtractRecipe.parse(recipe(model={"model": "tuned", "adapter": "lora", "scale": 0.5}, base_model="org/b@v1"))
    model, base = read.models
    assert (model.source, model.adapters[0].source, model.adapters[0].scale) == (
        tmp_path / "tuned",
        tmp_path / "lora",
        0.5,
    )
    assert str(base.source) == "org/b@v1"
    (model, _) = ExtractRecipe.parse(recipe(model="mine+lora"), stages={"mine": tmp_path / "base"}).models
    assert (model.ref, model.source) == ("mine+lora", tmp_path / "base")


def test_unknown_keys_are_notices_if_allowed() -> None:
    read = ExtractRecipe.parse(recipe(energie=3), allow_unknown=True)
    assert read.notices == ("energie has no effect here: unknown key, did you mean energy?",)


def test_a_recipe_is_read_without_torch() -> None:
    code = (
        "import sys; from mergekit_lfm.recipe.extract_recipe import ExtractRecipe\n"
        f"ExtractRecipe.parse({recipe()!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
