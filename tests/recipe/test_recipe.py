"""Recipes: mergekit's YAML is read as mergekit reads it, and one message names all errors."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergekit_lfm.api.merge_plans import plan_merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.method import REQUIRED, Parameter
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.settings import SettingsTable
from mergekit_lfm.recipe.values import as_data, read_setting, value_of

WEIGHT = Parameter("weight", REQUIRED, per_input=True, doc="")
Q0, LAST = "model.layers.0.self_attn.q_proj.weight", (3, 4)


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """A folder with the empty models A, B, C and BASE, which is also the working directory."""
    for name in ("A", "B", "C", "BASE"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def linear(**more):
    """A valid recipe, changed by `more`."""
    entries = [{"model": "A", "parameters": {"weight": 1}}, {"model": "B", "parameters": {"weight": 3}}]
    return {"merge_method": "linear", "models": entries} | more


def slerp(t):
    return {
        "merge_method": "slerp",
        "models": [{"model": "A"}, {"model": "B"}],
        "base_model": "A",
        "parameters": {"t": t},
    }


def refused(recipe):
    with pytest.raises(PlanError) as caught:
        Recipe.parse(recipe)
    return str(caught.value)


def weights(recipe, tensor=Q0, layer=None):
    return [values["weight"] for values in Recipe.parse(recipe).parts[0].settings(tensor, layer).inputs]


def t_of(setting, tensor=Q0, layer=None):
    return Recipe.parse(slerp(setting)).parts[0].settings(tensor, layer).shared["t"]


# Scopes, filters, gradients


def test_switches_may_be_numbers():
    """Searches for recipes write 1.0 for true."""
    values = [Recipe.parse(linear(parameters={"normalize": raw})).parts[0] for raw in (1.0, 1, 0, 0.0)]
    assert [part.settings(Q0, None).shared["normalize"] for part in values] == [True, True, False, False]


def test_a_models_own_value_comes_before_the_top_levels_and_that_before_the_default():
    entries = [{"model": "A", "parameters": {"weight": 1}}, {"model": "B"}]
    ties = {"merge_method": "ties", "base_model": "BASE", "models": entries, "parameters": {"weight": 5}}
    settings = Recipe.parse(ties).parts[0].settings(Q0, None)
    assert [values["weight"] for values in settings.inputs] == [1, 5]
    assert [values["density"] for values in settings.inputs] == [1, 1]
    assert settings.shared["normalize"] is True


def test_a_filter_without_a_match_leaves_the_word_to_the_next_scope():
    own = {"weight": [{"filter": "mlp", "value": 7}]}
    recipe = linear(models=[{"model": "A", "parameters": own}, {"model": "B"}], parameters={"weight": 2})
    assert weights(recipe) == [2, 2]
    assert weights(recipe, "model.layers.0.mlp.up_proj.weight") == [7, 2]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{"filter": "self_attn", "value": 0.1}, {"filter": "q_proj", "value": 0.2}, {"value": 0.3}], 0.1),
        ([{"filter": "q_proj", "value": 0.2}, {"filter": "self_attn", "value": 0.1}], 0.2),
        ([{"filter": "mlp", "value": 0.1}, {"filter": "*", "value": 0.3}], 0.3),
        ([{"filter": "q.proj", "value": 0.1}, {"value": 0.3}], 0.3),
        ([{"filter": "layers.*.self", "value": 0.1}, {"value": 0.3}], 0.3),
        ({"filter": "q_proj", "value": 0.4}, 0.4),
        ({"value": 0.4}, 0.4),
    ],
)
def test_filters_are_substrings_and_the_first_match_wins(rules, expected):
    assert t_of(rules) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [((0, 4), 0.0), ((1, 4), 2 / 3), ((2, 4), 4 / 3), (LAST, 2.0), ((0, 1), 2.0), (None, 0.0), ((1, 3), 1.0)],
)
def test_gradients_run_over_the_layers_and_outside_them_start(layer, expected):
    assert t_of([0, 1, 2], layer=layer) == pytest.approx(expected, abs=1e-15)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6),
    st.integers(1, 80).flatmap(lambda count: st.tuples(st.integers(0, count - 1), st.just(count))),
)
def test_gradients_are_piecewise_linear(points, layer):
    index, count = layer
    position = 1.0 if count == 1 else index / (count - 1)
    expected = np.interp(position, np.linspace(0, 1, len(points)), points) if len(points) > 1 else points[0]
    (rule,) = read_setting(points, WEIGHT)
    value = value_of(rule, WEIGHT, layer)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_gradients_of_switches_take_turns():
    normalize = Parameter("normalize", True, per_input=False, kind="bool", doc="")
    (rule,) = read_setting([True, False, True], normalize)
    assert [value_of(rule, normalize, (i, 5)) for i in range(5)] == [True, True, False, False, True]


def test_numbers_may_be_text():
    assert weights(linear(parameters={"weight": "1e-1"}, models=[{"model": "A"}])) == [0.1]
    assert Recipe.parse("merge_method: linear\nmodels: [{model: A, parameters: {weight: [1e-1, 2]}}]").parts[
        0
    ].settings(Q0, (0, 2)).inputs == ({"weight": 0.1},)


def test_a_filter_that_misses_names_the_tensor_and_the_parameter():
    recipe = Recipe.parse(slerp([{"filter": "mlp", "value": 1}]))
    with pytest.raises(PlanError, match=r"parameters\.t: no filter matches model\.layers\.0\.self_attn"):
        recipe.parts[0].settings(Q0, None)


def test_mergekits_int8_mask_is_read_and_changes_nothing():
    assert weights(linear(parameters={"int8_mask": True})) == [1, 3]
    assert Recipe.parse(linear(parameters={"int8_mask": True})).normalised()["parameters"] == {}


# Models and their roles


def labels(recipe):
    parsed = Recipe.parse(recipe)
    return [model.label for model in parsed.parts[0].inputs], [model.label for model in parsed.all_models]


def test_the_base_is_not_an_input_if_deltas_are_merged():
    recipe = {"merge_method": "task_arithmetic", "base_model": "BASE", "parameters": {"weight": 1}}
    listed = [{"model": "A"}, {"model": "BASE"}, {"model": "B"}]
    expected = (["A", "B"], ["BASE", "A", "B"])
    assert labels(recipe | {"models": listed}) == labels(recipe | {"models": listed[::2]}) == expected


def test_the_base_is_an_input_of_linear_where_it_stands_or_last():
    entries = [{"model": name} for name in ("A", "BASE", "B")]
    recipe = linear(base_model="BASE", parameters={"weight": 1})
    assert labels(recipe | {"models": entries}) == (["A", "BASE", "B"], ["BASE", "A", "B"])
    assert labels(recipe | {"models": entries[::2]}) == (["A", "B", "BASE"], ["BASE", "A", "B"])


def test_slerp_starts_at_the_base_wherever_it_is_listed():
    for entries in (["A", "B"], ["B", "A"], ["B"]):
        recipe = slerp(0.5) | {"models": [{"model": name} for name in entries]}
        assert labels(recipe) == (["A", "B"], ["A", "B"])


def test_the_same_model_written_in_two_ways_is_one_base():
    recipe = slerp(0.5) | {"base_model": {"model": {"path": "./A"}}, "models": [{"model": "A"}, {"model": "B"}]}
    assert labels(recipe) == (["./A", "B"], ["./A", "B"])


def test_a_model_given_twice_is_two_inputs_with_labels_of_their_own():
    entries = [{"model": "A", "parameters": {"weight": 1}}, {"model": "A", "parameters": {"weight": 2}}]
    recipe = Recipe.parse(linear(models=entries))
    assert [model.label for model in recipe.parts[0].inputs] == ["A", "A (2)"]
    assert len({model.source for model in recipe.parts[0].inputs}) == 1
    assert weights(linear(models=entries)) == [1, 2]


def test_paths_are_relative_to_the_recipe_then_to_the_working_directory(models):
    folder = models / "recipes"
    (folder / "A").mkdir(parents=True)
    recipe = Recipe.parse(linear(), where=folder)
    assert [model.source for model in recipe.parts[0].inputs] == [(folder / "A").resolve(), (models / "B").resolve()]
    (models / "B").rmdir()
    with pytest.raises(PlanError) as caught:
        Recipe.parse(linear(), where=folder)
    assert str(folder / "B") in str(caught.value) and str(models / "B") in str(caught.value)


def test_references_may_be_mappings_or_paths(models):
    for ref in ({"model": {"path": "A"}}, {"model": {"path": "A", "revision": None}, "lora": None}, models / "A"):
        entries = [{"model": ref, "parameters": {"weight": 1}}]
        assert Recipe.parse(linear(models=entries)).parts[0].inputs[0].source == (models / "A").resolve()


def test_a_folder_whose_name_holds_a_plus_is_a_folder(models):
    (models / "A+B").mkdir()
    assert labels(linear(models=[{"model": "A+B", "parameters": {"weight": 1}}])) == (["A+B"], ["A+B"])


# Refusals


def test_all_problems_come_in_one_message(models):
    message = refused(
        """
        merge_methd: ties
        merge_method: ties
        base_model: BASE
        dtype: fp16
        models:
        - {model: A, paramters: {weight: 1}}
        - {model: gone, parameters: {densty: .5, weight: [1, x], density: 2}}
        """
    )
    assert message.splitlines()[0] == "recipe: 7 problems"
    for line in (
        "merge_methd: unknown key, did you mean merge_method?",
        "dtype: found 'fp16', expected a dtype; did you mean float16?",
        "models[0].paramters: unknown key, did you mean parameters?",
        f"models[1].model: found 'gone', but there is no {models / 'gone'}",
        "models[1].parameters.densty: ties has no such parameter, did you mean density?",
        "models[1].parameters.weight[1]: found 'x', expected a number",
        "models[1].parameters.density: found 2, expected a number of at most 1",
    ):
        assert f"\n  {line}" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"merge_method": "lineer"}, "did you mean linear?"),
        ({"merge_method": 3}, "merge_method: found 3, expected text"),
        ({"models": []}, "models: required"),
        ({"models": "A"}, "models: found 'A', expected a list of models"),
        ({"models": ["A"]}, "models[0]: found 'A', expected a mapping such as {model: path"),
        ({"models": [{}]}, "models[0].model: required"),
        ({"models": [{"model": ""}]}, "models[0].model: found ''"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"seed": True}, "seed: found True"),
        ({"dtype": "int64"}, "dtype: found 'int64'"),
        ({"out_dtype": "float8_e4m3fn"}, "out_dtype: found 'float8_e4m3fn'"),
        ({"slices": [{}]}, "slices[0].sources: required"),
        ({"modules": {"text": {}}}, "found `models` and `modules`, expected one of them"),
        (
            {"parameters": {"normalise": True}},
            "parameters.normalise: linear has no such parameter, did you mean",
        ),
        ({"parameters": {"normalize": 2}}, "parameters.normalize: found 2, expected true or false"),
        ({"parameters": {"normalize": [True, "no"]}}, "parameters.normalize[1]: found 'no'"),
        ({"parameters": {"weight": []}}, "parameters.weight: found an empty list"),
        ({"parameters": {"weight": True}}, "parameters.weight: found True, expected a number"),
        ({"parameters": {"weight": math.nan}}, "parameters.weight: found nan, expected a finite number"),
        ({"parameters": {"weight": "inf"}}, "parameters.weight: found 'inf', expected a finite number"),
        ({"parameters": {"weight": {"filter": "q"}}}, "parameters.weight: found a filter without `value`"),
        (
            {"parameters": {"weight": {"fliter": "q", "value": 1}}},
            "parameters.weight: unknown key 'fliter', did",
        ),
        ({"parameters": {"weight": [{"value": 1}, 2]}}, "parameters.weight[1]: found 2 beside filters"),
        (
            {"parameters": {"weight": [{"filter": 1, "value": 1}]}},
            "parameters.weight[0].filter: found 1, expected",
        ),
        ({"parameters": {"weight": [{"value": [1, "x"]}]}}, "parameters.weight[0].value[1]: found 'x'"),
        ({"parameters": {"weight": [[1]]}}, "parameters.weight[0]: found [1], expected a number"),
        ({"parameters": [1]}, "parameters: found [1], expected a mapping"),
        ({"base_model": "C"}, "base_model: C has no weight, required by linear"),
        (
            {"models": [{"model": "A"}, {"model": "B"}]},
            "models[1].parameters.weight: B has no weight, req",
        ),
        ({"models": [{"model": "org/na--me"}]}, "expected a folder, or a model on the Hub as org/name or"),
        ({"models": [{"model": "a/b/c"}]}, "expected a folder, or a model on the Hub as org/name or"),
        ({"push": "name"}, "push.repo: found 'name', expected a repository on the Hub as org/name"),
        ({"push": {"repo": "org/name@main"}}, "push.repo: found 'org/name@main', expected a repository"),
        ({"push": {"repo": "org/name", "privat": True}}, "push.privat: unknown key, did you mean private?"),
        ({"push": {"private": True}}, "push.repo: required"),
        ({"push": {"repo": "org/name", "private": "yes"}}, "push.private: found 'yes', expected a valid boolean"),
        ({"revision": "main"}, "write the revision after the model's name: org/name@revision"),
        ({"models": [{"model": "A+nowhere"}]}, "models[0].model: found 'nowhere', but there is no "),
        ({"models": [{"model": "A", "scale": 0.5}]}, "`scale` beside a model is of an adapter: name one as `adapter`"),
        (
            {"models": [{"model": "A", "adapter": "B", "scale": "x"}]},
            "models[0].model: scale: found 'x', expected a num",
        ),
        (
            {"models": [{"model": "A", "adapter": [3]}]},
            "models[0].model: adapter: found 3, expected an adapter's folder",
        ),
        ({"models": [{"model": {"model": "A", "lora": {"pth": "B"}}}]}, "unknown key 'pth'"),
        ({"align": {"to": "A"}}, "align: an alignment belongs to one model: put `align` beside it"),
        ({"models": [{"model": "A", "align": 3}]}, "models[0].align"),
        ({"models": [{"model": "A", "align": {}}, {"model": "B"}]}, "models[0].align: found {}, expected {to: MODEL"),
        (
            {"models": [{"model": "A", "align": {"to": "B", "method": "rotation", "normalise": 2}}, {"model": "B"}]},
            "models[0].align.normalise: found 2, expected true or false",
        ),
        ({"models": [{"model": "A", "align": "t.st"}]}, "models[0].align: found 't.st', but there is no"),
        (
            {"models": [{"model": "A", "align": {"to": "X"}}, {"model": "B"}]},
            "models[0].align.to: found 'X', expected a model of this recipe that is not aligned itself",
        ),
        (
            {"models": [{"model": "A", "align": {"to": "A"}}, {"model": "B"}]},
            "models[0].align.to: found 'A', expected a model of this recipe that is not aligned itself",
        ),
        (
            {"models": [{"model": "A", "align": {"to": "B", "method": "ropation"}}, {"model": "B"}]},
            "models[0].align.method: unknown method 'ropation', did you mean rotation?",
        ),
        (
            {"models": [{"model": "A", "align": {"to": "B", "restart": 2}}, {"model": "B"}]},
            "models[0].align.restart: weight_matching has no such parameter, did you mean restarts?",
        ),
        (
            {"models": [{"model": "A", "align": {"to": "B", "restarts": 0}}, {"model": "B"}]},
            "models[0].align.restarts: found 0, expected a whole number of at least 1",
        ),
        (
            {"models": [{"model": "A", "align": {"to": "B", "method": "activation_matching"}}, {"model": "B"}]},
            "models[0].align.stats: activation_matching needs cross moments of both models",
        ),
        (
            {"models": [{"model": "A", "align": {"to": "B", "method": "ot", "stats": "x"}}, {"model": "B"}]},
            "models[0].align.stats: found 'x', but there is no",
        ),
        (
            {"base_model": "B", "models": [{"model": "B", "align": {"to": "A"}}, {"model": "A"}]},
            "models[0].align: B is the base; align the other models to it",
        ),
    ],
)
def test_refused_with_its_place(change, expected):
    assert expected in refused(linear(**change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"base_model": None}, "base_model: required by slerp"),
        ({"parameters": {}}, "parameters.t: required by slerp"),
        (
            {"models": [{"model": n} for n in "ABC"]},
            "slerp takes exactly 2 models, the base included; found 3",
        ),
        ({"models": [{"model": "B", "parameters": {"t": 1}}]}, "models[0].parameters.t: t is shared by all inputs"),
    ],
)
def test_refused_for_its_roles(change, expected):
    assert expected in refused(slerp(0.5) | change)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe: it is empty"),
        ("- a", "expected a mapping"),
        ("models: [1", "recipe: line 1, column 11:"),
        ("merge_method: linear\nmodels: []\nmerge_method: ties", "line 3: merge_method repeats the key of line 1"),
        ("models: [{model: A, parameters: {weight: 1, weight: 2}}]", "line 1: weight repeats the key of line 1"),
        ("a: 1\n---\nb: 1", "found 2 documents"),
        ("a: \x00", "not YAML"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("merge_method: linear\noutput: 2024-13-45", "line 2, column 9:  found '2024-13-45', not a valid timestamp"),
        ("a: {b: [0x_]}", "line 1, column 9:"),
        ("a: !!int ''", "not a valid int"),
        ("a: !!bool perhaps", "not a valid bool"),
        ("a: !!timestamp today", "not a valid timestamp"),
    ],
)
def test_text_that_is_not_a_recipe(text, expected):
    assert expected in refused(text)


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b"a: [", "line 1, column 5")]
)
def test_files_that_are_not_recipes(tmp_path, content, expected):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=expected) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value)


def test_a_home_that_nobody_has_is_refused():
    assert "models[0].model: found '~nobody-here/A', but no user has the home folder ~nobody-here" in refused(
        linear(models=[{"model": "~nobody-here/A"}])
    )


def test_the_output_may_be_in_the_home_folder(models, monkeypatch):
    save_file({"w": np.ones(2, "float32")}, models / "A" / "model.safetensors")
    monkeypatch.setenv("HOME", str(models / "home"))
    recipe = linear(models=[{"model": "A"}], parameters={"weight": 1})
    for output, path in (("~/x", models / "home" / "x"), (None, Path("merged/r"))):
        Path("r.yaml").write_text(yaml.safe_dump(recipe | ({"output": output} if output else {})))
        assert plan_merge("r.yaml").path == path
    with pytest.raises(PlanError, match="output: found '~nobody-here/x'"):
        plan_merge({**recipe, "output": "~nobody-here/x"})


# The canonical form


def test_the_canonical_form_forgets_spelling_and_parses_back(models):
    spelt = Recipe.parse(
        """
        merge_method: ties
        base_model: {model: {path: BASE}}
        models:
        - {model: A, parameters: {weight: "1", density: [1e-1, .5]}}
        - {model: B}
        - {model: BASE}
        parameters: {weight: [{filter: mlp, value: 2}, {filter: "*", value: [0, 1]}], int8_mask: true}
        dtype: torch.float32
        output: out
        tokenizer:
        slices: []
        """
    ).normalised()
    assert Recipe.parse(json.loads(json.dumps(spelt))).normalised() == spelt
    assert spelt["dtype"] == "float32" and "output" not in spelt
    assert spelt["models"][0] == {"model": "A", "parameters": {"density": [0.1, 0.5], "weight": 1.0}}
    assert str(models) not in json.dumps(spelt)


@given(
    st.lists(
        st.fixed_dictionaries({"filter": st.none() | st.text(), "value": st.lists(st.floats(-9, 9), min_size=1)}),
        min_size=1,
    )
)
def test_settings_read_back_from_their_data(rules):
    setting = read_setting(rules, WEIGHT)
    assert read_setting(json.loads(json.dumps(as_data(setting))), WEIGHT) == setting


def test_a_copy_with_another_seed_is_the_same_merge():
    recipe = Recipe.parse(linear()).model_copy(update={"seed": 7})
    assert recipe.normalised() == Recipe.parse(linear(seed=7)).normalised()
    assert [model.label for model in recipe.parts[0].inputs] == ["A", "B"]


def test_every_default_is_a_value_that_a_recipe_could_give():
    for method in METHODS.values():
        for parameter in method.parameters:
            if parameter.default is not REQUIRED:
                (rule,) = read_setting(parameter.default, parameter)
                assert rule.values == (parameter.default,)


def test_reading_a_recipe_imports_no_torch():
    code = "import mergekit_lfm.recipe.recipe, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_base_with_edits_is_another_model(models):
    (models / "patch.safetensors").touch()
    entry = {"model": "BASE", "edits": ["patch.safetensors"], "parameters": {"weight": 1}}
    recipe = Recipe.parse({"merge_method": "task_arithmetic", "base_model": "BASE", "models": [entry]})
    assert [(model.label, len(model.edits)) for model in recipe.all_models] == [("BASE", 0), ("BASE (2)", 1)]


def test_a_table_of_settings_has_those_of_the_recipe() -> None:
    """With filters and gradients; tensors that the same rules match share one object."""
    recipe = Recipe.parse(
        {
            "merge_method": "ties",
            "base_model": "A",
            "models": [
                {"model": "B", "parameters": {"weight": [0.1, 0.9], "density": [{"filter": "mlp", "value": 0.3}]}},
                {"model": "C", "parameters": {"weight": [{"filter": "attn", "value": [0.5, 1]}, {"value": 2}]}},
            ],
            "parameters": {"density": 0.7},
        }
    )
    table = SettingsTable(recipe.parts[0])
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp.up", "mlp.down", "attn.q")]
    places = [*((name, (int(name.split(".")[2]), 3)) for name in names), ("norm.weight", None)]
    found = [table.of(*place) for place in places]
    assert found == [recipe.parts[0].settings(*place) for place in places]
    assert found[0] is found[1] and len({id(settings) for settings in found}) == 7
