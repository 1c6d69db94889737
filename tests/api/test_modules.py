"""Modules: parts of a model with methods, models, slices, bases and parameters of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracles
import pytest
from helpers_merges import Tensors
from helpers_stacks import assert_same, layer_names, made, make, moved, place, source
from models import save_checkpoint
from oracles import assert_close, doubles

from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

TEXT, VISION = "model.language_model.layers.", "model.visual.blocks."
EMBEDDING, PROJECTOR, HEAD = "model.language_model.embed_tokens.weight", "model.visual.merger.weight", "lm_head.weight"
NAMES = (EMBEDDING, *layer_names(4, TEXT), *layer_names(2, VISION), PROJECTOR, HEAD)
OF_VISION = [name for name in NAMES if "visual" in name]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Tensors]:
    """Three models of text and images: o, a and b."""
    tensors = {name: make(seed, NAMES) for seed, name in enumerate("oab")}
    config = {"model_type": "qwen2_5_vl", "tie_word_embeddings": False, "text_config": {"num_hidden_layers": 4}}
    for name, each in tensors.items():
        save_checkpoint(tmp_path / name, each, config)
    return tensors


def lines(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    return [
        {"model": name, "parameters": {key: values[i] for key, values in parameters.items()}}
        for i, name in enumerate(names)
    ]


def test_each_module_has_its_method(models: dict[str, Tensors], tmp_path: Path) -> None:
    recipe = {
        "base_model": "o",
        "merge_method": "slerp",
        "parameters": {"t": 0.25},
        "modules": {
            "text_decoder": {"models": lines("o", "a")},
            "vision_tower": {
                "merge_method": "task_arithmetic",
                "models": lines("a", "b", weight=[0.5, 0.25]),
            },
        },
    }
    merged = made(recipe, tmp_path)
    assert merged.keys() == set(NAMES)
    for name, x in merged.items():
        o, a, b = (doubles(models[key][name]) for key in "oab")
        one, other = oracles.task_arithmetic([a, b], [0.5, 0.25], o), oracles.slerp([o, a], 0.25)
        assert_close(x, one if name in OF_VISION else other)


def test_tensors_in_no_module_are_the_base_s(models: dict[str, Tensors], tmp_path: Path) -> None:
    recipe = {
        "base_model": "o",
        "modules": {"model.visual": {"merge_method": "passthrough", "models": [{"model": "b"}]}},
    }
    plan = make_plan(Recipe.parse(place(recipe, tmp_path)))
    (notice,) = plan.notices
    assert notice.startswith("10 tensors, such as lm_head.weight, are in no module")
    expected = {name: models["b" if name in OF_VISION else "o"][name] for name in NAMES}
    assert_same(made(recipe, tmp_path), expected)


def test_a_model_alone_needs_no_method(models: dict[str, Tensors], tmp_path: Path) -> None:
    """Nor does the recipe, if every module has one or is copied."""
    text: dict[str, Any] = {"models": lines("o", "a"), "merge_method": "slerp", "parameters": {"t": 1}}
    recipe = {"base_model": "o", "modules": {"text_decoder": text, "vision_tower": {"models": lines("b")}}}
    expected = {name: models["b" if name in OF_VISION else "a"][name] for name in NAMES}
    assert_same(made(recipe, tmp_path), expected)
    del text["merge_method"]
    with pytest.raises(PlanError, match="merge_method: required"):
        make_plan(Recipe.parse(place(recipe, tmp_path)))


def test_source_slice_module_top(models: dict[str, Tensors], tmp_path: Path) -> None:
    """Of weights that differ in every scope that of the nearest holds; the other module has that of the top."""
    piece = {"sources": [source("a", 0, 4, weight=4.0), source("b", 0, 4)], "parameters": {"weight": 3.0}}
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "parameters": {"weight": 1.0},
        "modules": {
            "text_decoder": {"slices": [piece], "parameters": {"weight": 2.0}},
            "vision_tower": {"models": lines("a", "b")},
        },
    }
    found = []
    for _ in range(3):
        plan = make_plan(Recipe.parse(place(recipe, tmp_path)))
        weights = {job.name: [own["weight"] for own in job.settings.inputs] for job in plan.tensors}
        assert weights[PROJECTOR] == [1.0, 1.0]
        found.append(weights[f"{TEXT}0.self_attn.o_proj.weight"])
        (piece if "parameters" in piece else recipe["modules"]["text_decoder"]).pop("parameters", None)
    assert found == [[4.0, 3.0], [4.0, 2.0], [4.0, 1.0]]
    assert models


def test_a_module_is_stacked(models: dict[str, Tensors], tmp_path: Path) -> None:
    recipe = {
        "base_model": "a",
        "merge_method": "passthrough",
        "modules": {
            "text_decoder": {"slices": [{"sources": [source("a", 0, 3)]}, {"sources": [source("b", 2, 4)]}]},
            "vision_tower": {"models": [{"model": "a"}]},
        },
    }
    a, b = models["a"], models["b"]
    expected = {name: a[name] for name in NAMES if not name.startswith(TEXT)} | {HEAD: b[HEAD]}
    for to, (tensors, layer) in enumerate([(a, 0), (a, 1), (a, 2), (b, 2), (b, 3)]):
        expected |= moved(tensors, layer, to, TEXT)
    assert_same(made(recipe, tmp_path), expected)


def test_gradients_and_filters_are_those_of_the_module(models: dict[str, Tensors], tmp_path: Path) -> None:
    """Over two blocks in the one, over four layers in the other; what is in no layer begins."""
    recipe = {
        "base_model": "a",
        "merge_method": "slerp",
        "modules": {
            "text_decoder": {
                "models": lines("a", "b"),
                "parameters": {"t": [{"filter": "mlp", "value": [0, 0, 1, 1]}, {"value": 0}]},
            },
            "vision_tower": {"models": lines("a", "b"), "parameters": {"t": [1, 0]}},
        },
    }
    late = {f"{TEXT}{i}.mlp.down_proj.weight" for i in (2, 3)}
    of_b = late | {name for name in OF_VISION if not name.startswith(f"{VISION}1.")}
    expected = {name: models["b" if name in of_b else "a"][name] for name in NAMES}
    assert_same(made(recipe, tmp_path), expected)


def test_a_base_of_a_module(models: dict[str, Tensors], tmp_path: Path) -> None:
    recipe = {
        "base_model": "o",
        "merge_method": "task_arithmetic",
        "parameters": {"weight": 1.0},
        "modules": {
            "text_decoder": {"models": lines("a")},
            "vision_tower": {"models": lines("a"), "base_model": "b", "parameters": {"weight": 0.5}},
        },
    }
    merged = made(recipe, tmp_path)
    for name, x in merged.items():
        base, weight = ("b", 0.5) if name in OF_VISION else ("o", 1.0)
        a = doubles(models["a"][name])
        assert_close(x, oracles.task_arithmetic([a], [weight], doubles(models[base][name])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": {"vision_towre": {"models": [{"model": "a"}]}}}, "modules.vision_towre: no tensor belongs to it"),
        ({"modules": {"vision_tower": {}}}, "modules.vision_tower: expected either `models` or `slices`"),
        ({"models": [{"model": "a"}]}, "found `models` and `modules`, expected one of them"),
    ],
)
@pytest.mark.usefixtures("models")
def test_modules_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "passthrough",
        "base_model": "o",
        "modules": {"model.visual": {"models": [{"model": "a"}]}},
    }
    with pytest.raises(PlanError) as caught:
        make_plan(Recipe.parse(place(recipe | change, tmp_path)))
    assert message in str(caught.value)


def test_references_with_a_revision_are_those_of_a_module_too(models: dict[str, Tensors], tmp_path: Path) -> None:
    """A folder whose name has the revision stands for the Hub's."""
    (tmp_path / "b").rename(tmp_path / "b@main")
    reference = {"model": {"path": "b", "revision": "main"}}
    recipe = {
        "base_model": "a",
        "merge_method": "passthrough",
        "modules": {"vision_tower": {"models": [{"model": reference}]}, "text_decoder": {"models": [{"model": "a"}]}},
    }
    expected = {name: models["b" if name in OF_VISION else "a"][name] for name in NAMES}
    assert_same(made(recipe, tmp_path), expected)


def test_a_copy_of_a_tied_embedding_does_not_make_the_model_untied(tmp_path: Path) -> None:
    """The head is stored though tied, and in no module: loaders ignore it, as in the models themselves."""
    for seed, name in enumerate("ab"):
        tensors = make(seed, NAMES)
        config = {"model_type": "qwen2_5_vl", "tie_word_embeddings": True, "text_config": {"num_hidden_layers": 4}}
        save_checkpoint(tmp_path / name, tensors | {HEAD: tensors[EMBEDDING].clone()}, config)
    modules = {"model.language_model": {"models": lines("a", "b", weight=[0.5, 0.5])}}
    made({"base_model": "a", "merge_method": "linear", "modules": modules}, tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
