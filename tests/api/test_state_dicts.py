"""Models in memory, merged as saved ones are: the same bytes, the same parameters, mergekit's way of calling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_merges import load_all
from models import save_checkpoint

from mergekit_lfm import PlanError, merge, merge_state_dicts

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp")),
]
State = dict[str, torch.Tensor]


def states(count: int = 3) -> list[State]:
    draw = torch.Generator().manual_seed(0)
    return [{name: torch.randn(6, 5, generator=draw) for name in NAMES} for _ in range(count)]


RULES = [{"filter": "attn", "value": [0.2, 0.8]}, {"value": 0.5}]
CASES: list[tuple[str, bool, dict[str, Any], list[dict[str, Any]]]] = [
    ("linear", False, {}, [{"weight": [1, 0]}, {"weight": 2}, {"weight": RULES}]),
    ("slerp", False, {"t": RULES}, [{}, {}]),
    ("task_arithmetic", True, {"lambda": 0.7}, [{"weight": 0.5}, {"weight": [0.1, 0.9]}]),
    ("ties", True, {"density": 0.4, "normalize": False}, [{"weight": 1}, {"weight": 0.5}]),
    ("dare_ties", True, {"weight": 1}, [{"density": 0.5}, {"density": 0.3}]),
    ("model_stock", True, {}, [{}, {}]),
    ("karcher", False, {}, [{}, {}, {}]),
]


@pytest.mark.parametrize(("method", "based", "shared", "own"), CASES, ids=[case[0] for case in CASES])
def test_the_bytes_are_those_of_saved_models(
    tmp_path: Path, method: str, based: bool, shared: dict[str, Any], own: list[dict[str, Any]]
) -> None:
    models = states(len(own) + based)
    paths = [str(save_checkpoint(tmp_path / str(i), model, {"model_type": "llama"})) for i, model in enumerate(models)]
    lines = [{"model": path, "parameters": each} for path, each in zip(paths[based:], own, strict=True)]
    recipe = {"merge_method": method, "models": lines, "parameters": shared, "seed": 3}
    if based or method == "slerp":
        recipe["base_model"] = paths[0]
    saved = load_all(Path(merge(recipe, tmp_path / "out")))
    names = list(dict.fromkeys(name for each in own for name in each))
    each: dict[str, Any] = {name: [values[name] for values in own] for name in names}
    merged = merge_state_dicts(models, method, base=0 if based else None, parameters={**shared, **each}, seed=3)
    assert list(merged) == NAMES
    assert all(torch.equal(merged[name], saved[name]) for name in NAMES)


def test_mergekit_s_call_gives_the_weighted_mean() -> None:
    a, b, _ = states()
    by_name = merge_state_dicts({"a": a, "b": b}, "linear", parameters={"weight": {"a": 0.25, "b": 0.75}})
    by_order = merge_state_dicts([a, b], "linear", parameters={"weight": [0.25, 0.75]})
    for name in NAMES:
        mean = (0.25 * a[name].double() + 0.75 * b[name].double()).float()
        torch.testing.assert_close(by_name[name], mean, rtol=0, atol=1e-6)
        assert torch.equal(by_name[name], by_order[name])


def test_mergekit_s_call_with_a_base_among_the_models() -> None:
    o, a, b = states()
    parameters = {"weight": {"a": 0.3, "b": -0.5}, "lambda": 2.0, "normalize": False}
    merged = merge_state_dicts({"a": a, "o": o, "b": b}, "task_arithmetic", base="o", parameters=parameters)
    for name in NAMES:
        base = o[name].double()
        expected = base + 2 * (0.3 * (a[name].double() - base) - 0.5 * (b[name].double() - base))
        torch.testing.assert_close(merged[name], expected.float(), rtol=0, atol=2e-6)
    apart = merge_state_dicts([a, b], "task_arithmetic", base=o, weight=[0.3, -0.5], lambda_=2.0)
    assert all(torch.equal(merged[name], apart[name]) for name in NAMES)


def test_the_call_of_sentence_transformers() -> None:
    """As its version 6.2 merges encoders: ids of the models are their indices, the dtype is given."""
    models = dict(enumerate(states()))
    options: dict[str, Any] = {"base": 0, "parameters": {"weight": 1.0}, "dtype": torch.float32, "out_dtype": None}
    merged = merge_state_dicts(models, "task_arithmetic", **options, batch_options=None)
    for name in NAMES:
        base, a, b = (state[name].double() for state in models.values())
        torch.testing.assert_close(merged[name], (a + b - base).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "out"), [("float32", None), ("float64", "bfloat16"), (None, "float16")])
def test_the_dtype_is_as_of_a_recipe(dtype: str | None, out: str | None) -> None:
    """Arithmetic in float32 or more, from the numbers as they are; one rounding."""
    narrow = [{name: x.bfloat16() for name, x in state.items()} for state in states()[:2]]
    merged = merge_state_dicts(narrow, "linear", weight=1.0, dtype=dtype, out_dtype=out)
    for name in NAMES:
        mean = (narrow[0][name].double() + narrow[1][name].double()) / 2
        expected = mean.float().to(getattr(torch, out or dtype or "bfloat16"))
        assert torch.equal(merged[name], expected)
    with pytest.raises(PlanError, match=r"(?s)dtype: found 'int8'.*out_dtype: found torch.int32"):
        merge_state_dicts(narrow, "linear", weight=1.0, dtype="int8", out_dtype=torch.int32)


def test_tensors_that_some_lack_may_be_left_out() -> None:
    a, b, _ = states()
    merged = merge_state_dicts([a, {name: b[name] for name in NAMES[1:]}], "linear", weight=1.0, strict=False)
    assert list(merged) == NAMES[1:]
    assert torch.equal(merged[NAMES[1]], merge_state_dicts([a, b], "linear", weight=1.0)[NAMES[1]])


def test_the_layers_of_a_sentence_encoder_s_dense_module_are_merged() -> None:
    modules = [torch.nn.Linear(4, 3) for _ in range(2)]
    merged = merge_state_dicts(modules, "slerp", parameters={"t": 1.0}, base=0)
    assert torch.equal(merged["weight"], modules[1].weight) and not merged["weight"].requires_grad


def test_buffers_are_copied_averaged_or_refused() -> None:
    norms = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.running_var.fill_(1.0 + i)  # type: ignore[union-attr]
        norm.num_batches_tracked.fill_(5 + i)  # type: ignore[union-attr]
    merged = merge_state_dicts(norms, "task_arithmetic", base=norms[0], weight=[1.0, 1.0])
    assert merged["running_var"].tolist() == [1.5, 1.5] and merged["num_batches_tracked"].item() == 6
    ids = [{"w": torch.ones(1), "ids": torch.tensor([i])} for i in range(2)]
    with pytest.raises(PlanError, match=r"^ids: found torch\.int64 with other values"):
        merge_state_dicts(ids, "linear", weight=1)
    assert merge_state_dicts([ids[1], dict(ids[1])], "linear", weight=1)["ids"].tolist() == [1]


def test_tied_tensors_stay_one() -> None:
    models = states(2)
    for model in models:
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    merged = merge_state_dicts(models, "dare_linear", base=0, weight=1, density=0.5)
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]


def test_all_differences_are_one_message() -> None:
    a, b, _ = states()
    del b[NAMES[0]]
    b[NAMES[1]] = torch.ones(2)
    b["more"] = torch.ones(1)
    with pytest.raises(PlanError, match="the models differ, 3 problems") as refused:
        merge_state_dicts([a, b], "linear", weight=1)
    assert f"{NAMES[0]}: missing in 1" in str(refused.value) and f"{NAMES[1]}: 0 has [6, 5], 1 has [2]" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        ("lin", {}, "unknown method 'lin'"),
        ("ties_merging", {}, "ties_merging is a method of FusionBench that is not here"),
        ("linear", {}, "weight: required by linear"),
        ("linear", {"weight": {"0": 1}}, "weight: required by linear"),
        ("linear", {"weight": [1, 2]}, "found 2 values, expected a value for all models"),
        ("linear", {"weight": {"x": 1}}, "found a value for model 'x'"),
        ("linear", {"weight": 1, "wieght": 1}, "linear has no such parameter, did you mean weight?"),
        ("linear", {"weight": [1, 2, "x"]}, "weight of model 2: found 'x', expected a number"),
        ("ties", {"weight": 1}, "base: required by ties"),
        ("ties", {"weight": 1, "base": 7}, "base: found 7, expected one of the models"),
        ("ties", {"weight": 1, "base": 0, "scope": "global"}, "scope: one solve over the whole model"),
        ("slerp", {"t": 0.5}, "slerp takes exactly 2 models"),
        ("fisher", {}, "fisher needs statistics"),
    ],
)
def test_wrong_calls_are_refused(method: str, how: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refused:
        merge_state_dicts(states(), method, **how)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"w": [1, 2]}, "model 1: 'w': found list, expected a tensor"),
        ({"w": torch.empty(2, device="meta")}, "model 1: 'w': found a tensor on the meta device, .* load the weights"),
        ({"w": torch.ones(2).to_sparse()}, "model 1: 'w': found a tensor of layout .*sparse"),
        ({5: torch.ones(2)}, "model 1: 5: found a name of type int, expected text"),
    ],
)
def test_entries_that_are_no_tensors_with_data_are_named(entry: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        merge_state_dicts([{"w": torch.ones(2)}, entry], "linear", weight=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": None}, "models: found NoneType, expected a list of state dicts"),
        ({"parameters": 5}, "parameters: found int, expected a mapping"),
        ({"seed": -1}, "seed: found -1, expected a whole number from 0"),
        ({"seed": 2**64}, "seed: found .*, expected a whole number from 0"),
        ({"seed": "x"}, "seed: found 'x', expected a whole number from 0"),
        ({"method": 5}, "unknown method '5'"),
        ({"weight": [{"filter": "att", "value": 1}, {"value": 2}]}, "weight: filter 'att' is part of no tensor's name"),
    ],
)
def test_arguments_of_other_types_and_idle_filters_are_refused(arguments: dict[str, Any], message: str) -> None:
    both = {"models": [{"w": torch.ones(2)}, {"w": torch.ones(2)}], "method": "linear", "weight": 1}
    with pytest.raises(PlanError, match=message):
        merge_state_dicts(**{**both, **arguments})


def test_filters_for_all_tensors_need_no_further_value() -> None:
    merged = merge_state_dicts(
        [{"w": torch.ones(2)}, {"w": torch.zeros(2)}], "linear", weight=[{"filter": "w", "value": 1}]
    )
    assert torch.equal(merged["w"], torch.full((2,), 0.5))


def test_float8_is_copied_if_it_is_equal() -> None:
    small = torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn)
    merged = merge_state_dicts([{"w": small}, {"w": small.clone()}], "linear", weight=1)
    assert torch.equal(merged["w"].view(torch.uint8), small.view(torch.uint8))
    with pytest.raises(PlanError, match="with other values in other models"):
        merge_state_dicts([{"w": small}, {"w": (-small.float()).to(small.dtype)}], "linear", weight=1)
