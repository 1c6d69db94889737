"""Where tensors come from: sources, layers, and the line of the recipe behind every value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from models import save_checkpoint

from mergekit_lfm import PlanError, explain_plan, plan_merge
from mergekit_lfm.recipe.parts import Settings

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("attn", "mlp")),
    "model.norm.running_var",  # averaged by every method
]

GRADIENT = """\
merge_method: slerp
base_model: a
models:
  - model: b
parameters:
  t:
    - filter: attn
      value: [0, 0.9]   # over the layers
    - value: 0.5
"""

OWN = """\
merge_method: dare_linear
base_model: o
models:
  - model: a
    parameters:
      weight: 0.75
  - model: b
parameters:
  weight: &half 0.25
  density: [0.5, 1.0]
"""

SLICES = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - model: b
        layer_range: [2, 4]
        parameters:
          weight:
            - {filter: layers.2., value: 3}
            - value: 4
    parameters: {weight: 2}
  - sources:
      - {model: a, layer_range: [3, 4]}
    parameters:
      weight: 7
"""

MODULES = """\
modules:
  model:
    merge_method: linear
    models: [{model: a}, {model: b}]
    parameters:
      weight: 2
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with three models of four layers."""
    draw = torch.Generator().manual_seed(0)
    for name in "oab":
        tensors = {name: torch.randn(3, 3, generator=draw) for name in NAMES}
        save_checkpoint(tmp_path / name, tensors, {"model_type": "llama", "num_hidden_layers": 4})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def explained(recipe: str, *names: str) -> list[dict[str, Any]]:
    """The answer of `plan --explain`."""
    Path("recipe.yaml").write_text(recipe)
    patterns = [part for name in names for part in ("--explain", name)]
    found: list[dict[str, Any]] = answer(run("plan", "recipe.yaml", *patterns, "--json"))["tensors"]
    return found


def origins(tensor: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(v["parameter"], v["model"], v["value"], v["place"], v["line"]) for v in tensor["values"]]


def test_a_gradient_s_value_has_the_line_of_its_rule() -> None:
    attn, mlp = explained(GRADIENT, "model.layers.1.*")
    assert attn["name"] == "model.layers.1.attn.weight" and attn["layer"] == [1, 4] and attn["method"] == "slerp"
    assert attn["dtype"] == attn["arithmetic"] == "float32"
    assert [tuple(source.values()) for source in attn["sources"]] == [
        ("base", "a", attn["name"]),
        ("input", "b", attn["name"]),
    ]
    ((parameter, model, value, place, line),) = origins(attn)
    assert (parameter, model, place, line) == ("t", None, "parameters.t[0]", 7) and value == pytest.approx(0.3)
    assert origins(mlp) == [("t", None, 0.5, "parameters.t[1]", 9)]


def test_each_model_s_value_and_each_default_is_named() -> None:
    (embedding,) = explained(OWN, NAMES[0])
    assert embedding["layer"] is None
    by_name = {(v[0], v[1]): v[2:] for v in origins(embedding)}
    assert by_name["weight", "a"] == (0.75, "models[0].parameters.weight", 6)
    assert by_name["weight", "b"] == (0.25, "parameters.weight", 9)
    assert by_name["density", "a"] == by_name["density", "b"] == (0.5, "parameters.density", 10)
    assert by_name["rescale", None] == (True, None, None)
    text = run("plan", "recipe.yaml", "--explain", NAMES[0]).stdout
    assert "a: 0.75" in text and "models[0].parameters.weight, line 6" in text and "default" in text


def test_a_slice_s_tensors_come_from_other_layers() -> None:
    first, third = explained(SLICES, "model.layers.0.attn.weight", "model.layers.2.attn.weight")
    assert [source["tensor"] for source in first["sources"]] == [f"model.layers.{i}.attn.weight" for i in (0, 2)]
    weights = {v[1]: v[2:] for v in origins(first) if v[0] == "weight"}
    assert weights == {
        "a": (2, "slices[0].parameters.weight", 11),
        "b": (3, "slices[0].sources[1].parameters.weight[0]", 9),
    }
    assert third["sources"] == [{"role": "input", "model": "a", "tensor": "model.layers.3.attn.weight"}]
    assert ("weight", "a", 7, "slices[1].parameters.weight", 15) in origins(third)


@pytest.mark.parametrize("recipe", [GRADIENT, OWN, SLICES, MODULES])
def test_the_values_are_those_of_the_plan(recipe: str) -> None:
    Path("recipe.yaml").write_text(recipe)
    planned = plan_merge("recipe.yaml", "out").result
    jobs = {job.name: job for job in planned.plan.tensors}
    explanations = explain_plan(planned, ["*"])
    assert [each.name for each in explanations] == [*jobs]
    for each in explanations:
        shared = {value.parameter: value.value for value in each.values if value.model is None}
        models = dict.fromkeys(value.model for value in each.values if value.model is not None)
        inputs = [{v.parameter: v.value for v in each.values if v.model == model} for model in models]
        settings = jobs[each.name].settings
        assert Settings(shared, tuple(inputs or ({} for _ in settings.inputs))) == settings


def test_every_stage_is_searched() -> None:
    first = OWN.replace("&half ", "") + "name: mixed\n---\n"
    Path("recipe.yaml").write_text(
        first + "merge_method: linear\nmodels: [{model: mixed}, {model: a}]\nparameters: {weight: 1}\n"
    )
    found = answer(run("plan", "recipe.yaml", "--explain", NAMES[0], "--json"))["tensors"]
    assert [(each["stage"], each["method"]) for each in found] == [("mixed", "dare_linear"), ("", "linear")]
    earlier, last = map(origins, found)
    assert ("weight", "a", 0.75, "models[0].parameters.weight", 6) in earlier
    assert ("weight", "mixed", 1.0, "parameters.weight", 15) in last


def test_a_name_that_no_tensor_has_is_refused_with_the_nearest() -> None:
    Path("recipe.yaml").write_text(OWN)
    message = refusal(run("plan", "recipe.yaml", "--explain", "model.layers.1.attn.wieght"))
    assert "model.layers.1.attn.weight" in message and "no tensor of the output is named" in message
    error = json.loads(run("plan", "recipe.yaml", "--explain", "x", "--json").stdout)["error"]
    assert error["kind"] == "PlanError"
    with pytest.raises(PlanError, match="2 problems"):
        explain_plan(plan_merge("recipe.yaml", "out").result, ["x", "y", "*"])
