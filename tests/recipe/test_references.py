"""Models with adapters as recipes and commands name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import save_checkpoint

from mergekit_lfm import Recipe
from mergekit_lfm.recipe.adapters import join_reference, split_reference
from mergekit_lfm.recipe.files import Where, find_reference
from mergekit_lfm.store.hub import HubName


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("a", "b", "c", "a+b", "c+0.5"):
        save_checkpoint(tmp_path / name, {}, {})
    return tmp_path


@pytest.mark.parametrize(
    ("text", "model", "adapters"),
    [
        ("a", "a", []),
        ("a+c", "a", [("c", 1.0)]),
        ("a+b", "a+b", []),  # a folder of this name
        ("a+b+c", "a+b", [("c", 1.0)]),
        ("c+a+b", "c", [("a+b", 1.0)]),
        ("c+0.5*a+b", "c", [("a+b", 0.5)]),
        ("c+0.5*b+-2*c", "c", [("b", 0.5), ("c", -2.0)]),
        ("c+0.5+0.001*b", "c+0.5", [("b", 0.001)]),
        ("org/x@v1+0.5*org/y@main", "org/x@v1", [("org/y@main", 0.5)]),
    ],
)
def test_a_path_that_is_there_stays_whole(
    models: Path, text: str, model: str, adapters: list[tuple[str, float]]
) -> None:
    """A model and adapters in turn, each with its share; a path may have plus signs of its own."""
    found = find_reference(text, Where(models))

    def place(ref: str) -> Path | HubName:
        name, _, revision = ref.partition("@")
        return HubName(name, revision) if revision else models / ref

    assert (found.ref, found.source) == (text, place(model))
    assert [(each.source, each.scale) for each in found.adapters] == [(place(ref), scale) for ref, scale in adapters]


@given(
    st.lists(st.tuples(st.from_regex(r"[a-z/]{1,8}", fullmatch=True), st.floats(allow_nan=False, allow_infinity=False)))
)
def test_a_joined_reference_is_split_into_its_parts(adapters: list[tuple[str, float]]) -> None:
    assert split_reference(join_reference("m", adapters), lambda _: False) == ("m", adapters)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "half"])
def test_a_share_is_a_finite_number(models: Path, scale: object) -> None:
    with pytest.raises(ValueError, match=r"scale: found \S+, expected a number"):
        line = {"model": "a", "adapter": "b", "scale": scale}
        Recipe.parse({"merge_method": "passthrough", "models": [line]}, models)
    with pytest.raises(ValueError, match="found an infinite share of 'b', expected a number"):
        find_reference("a+1e400*b", Where(models))


FORMS: list[dict[str, Any]] = [
    {"model": "a+0.5*b"},
    {"model": "a", "adapter": "b", "scale": 0.5},
    {"model": {"model": "a", "adapter": "b", "scale": 0.5}},
    {"model": {"model": {"path": "a"}, "lora": {"path": "b"}, "scale": 0.5}},
    {"model": "a", "adapter": ["b"], "scale": 0.5, "lora": None},
]


@pytest.mark.parametrize("line", FORMS)
def test_all_forms_are_one(models: Path, line: dict[str, Any]) -> None:
    recipe = Recipe.parse({"merge_method": "passthrough", "models": [line]}, models)
    (model,) = recipe.all_models
    assert (model.ref, model.model_ref) == ("a+0.5*b", "a")
    assert [(each.ref, each.scale) for each in model.adapters] == [("b", 0.5)]
    assert Recipe.parse(recipe.normalised(), models).all_models == recipe.all_models


def test_an_adapter_beside_a_model_is_no_path_of_both(models: Path) -> None:
    """Though a folder a+b is there; without one, a share of 1 is not written."""
    line = {"model": "a", "adapter": "b"}
    recipe = Recipe.parse({"merge_method": "passthrough", "models": [line]}, models)
    (model,) = recipe.all_models
    assert (model.ref, model.source, len(model.adapters)) == ("a+1*b", models / "a", 1)
    assert Recipe.parse(recipe.normalised(), models).all_models == recipe.all_models
    (other,) = Recipe.parse({"merge_method": "passthrough", "models": [line | {"adapter": "c"}]}, models).all_models
    assert (other.ref, other.label) == ("a+c", "a+c")
