"""Slices: layers of models stacked under new numbers, each slice merged by its own sources, parameters and base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from helpers_merges import Tensors
from helpers_methods import CASES, DELTAS, Case, ids, parameters_of, save_statistics
from helpers_stacks import (
    EMBEDDING,
    HEAD,
    NORM,
    assert_same,
    layer_names,
    made,
    make,
    make_stack,
    moved,
    place,
    source,
    stack,
    stacked,
)
from models import save_checkpoint
from oracles import assert_close, doubles

from mergekit_lfm.api.contract import count_inputs
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Tensors]:
    """Three models of four layers: o, a and b."""
    return {name: make_stack(tmp_path, name, seed) for seed, name in enumerate("oab")}


def refused(recipe: Any, folder: Path) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(Recipe.parse(place(recipe, folder)))
    return str(caught.value)


def weights_of(recipe: dict[str, Any], folder: Path, name: str) -> list[dict[str, float]]:
    """Of each layer of the output the settings of the inputs' parameter."""
    plan = make_plan(Recipe.parse(place(recipe, folder)))
    jobs = [job for job in plan.tensors if job.name.endswith("o_proj.weight")]
    return [{plan.labels[i][-1]: float(own[name]) for (i, _), own in _inputs(job)} for job in jobs]


def _inputs(job: Any) -> Any:
    return zip(job.sources, job.settings.inputs, strict=True)


# ------------------------------------------------------------------ stacks


def test_layers_are_stacked_in_the_order_of_the_slices(models: dict[str, Tensors], tmp_path: Path) -> None:
    a, b = models["a"], models["b"]
    merged = made(stack([source("a", 0, 3)], [source("b", 1, 2)], [source("a", 2, 4)]), tmp_path)
    layers = [(a, 0), (a, 1), (a, 2), (b, 1), (a, 2), (a, 3)]
    assert_same(merged, stacked(*layers, first=a, last=a))


def test_the_first_slice_has_the_embedding_and_the_last_the_head(models: dict[str, Tensors], tmp_path: Path) -> None:
    a, b = models["a"], models["b"]
    merged = made(stack([source("a", 0, 1)], [source("b", 3, 4)]), tmp_path)
    assert_same(merged, stacked((a, 0), (b, 3), first=a, last=b))


def test_layers_may_be_cut_off(models: dict[str, Tensors], tmp_path: Path) -> None:
    merged = made(stack([source("a", 0, 1)], [source("a", 3, 4)]), tmp_path)
    assert_same(merged, stacked((models["a"], 0), (models["a"], 3), first=models["a"], last=models["a"]))
    plan = make_plan(Recipe.parse(place(stack([source("a", 0, 1)], [source("a", 3, 4)]), tmp_path)))
    dropped = {tensor for _, tensor, _ in plan.dropped}
    assert dropped == {name for name in layer_names(4) if ".1." in name or ".2." in name}


def test_the_same_layer_twice_in_a_slice_is_merged_with_another(models: dict[str, Tensors], tmp_path: Path) -> None:
    """Layers i and k of one model: mergekit refuses them."""
    a = models["a"]
    recipe = stack([source("a", 0, 2, weight=1), source("a", 2, 4, weight=3)], merge_method="linear")
    merged = made(recipe, tmp_path)
    for layer in (0, 1):
        later = moved(a, layer + 2, layer)
        for name, x in moved(a, layer, layer).items():
            assert_close(merged[name], oracles.linear([doubles(x), doubles(later[name])], [1, 3]))


def test_the_scale_of_repeated_layers(models: dict[str, Tensors], tmp_path: Path) -> None:
    """Layers whose two outputs are 0 add nothing to the residual stream."""
    zero = {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0}, {"value": 1.0}]}
    a = models["a"]
    merged = made(stack([source("a", 0, 4)], [source("a", 2, 4, **zero)]), tmp_path)
    layers = [(a, 0), (a, 1), (a, 2), (a, 3), (a, 2), (a, 3)]
    expected = stacked(*layers, first=a, last=a)
    expected |= {name: torch.zeros_like(x) for name, x in expected.items() if ".4." in name or ".5." in name}
    assert_same(merged, expected)


def test_other_numbers_of_layers_may_meet(models: dict[str, Tensors], tmp_path: Path) -> None:
    deep = make_stack(tmp_path, "deep", 9, layers=8)
    merged = made(stack([source("a", 0, 2)], [source("deep", 5, 8)]), tmp_path)
    assert_same(
        merged,
        stacked((models["a"], 0), (models["a"], 1), *((deep, i) for i in (5, 6, 7)), first=models["a"], last=deep),
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_shards_change_nothing(models: dict[str, Tensors], tmp_path: Path, threads: int) -> None:
    """A slice of several sources between copies."""
    a, b = models["a"], models["b"]
    middle = [source("a", 1, 2), source("b", 2, 3)]
    recipe = stack([source("a", 0, 1)], middle, [source("b", 3, 4)], merge_method="slerp", base_model="a")
    merged = made({**recipe, "parameters": {"t": 0.25}}, tmp_path, threads=threads, max_shard_size=100)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    expected = stacked((a, 0), (a, 1), (b, 3), first=a, last=b)
    for name, x in moved(b, 2, 1).items():
        assert_close(merged[name], oracles.slerp([doubles(expected[name]), doubles(x)], 0.25))
        expected[name] = merged[name]
    assert_same(merged, expected)


# ------------------------------------------------------------------ parameters


@pytest.mark.usefixtures("models")
def test_source_slice_top_default(tmp_path: Path) -> None:
    recipe = stack(
        [source("a", 0, 1, density=0.1), source("b", 0, 1)],
        [source("a", 1, 2, density=0.2), source("b", 1, 2)],
        [source("a", 2, 4), source("b", 2, 4)],
        merge_method="ties",
        base_model="o",
        parameters={"weight": 1.0},
    )
    recipe["slices"][0]["parameters"] = {"density": 0.3}
    assert weights_of(recipe, tmp_path, "density")[:3] == [{"a": 0.1, "b": 0.3}, {"a": 0.2, "b": 1.0}, {"a": 1, "b": 1}]
    recipe["parameters"]["density"] = 0.7
    found = [{"a": 0.1, "b": 0.3}, {"a": 0.2, "b": 0.7}, {"a": 0.7, "b": 0.7}]
    assert weights_of(recipe, tmp_path, "density")[:3] == found


@pytest.mark.usefixtures("models")
def test_a_scope_without_a_match_leaves_it_to_the_next(tmp_path: Path) -> None:
    rules = [{"filter": "mlp", "value": 5.0}]
    recipe = stack([source("a", 0, 4, weight=rules), source("b", 0, 4, weight=2.0)], merge_method="linear")
    recipe["slices"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 6.0}]}
    recipe["parameters"] = {"weight": 3.0}
    assert weights_of(recipe, tmp_path, "weight") == [{"a": 3.0, "b": 2.0}] * 4


@pytest.mark.usefixtures("models")
def test_filters_of_inputs_see_the_input_s_names(tmp_path: Path) -> None:
    """Layers 2 and 3 of a and 0 and 1 of b become the output's 1 and 2."""
    of_a, of_b = ([{"filter": f"layers.{i}.", "value": 7.0 + i}, {"value": 1.0}] for i in (2, 0))
    recipe = stack(
        [source("o", 0, 1)],
        [source("a", 2, 4, weight=of_a), source("b", 0, 2, weight=of_b)],
        [source("o", 3, 4)],
        merge_method="linear",
        parameters={"weight": 1.0},
    )
    assert weights_of(recipe, tmp_path, "weight")[1:3] == [{"a": 9.0, "b": 7.0}, {"a": 1.0, "b": 1.0}]


@pytest.mark.usefixtures("models")
def test_filters_of_inputs_at_the_top_see_the_input_s_names_too(tmp_path: Path) -> None:
    recipe = stack(
        [source("a", 2, 4), source("b", 0, 2)],
        merge_method="linear",
        parameters={"weight": [{"filter": "layers.2.", "value": 9.0}, {"value": 1.0}]},
    )
    assert weights_of(recipe, tmp_path, "weight") == [{"a": 9.0, "b": 1.0}, {"a": 1.0, "b": 1.0}]


@pytest.mark.usefixtures("models")
def test_filters_of_inputs_that_match_output_names_alone_are_refused(tmp_path: Path) -> None:
    rule = [{"filter": "layers.1.", "value": 9.0}, {"value": 1.0}]
    recipe = stack([source("o", 0, 1)], [source("a", 2, 4, scale=rule)])
    text = refused(recipe, tmp_path)
    assert "slices[1].sources[0].parameters.scale: filter 'layers.1.' is part of no tensor's name" in text


def test_filters_of_shared_parameters_see_the_output_s_name(models: dict[str, Tensors], tmp_path: Path) -> None:
    a, b = models["a"], models["b"]
    recipe = stack(
        [source("a", 3, 4), source("b", 3, 4)],
        [source("a", 0, 1), source("b", 0, 1)],
        merge_method="slerp",
        base_model="a",
        parameters={"t": [{"filter": "layers.0.", "value": 0}, {"filter": "layers.1.", "value": 1}, {"value": 0}]},
    )
    assert_same(made(recipe, tmp_path), stacked((a, 3), (b, 0), first=a, last=a))


@pytest.mark.usefixtures("models")
def test_gradients_run_over_the_layers_of_a_slice(tmp_path: Path) -> None:
    """From the first value in its first layer to the last in its last; a slice of one layer has the last."""
    gradient = [0.0, 10.0]
    recipe = stack(
        [source("a", 0, 3, weight=gradient), source("b", 0, 3)],
        [source("a", 3, 4, weight=gradient), source("b", 3, 4)],
        [source("a", 0, 2, weight=gradient), source("b", 2, 4)],
        merge_method="linear",
        parameters={"weight": 1.0},
    )
    assert [each["a"] for each in weights_of(recipe, tmp_path, "weight")] == [0, 5, 10, 10, 0, 10]


def test_gradients_begin_for_the_embedding_and_the_head(models: dict[str, Tensors], tmp_path: Path) -> None:
    recipe = stack(
        [source("a", 0, 2), source("b", 0, 2)],
        [source("a", 2, 4), source("b", 2, 4)],
        merge_method="slerp",
        base_model="a",
    )
    recipe["slices"][0]["parameters"] = {"t": [0, 1]}
    recipe["slices"][1]["parameters"] = {"t": [1, 0]}
    a, b = models["a"], models["b"]
    assert_same(made(recipe, tmp_path), stacked((a, 0), (b, 1), (b, 2), (a, 3), first=a, last=b))


@pytest.mark.usefixtures("models")
def test_switches_take_turns_over_a_slice(tmp_path: Path) -> None:
    recipe = stack([source("a", 0, 4), source("b", 0, 4)], merge_method="linear")
    recipe["parameters"] = {"weight": 1.0, "normalize": [True, False]}
    plan = make_plan(Recipe.parse(place(recipe, tmp_path)))
    found = [job.settings.shared["normalize"] for job in plan.tensors if job.name.endswith("o_proj.weight")]
    assert found == [True, True, True, False]


# ------------------------------------------------------------------ bases


def test_a_base_of_each_slice(models: dict[str, Tensors], tmp_path: Path) -> None:
    recipe = stack(
        [source("a", 0, 2), source("b", 0, 2)],
        [source("a", 2, 4), source("b", 2, 4)],
        merge_method="slerp",
        parameters={"t": 0.25},
    )
    recipe["slices"][0]["base_model"], recipe["slices"][1]["base_model"] = "a", "b"
    merged = made(recipe, tmp_path)
    for name, x in merged.items():
        ends = ("a", "b") if ".0." in name or ".1." in name or name == EMBEDDING else ("b", "a")
        assert_close(x, oracles.slerp([doubles(models[end][name]) for end in ends], 0.25))


def test_the_base_is_read_in_the_layers_of_its_source(models: dict[str, Tensors], tmp_path: Path) -> None:
    """The base is listed with layers of its own; else it has those that all sources have."""
    recipe = stack(
        [source("o", 0, 1), source("a", 1, 2, weight=0.5)],
        [source("a", 3, 4, weight=0.5), source("b", 3, 4, weight=0.25)],
        merge_method="task_arithmetic",
        base_model="o",
    )
    merged = made(recipe, tmp_path)
    o, a, b = (models[name] for name in "oab")
    for name, x in moved(o, 0, 0).items():
        changed = doubles(moved(a, 1, 0)[name])
        assert_close(merged[name], oracles.task_arithmetic([changed], [0.5], doubles(x)))
    for name, x in moved(o, 3, 1).items():
        xs = [doubles(moved(each, 3, 1)[name]) for each in (a, b)]
        assert_close(merged[name], oracles.task_arithmetic(xs, [0.5, 0.25], doubles(x)))


@pytest.mark.usefixtures("models")
def test_a_base_beside_sources_of_different_layers_is_refused(tmp_path: Path) -> None:
    recipe = stack([source("a", 0, 2), source("b", 2, 4)], merge_method="ties", base_model="o")
    text = refused({**recipe, "parameters": {"weight": 1.0}}, tmp_path)
    assert "the base, is not among the sources of this slice, which have different layers; list it" in text


def test_one_source_is_copied_by_a_method_of_two(models: dict[str, Tensors], tmp_path: Path) -> None:
    recipe = stack([source("b", 0, 2)], [source("a", 2, 4), source("b", 2, 4)], merge_method="slerp", base_model="a")
    merged = made({**recipe, "parameters": {"t": 1}}, tmp_path)
    assert_same(merged, models["b"])


# ------------------------------------------------------------------ methods


# Those that solve each tensor by itself.
BY_TENSOR = [(name, more) for name, more in CASES if more.get("scope", "global" if name == "pcb" else "") != "global"]


@pytest.mark.parametrize("case", BY_TENSOR, ids=ids)
def test_slices_are_merged_as_the_whole_model(case: Case, tmp_path: Path) -> None:
    """By every method, bit for bit, also with statistics and over whole matrices; and in another order.

    Random masks depend on the names in the output, so those methods keep the order.
    """
    method, extra = METHODS[case[0]], case[1]
    for seed in range(4):
        make_stack(tmp_path, f"m{seed}", seed)
    lines: list[dict[str, Any]] = [{"model": f"m{i + 1}"} for i in range(count_inputs(method.name))]
    if method.statistics:
        lines = [{**line, "stats": str(save_statistics(tmp_path / line["model"], method.statistics))} for line in lines]
    recipe: dict[str, Any] = {"merge_method": method.name, "parameters": parameters_of(method.name, extra)}
    recipe |= {"base_model": "m0" if method.name in DELTAS else "m1"} if method.base != "member" else {}
    whole = made({**recipe, "models": lines}, tmp_path, "whole")
    spans = [[0, 1], [1, 3], [3, 4]] if method.random else [[1, 3], [3, 4], [0, 1]]
    slices = [{"sources": [{**line, "layer_range": span} for line in lines]} for span in spans]
    layers = [(whole, layer) for span in spans for layer in range(*span)]
    assert_same(made({**recipe, "slices": slices}, tmp_path, "parts"), stacked(*layers, first=whole, last=whole))


# ------------------------------------------------------------------ heads and misfits


def tied_stack(folder: Path, name: str, seed: int, *, stored: bool = False) -> Tensors:
    """A model whose head is its embedding, stored once or twice."""
    tensors = make(seed, [EMBEDDING, *layer_names(4), NORM])
    tensors |= {HEAD: tensors[EMBEDDING].clone()} if stored else {}
    config = {"model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": True}
    save_checkpoint(folder / name, tensors, config)
    return tensors


def test_a_head_of_its_own_is_not_tied(models: dict[str, Tensors], tmp_path: Path) -> None:
    """The first model ties its head, the last does not: the config says so, or loaders would lose the head."""
    tied, a = tied_stack(tmp_path, "tied", 5), models["a"]
    merged = made(stack([source("tied", 0, 2)], [source("a", 2, 4)]), tmp_path)
    assert_same(merged, stacked((tied, 0), (tied, 1), (a, 2), (a, 3), first=tied, last=a))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_the_embedding(stored: bool, models: dict[str, Tensors], tmp_path: Path) -> None:
    """The last model ties its head, the first does not, and stores none or a copy: an untied model needs one."""
    a, tied = models["a"], tied_stack(tmp_path, "tied", 5, stored=stored)
    merged = made(stack([source("a", 0, 2)], [source("tied", 2, 4)]), tmp_path)
    head = {**tied, HEAD: tied[EMBEDDING]}
    assert_same(merged, stacked((a, 0), (a, 1), (tied, 2), (tied, 3), first=a, last=head))


@pytest.mark.parametrize("stored", [False, True])
def test_a_stack_of_a_tied_model_stays_tied(stored: bool, tmp_path: Path) -> None:
    tied = tied_stack(tmp_path, "tied", 5, stored=stored)
    merged = made(stack([source("tied", 0, 3)], [source("tied", 2, 4)]), tmp_path)
    expected = stacked(*((tied, i) for i in (0, 1, 2, 2, 3)), first=tied, last={**tied, HEAD: tied[EMBEDDING]})
    assert_same(merged, {name: x for name, x in expected.items() if stored or name != HEAD})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("ranges", [[(0, 5)], [(4, 6)], [(0, 2), (3, 9)]])
@pytest.mark.usefixtures("models")
def test_all_ranges_that_do_not_fit_are_named(tmp_path: Path, ranges: list[tuple[int, int]]) -> None:
    text = refused(stack(*([source("a", *span)] for span in ranges)), tmp_path)
    for i, (first, last) in enumerate(ranges):
        if last > 4:
            assert f"slices[{i}].sources[0].layer_range: found [{first}, {last}]" in text and "has 4 layers" in text


@pytest.mark.usefixtures("models")
def test_two_stacks_need_modules(tmp_path: Path) -> None:
    names = [*layer_names(2, "model.visual.blocks."), *layer_names(2, "model.language_model.layers.")]
    save_checkpoint(tmp_path / "v", make(0, names), {"model_type": "qwen2_5_vl"})
    text = refused(stack([source("v", 0, 1)], [source("v", 0, 2)]), tmp_path)
    assert "slices need one stack of layers" in text and "`modules`" in text
