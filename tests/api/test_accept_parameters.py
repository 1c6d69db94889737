"""Scopes, gradients, filters and dtypes of a recipe, judged by the merged checkpoint."""

import json

import oracles
import pytest
import torch
from fixtures_llama import base_tensors, entries, fine_tuned, load, merger, save
from oracles import assert_close, doubles, rounded

from mergekit_lfm.errors import PlanError

LAYER0, LAYER1 = "model.layers.0.", "model.layers.1."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of A, B and their base."""
    folder, base = tmp_path_factory.mktemp("models"), base_tensors()
    made = {"A": fine_tuned(base, 1), "B": fine_tuned(base, 2), "BASE": base}
    return {name: save(folder / name, tensors) for name, tensors in made.items()}


@pytest.fixture
def merged(tmp_path):
    return merger(tmp_path)


def slerp(models, t):
    listed = entries(models["A"], models["B"])
    return {"merge_method": "slerp", "models": listed, "base_model": str(models["A"]), "parameters": {"t": t}}


def linear(models, *weights, **parameters):
    return {
        "merge_method": "linear",
        "models": entries(models["A"], models["B"], weight=weights),
        "parameters": parameters,
    }


def test_gradients_run_over_layers_and_start_for_everything_else(models, merged):
    got = merged(linear(models, [1, 0], [0, 1]))
    a, b = load(models["A"]), load(models["B"])
    for name, tensor in got.items():
        assert torch.equal(tensor, b[name] if name.startswith(LAYER1) else a[name]), name


def test_gradients_over_four_layers(tmp_path, merged):
    base = base_tensors(layers=4)
    folders = [save(tmp_path / name, fine_tuned(base, seed)) for seed, name in enumerate("AB")]
    got = merged({"merge_method": "linear", "models": entries(*folders, weight=[[0, 1, 0.5], [1, 1, 0]])})
    a, b = (load(folder) for folder in folders)
    along = [(0, 1), (2 / 3, 1), (5 / 6, 2 / 3), (0.5, 0)]
    for name, tensor in got.items():
        weight = along[int(name.split(".")[2])] if ".layers." in name else along[0]
        assert_close(tensor, oracles.linear([doubles(a[name]), doubles(b[name])], weight))


def test_filters_and_gradients_together(models, merged):
    rules = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
    got = merged(slerp(models, rules))
    a, b = load(models["A"]), load(models["B"])
    for name, tensor in got.items():
        if "self_attn" in name or "mlp" in name:
            from_b = ("mlp" in name) == name.startswith(LAYER0)
            assert torch.equal(tensor, (b if from_b else a)[name]), name
        else:
            assert_close(tensor, oracles.slerp([doubles(a[name]), doubles(b[name])], 0.5))


def test_filters_are_substrings_and_an_asterisk_is_everything(models, merged):
    rules = [{"filter": "layers.0.self_attn", "value": 1}]
    with pytest.raises(PlanError, match="is part of no tensor's name"):  # a regular expression
        merged(slerp(models, [{"filter": r"layers\.\d+\.mlp", "value": 1}, {"filter": "*", "value": 0}]))
    got = merged(slerp(models, [*rules, {"filter": "*", "value": 0}]))
    a, b = load(models["A"]), load(models["B"])
    for name, tensor in got.items():
        assert torch.equal(tensor, (b if "layers.0.self_attn" in name else a)[name]), name


def test_a_models_own_parameters_come_before_the_top_levels(models, merged):
    recipe = linear(models, 1, 3)
    del recipe["models"][1]["parameters"]
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 5}]}
    got = merged(recipe | {"parameters": {"weight": [{"filter": "norm", "value": 2}, {"value": 3}]}})
    a, b = load(models["A"]), load(models["B"])
    for name, tensor in got.items():
        weight = (5, 3) if "mlp" in name else (1, 1)
        assert_close(tensor, oracles.linear([doubles(a[name]), doubles(b[name])], weight))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"parameters": {"densty": 0.5}}, "did you mean density"),
        ({"bogus_key": 1}, "bogus_key"),
        ({"dtype": "fp16"}, "did you mean float16"),
        ({"out_dtype": "float17"}, "float17"),
    ],
    ids=["b09-parameter", "b09-key", "c03-fp16", "c03-unknown"],
)
def test_typing_errors_stop_before_any_work(models, tmp_path, change, word):
    listed = entries(models["A"], models["B"], weight=[1, 1])
    recipe = {"merge_method": "ties", "models": listed, "base_model": str(models["BASE"])} | change
    with pytest.raises(PlanError, match=word):
        merger(tmp_path)(recipe)
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_the_float32_result_rounded_once(models, tmp_path):
    run = merger(tmp_path)
    exact = run(linear(models, 0.3, 0.4) | {"dtype": "float32"})
    got = run(linear(models, 0.3, 0.4) | {"dtype": "float32", "out_dtype": "bfloat16"})
    a, b = load(models["A"]), load(models["B"])
    for name, tensor in got.items():
        assert torch.equal(tensor, rounded(doubles(exact[name]), torch.bfloat16)), name
        assert_close(tensor, oracles.linear([doubles(a[name]), doubles(b[name])], (0.3, 0.4)))
    assert json.loads((tmp_path / "out-1" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dtype_alone_is_the_outputs_and_inputs_are_not_cast_to_it(models, tmp_path):
    run = merger(tmp_path)
    exact = run(linear(models, 0.3, 0.4))
    got = run(linear(models, 0.3, 0.4) | {"dtype": "bfloat16"})
    for name, tensor in got.items():
        assert torch.equal(tensor, rounded(doubles(exact[name]), torch.bfloat16)), name
    assert json.loads((tmp_path / "out-1" / "config.json").read_text())["dtype"] == "bfloat16"


def test_references_as_text_and_as_mappings_mean_the_same(models, merged):
    plain, nested = linear(models, 1, 3), linear(models, 1, 3)
    nested["models"][0]["model"] = {"model": {"path": str(models["A"])}}
    first, second = merged(plain), merged(nested)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
