"""Merges that use statistics: RegMean against joint least squares, whole checkpoints, and errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_faults import Forks, Ran
from helpers_stats import gram_of, write_fisher, write_grams
from models import output_of
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge, merge_tensors
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.artifacts.statistics import Layer
from mergekit_lfm.commands.show.plans import plan_data, plan_text
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.methods import regmean
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe

Arrays = list[np.ndarray]
INPUTS, OUTPUTS, HIDDEN = 6, 5, 7
FACTS = {"out": "out", "peak_memory": 1, "threads": 1, "free_disk": 1, "enough_disk": True}


def layers() -> list[Layer]:
    """A Linear with a bias, two Conv1D that read the same inputs, one of them without a bias."""
    return [
        Layer("a.weight", "a.bias", 1, INPUTS, "a", 50),
        Layer("b.weight", "b.bias", 0, HIDDEN, "b", 50),
        Layer("c.weight", None, 0, HIDDEN, "b", 50),
    ]


SHAPES = {
    "a.weight": (HIDDEN, INPUTS),
    "a.bias": (HIDDEN,),
    "b.weight": (HIDDEN, OUTPUTS),
    "b.bias": (OUTPUTS,),
    "c.weight": (HIDDEN, 2),
    "embedding": (9, INPUTS),
}


class Models:
    """Models of the shapes above with the inputs of their layers, and recipes that merge them."""

    def __init__(self, folder: Path, count: int = 3, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.count = folder, count
        generator = torch.Generator().manual_seed(0)
        self.tensors = [
            {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
            for _ in range(count)
        ]
        self.data = [
            {"a": torch.randn(50, INPUTS, generator=generator) + i, "b": torch.randn(50, HIDDEN, generator=generator)}
            for i in range(count)
        ]
        for i in range(count):
            (folder / f"m{i}").mkdir()
            save_file(self.tensors[i], folder / f"m{i}" / "model.safetensors")
            grams = {name: gram_of(x) for name, x in self.data[i].items()}
            write_grams(folder / f"m{i}.gram", folder / f"m{i}", grams, layers())
            fisher = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
            write_fisher(folder / f"m{i}.fisher", folder / f"m{i}", fisher)

    def recipe(self, method: str = "regmean", **parameters: Any) -> dict[str, Any]:
        kind = {"regmean": "gram", "fisher": "fisher"}[method]
        models = [{"model": f"m{i}", "stats": f"m{i}.{kind}"} for i in range(self.count)]
        return {"merge_method": method, "models": models, "parameters": parameters}

    def merge(self, recipe: dict[str, Any], out: str = "out", **options: Any) -> dict[str, torch.Tensor]:
        place = Path(merge(Recipe.parse(recipe, where=self.folder), self.folder / out, **options))
        return load_file(place / "model.safetensors")

    def refused(self, recipe: dict[str, Any], *needles: str, **options: Any) -> None:
        with pytest.raises((PlanError, FormatError)) as caught:
            self.merge(recipe, **options)
        assert [needle for needle in needles if needle not in str(caught.value)] == []
        assert not list(self.folder.glob("out*"))


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


# The formula


def least_squares(matrices: Arrays, data: Arrays, weights: list[float]) -> np.ndarray:
    """argmin_W sum_i w_i mean over rows x of X_i of |W x - W_i x|^2, by QR on all rows together."""
    scales = [np.sqrt(w / len(x)) for w, x in zip(weights, data, strict=True)]
    left = np.concatenate([s * x for s, x in zip(scales, data, strict=True)])
    right = np.concatenate([s * x @ m.T for s, x, m in zip(scales, data, matrices, strict=True)])
    return np.asarray(np.linalg.lstsq(left, right, rcond=None)[0].T)


def extended(x: torch.Tensor) -> np.ndarray:
    return np.concatenate([x.double().numpy(), np.ones((len(x), 1))], 1)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 2), (1500, 5), (4, 300)])
def test_regmean_of_linear_models_is_joint_least_squares(outputs: int, inputs: int) -> None:
    random = np.random.default_rng(inputs)
    data = [random.normal(i, 1 + i, (2 * inputs + 3, inputs)) for i in range(3)]
    matrices = [random.normal(0, 1, (outputs, inputs)) for _ in data]
    weights = [1.0, 0.5, 2.0]
    got = merge_tensors(
        "regmean",
        [torch.from_numpy(m) for m in matrices],
        statistics=[torch.from_numpy(x.T @ x / len(x)) for x in data],
        weight=weights,
        alpha=1.0,
        ridge=0.0,
    )
    assert np.allclose(got.numpy(), least_squares(matrices, data, weights), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inputs", [4, 300])
def test_alpha_and_ridge_are_as_documented(inputs: int) -> None:
    """Whether a Gram matrix is one band of rows or several."""
    random = np.random.default_rng(1)
    data = [random.normal(0, 1, (30, inputs)) for _ in range(2)]
    matrices = [random.normal(0, 1, (3, inputs)) for _ in data]
    grams = [x.T @ x / len(x) for x in data]
    alpha, ridge, weights = 0.7, 0.05, [0.25, 0.75]
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    total = sum(w * g for w, g in zip(weights, shrunk, strict=True))
    r = ridge * np.linalg.norm(total)
    mean = sum(w * m for w, m in zip(weights, matrices, strict=True))
    above = sum(w * m @ g for w, m, g in zip(weights, matrices, shrunk, strict=True)) + r * mean
    expected = np.linalg.solve((total + r * np.eye(inputs)).T, above.T).T
    given: dict[str, Any] = {
        "statistics": [torch.from_numpy(g) for g in grams],
        "weight": [1.0, 3.0],
        "alpha": alpha,
        "ridge": ridge,
    }
    got = merge_tensors("regmean", [torch.from_numpy(m) for m in matrices], **given)
    assert np.allclose(got.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 1e-9, 1e-6])
@pytest.mark.parametrize(("inputs", "rank"), [(8, 3), (64, 60), (128, 60)])
def test_null_vectors_of_the_data_keep_the_average(inputs: int, rank: int, ridge: float) -> None:
    """Data of low rank in both models, and inputs of very different sizes."""
    random = np.random.default_rng(inputs)
    sizes = 10.0 ** random.uniform(-1, 1, inputs)
    plane = random.normal(0, 1, (rank, inputs)) * sizes
    data = [random.normal(0, 1, (4 * inputs, rank)) @ plane for _ in range(2)]
    matrices = [random.normal(0, 1, (3, inputs)) for _ in data]
    grams = [torch.from_numpy(x.T @ x / len(x)).float() for x in data]
    given = [torch.from_numpy(m) for m in matrices]
    got = merge_tensors("regmean", given, statistics=grams, alpha=1.0, ridge=ridge).numpy()
    null = np.linalg.svd(plane)[2][rank:].T
    mean = (matrices[0] + matrices[1]) / 2
    moved = np.abs((got - mean) @ null).max()
    assert moved < (1e-3 if ridge < 1e-6 else 0.2)  # the null vectors are known to the float32 of the Gram matrices
    best = least_squares(matrices, data, [1.0, 1.0])
    if ridge < 1e-6:
        for x in data:
            assert np.abs(x @ got.T - x @ best.T).max() < 1e-2 * np.abs(x @ best.T).max()


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_directions_without_data_keep_the_average(ridge: float) -> None:
    """Input 3 is dead in both models, and 0 and 1 are always equal."""
    random = np.random.default_rng(2)
    data = [random.normal(0, 1, (30, 4)) for _ in range(2)]
    for x in data:
        x[:, 1], x[:, 3] = x[:, 0], 0
    matrices = [random.normal(0, 1, (3, 4)) for _ in data]
    grams = [torch.from_numpy(x.T @ x / 30).float() for x in data]
    given = [torch.from_numpy(m) for m in matrices]
    got = merge_tensors("regmean", given, statistics=grams, alpha=1.0, ridge=ridge).numpy()
    mean = (matrices[0] + matrices[1]) / 2
    assert np.allclose(got[:, 3], mean[:, 3], rtol=1e-12)
    assert np.allclose(got[:, 0] - got[:, 1], mean[:, 0] - mean[:, 1], atol=1e-5)
    best = least_squares(matrices, data, [1.0, 1.0])
    for x in data:
        assert np.allclose(x @ got.T, x @ best.T, atol=1e-4)


# Whole checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_of_a_checkpoint_is_regressed_or_averaged(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regmean, "OUTPUTS", 2)  # every layer is read and solved in several parts
    models = Models(tmp_path, dtype=dtype)
    weights = [1.0, 2.0, 0.5]
    recipe = models.recipe(alpha=1.0, ridge=0.0)
    for entry, weight in zip(recipe["models"], weights, strict=True):
        entry["parameters"] = {"weight": weight}
    merged = models.merge(recipe)
    data = {name: [extended(given[name]) for given in models.data] for name in ("a", "b")}
    exact = [{name: x.double().numpy() for name, x in tensors.items()} for tensors in models.tensors]
    tolerance: dict[str, Any] = {"rtol": 2.0**-8 if dtype == torch.bfloat16 else 0, "atol": 1e-4}
    both = least_squares([np.c_[t["a.weight"], t["a.bias"]] for t in exact], data["a"], weights)
    assert np.allclose(np.c_[merged["a.weight"].double(), merged["a.bias"].double()], both, **tolerance)
    both = least_squares([np.c_[t["b.weight"].T, t["b.bias"]] for t in exact], data["b"], weights)
    assert np.allclose(np.c_[merged["b.weight"].double().T, merged["b.bias"].double()], both, **tolerance)
    bare = [x[:, :-1] for x in data["b"]]
    assert np.allclose(
        merged["c.weight"].double(), least_squares([t["c.weight"].T for t in exact], bare, weights).T, **tolerance
    )
    mean = sum(w * t["embedding"] for w, t in zip(weights, exact, strict=True)) / sum(weights)
    assert np.allclose(merged["embedding"].double(), mean, rtol=2.0**-8, atol=1e-6)


def test_fisher_of_a_checkpoint_is_that_of_its_tensors(models: Models) -> None:
    merged = models.merge(models.recipe("fisher", epsilon=0.01, normalize=True))
    fishers = [load_file(models.folder / f"m{i}.fisher") for i in range(3)]
    norms = [sum(float(x.double().square().sum()) for x in f.values()) ** 0.5 for f in fishers]
    for name in SHAPES:
        shares = [f[f"fisher/{name}"].double() / norm + 0.01 for f, norm in zip(fishers, norms, strict=True)]
        sums = sum(s * t[name].double() for s, t in zip(shares, models.tensors, strict=True))
        assert torch.allclose(merged[name].double(), sums / sum(shares), rtol=1e-5, atol=1e-6)


def test_the_plan_and_the_lock_name_the_regressed_and_the_averaged(models: Models) -> None:
    plan = make_plan(Recipe.parse(models.recipe(), where=models.folder))
    data = plan_data(plan)
    assert data["methods"] == {"regmean": 5, "linear": 1}
    assert [entry["statistics"] for entry in data["statistics"]] == ["m0.gram", "m1.gram", "m2.gram"]
    assert data["averaged"] == {"tensors": 1, "numbers": 9 * INPUTS}
    assert re.search(r"averaged +1 tensor, 34% of the numbers", plan_text(plan, FACTS, verbose=False))
    sizes = [path.stat().st_size for path in models.folder.glob("*.gram")]
    assert plan.bytes_read > sum(sizes) / 2
    models.merge(models.recipe())
    lock = json.loads((models.folder / "out" / "merge.lock.json").read_text())
    method_of = {name: {**lock["common"], **entry}["method"] for name, entry in lock["tensors"].items()}
    assert (method_of["b.bias"], method_of["embedding"]) == ("regmean", "linear")
    assert [entry["statistics"] for entry in lock["statistics"]] == ["m0.gram", "m1.gram", "m2.gram"]
    assert lock["recipe"]["models"][1]["stats"] == "m1.gram"


def test_statistics_that_change_are_another_merge(models: Models) -> None:
    models.merge(models.recipe())
    path = models.folder / "m1.gram"
    write_grams(path, models.folder / "m1", {n: gram_of(2 * x) for n, x in models.data[1].items()}, layers())
    with pytest.raises(PlanError, match=r"other inputs: gram/a of m1.gram, gram/b of m1.gram changed"):
        models.merge(models.recipe())
    assert models.merge(models.recipe(), overwrite=True)


def test_fine_tunes_with_equal_times_are_distinguished(models: Models) -> None:
    """Archives that set all times to one value make such files: names, sizes, headers and times are the same."""
    for i in range(3):
        os.utime(models.folder / f"m{i}" / "model.safetensors", ns=(1, 1))
    assert models.merge(models.recipe(), "right")
    recipe = models.recipe()
    recipe["models"][0]["stats"], recipe["models"][1]["stats"] = "m1.gram", "m0.gram"
    models.refused(recipe, "2 problems", "m1.gram was collected on another model")


def test_statistics_belong_to_a_model_wherever_it_lies(models: Models) -> None:
    """A copy has other times, and shards, and is the same model."""
    merged = models.merge(models.recipe())
    shutil.rmtree(models.folder / "m0")
    (models.folder / "m0").mkdir()
    names = list(SHAPES)
    parts = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, part in parts.items():
        save_file({name: models.tensors[0][name] for name in part}, models.folder / "m0" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (models.folder / "m0" / "model.safetensors.index.json").write_text(json.dumps(index))
    place = Path(merge(Recipe.parse(models.recipe(), where=models.folder), models.folder / "again"))
    again = {name: x for file in place.glob("*.safetensors") for name, x in load_file(file).items()}
    assert all(torch.equal(again[name], merged[name]) for name in SHAPES)


def test_any_memory_and_threads_give_the_same_bytes(models: Models) -> None:
    plan = make_plan(Recipe.parse(models.recipe(), where=models.folder))
    least = max([*(Budget(plan).least(job) for job in plan.tensors), *(group.nbytes for group in plan.matrices)])
    models.merge(models.recipe(), "one", threads=1)
    models.merge(models.recipe(), "three", threads=3, memory=3 * least)
    assert output_of(models.folder / "three") == output_of(models.folder / "one")
    models.refused(models.recipe(), "raise --memory", memory=least - 1, threads=1)


@pytest.mark.parametrize("step", [13, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_merge_goes_on_to_the_same_bytes(models: Models, cli: Forks, step: int) -> None:
    (models.folder / "recipe.yaml").write_text(json.dumps(models.recipe()))

    def run(out: str, **fault: int) -> Ran:
        return cli.run("recipe.yaml", out, "--threads", 1, cwd=models.folder, sync_bytes=100, **fault)

    run("first")  # stores the models' content digests, so that later runs need not read them
    whole = run("whole")
    assert whole.code == 0, whole.err
    resumed = 0
    for at in range(1, len(whole.calls) + 1, step):
        assert run(f"out{at}", kill_at=at).code == -signal.SIGKILL
        again = run(f"out{at}")
        assert again.code == 0, again.err
        resumed += "by the interrupted run" in again.err
        assert output_of(models.folder / f"out{at}") == output_of(models.folder / "whole")
    assert resumed


# Errors


def test_statistics_of_another_model_are_refused(models: Models) -> None:
    recipe = models.recipe()
    recipe["models"][0]["stats"] = "m1.gram"
    models.refused(recipe, "m1.gram was collected on another model", "m0 has", "mergekit-lfm stats gram m0")


def test_statistics_of_another_kind_are_refused(models: Models) -> None:
    recipe = models.recipe()
    recipe["models"][2]["stats"] = "m2.fisher"
    models.refused(recipe, "m2.fisher holds fisher statistics, regmean needs gram")


def test_a_model_without_statistics_is_refused(models: Models) -> None:
    recipe = models.recipe()
    del recipe["models"][1]["stats"]
    models.refused(recipe, "models[1].stats: regmean needs the gram statistics of m1", "mergekit-lfm stats gram m1")
    recipe = models.recipe("fisher") | {"base_model": "m0"}
    recipe["models"] = recipe["models"][1:]
    models.refused(recipe, "base_model: fisher needs the fisher statistics of m0", "list it under models")


def test_one_message_lists_all_problems(models: Models) -> None:
    recipe = models.recipe()
    recipe["models"][0]["stats"], recipe["models"][1]["stats"] = "m1.gram", "m1.fisher"
    models.refused(recipe, "2 problems", "m1.gram was collected on another model", "m1.fisher holds fisher")
    recipe["models"][0]["stats"] = "nowhere"
    del recipe["models"][1]["stats"]
    models.refused(recipe, "models[0].stats: found 'nowhere'")


def test_layers_that_some_statistics_lack_are_named(models: Models) -> None:
    grams = {name: gram_of(x) for name, x in models.data[1].items()}
    write_grams(models.folder / "m1.gram", models.folder / "m1", {"b": grams["b"]}, layers()[1:])
    models.refused(models.recipe(), "m1.gram lacks the gram statistics of a.weight", "same --layers")


def test_statistics_of_no_tensor_are_refused(models: Models) -> None:
    for i in range(3):
        write_fisher(models.folder / f"m{i}.fisher", models.folder / f"m{i}", {"other": torch.ones(1)})
    models.refused(models.recipe("fisher"), "cover no tensor")


def test_a_method_without_statistics_refuses_them(models: Models) -> None:
    recipe = models.recipe() | {"merge_method": "linear", "parameters": {"weight": 1}}
    models.refused(recipe, "models[0].stats: linear takes no statistics")
    with pytest.raises(PlanError, match="put `stats` beside it"):
        Recipe.parse(models.recipe() | {"stats": "m0.gram"}, where=models.folder)


def test_files_that_are_not_statistics_are_refused(models: Models) -> None:
    recipe = models.recipe()
    recipe["models"][0]["stats"], recipe["models"][1]["stats"] = "m0/model.safetensors", "m1"
    models.refused(recipe, "2 problems", "the `stats` of m0", "not a statistics file", "the `stats` of m1", "no such")
    write_grams(models.folder / "m0.gram", models.folder / "m0", {}, layers())
    models.refused(models.recipe(), "m0.gram names gram/a but does not hold it")
    grams = {name: gram_of(x) for name, x in models.data[0].items()}
    write_grams(models.folder / "m0.gram", models.folder / "m0", grams, layers(), **{"lfm.layers": "[1]"})
    models.refused(models.recipe(), "damaged metadata")
    write_grams(models.folder / "m0.gram", models.folder / "m0", grams | {"a": grams["b"]}, layers())
    models.refused(models.recipe(), "is not a Gram matrix for a.weight")


def test_a_bias_of_two_layers_is_refused(models: Models) -> None:
    """Each of the two regressions would give it a value."""
    shared = [Layer("a.weight", "a.bias", 1, INPUTS, "a", 50), Layer("embedding", "a.bias", 1, INPUTS, "a", 50)]
    for i in range(3):
        grams = {"a": gram_of(models.data[i]["a"])}
        write_grams(models.folder / f"m{i}.gram", models.folder / f"m{i}", grams, shared)
    models.refused(models.recipe(), "a.bias belongs to two layers")


def test_a_weight_and_its_bias_are_one_regression(models: Models) -> None:
    recipe = models.recipe(weight=[{"filter": "bias", "value": 2.0}, {"value": 1.0}])
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "bias", "value": 5.0}, {"value": 1.0}]}
    models.refused(recipe, "a.weight and a.bias have different parameters")


def test_an_output_around_a_statistics_file_is_refused(models: Models) -> None:
    (models.folder / "place").mkdir()
    shutil.move(models.folder / "m0.gram", models.folder / "place" / "m0.gram")
    recipe = models.recipe()
    recipe["models"][0]["stats"] = "place/m0.gram"
    with pytest.raises(PlanError, match="lie in one another"):
        models.merge(recipe, "place", overwrite=True)


def test_statistics_that_are_not_finite_are_named(models: Models) -> None:
    grams = {name: gram_of(x) for name, x in models.data[0].items()}
    grams["a"][1, 2] = torch.nan
    write_grams(models.folder / "m0.gram", models.folder / "m0", grams, layers())
    with pytest.raises(FormatError, match=r"gram/a of m0\.gram holds NaN"):
        models.merge(models.recipe())
    for ridge in (1e-6, 0.0):
        with pytest.warns(Finding, match="holds NaN or infinity"):
            merged = models.merge(models.recipe(ridge=ridge), f"warned {ridge}", nan="warn")
        assert merged["embedding"].isfinite().all() and merged["b.weight"].isfinite().all()
        assert not merged["a.weight"].isfinite().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "regmean", "tensors": [torch.ones(2, 3)]}, "needs statistics=gram"),
        ({"method": "regmean", "tensors": [torch.ones(2, 3)], "statistics": [torch.ones(2, 2)]}, r"\[3, 3\]"),
        ({"method": "fisher", "tensors": [torch.ones(2)], "statistics": []}, "found none"),
        ({"method": "fisher", "tensors": [torch.ones(2)] * 2, "statistics": [torch.ones(2)]}, "2 tensors"),
        ({"method": "linear", "tensors": [torch.ones(2)], "statistics": [torch.ones(2)], "weight": 1}, "takes no"),
        ({"method": "fisher", "tensors": [torch.ones(2)], "statistics": [torch.ones(2)], "weight": 0}, "all weights"),
        ({"method": "fisher", "tensors": [torch.ones(2)], "statistics": [-torch.ones(2)]}, "negative"),
        ({"method": "regmean", "tensors": [torch.ones(1, 2)], "statistics": torch.full((1, 2, 2), torch.nan)}, "NaN"),
        (
            {"method": "fisher", "tensors": [torch.ones(2)], "statistics": [torch.zeros(2)], "normalize": True},
            "0 everywhere",
        ),
    ],
)
def test_wrong_statistics_in_memory_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        merge_tensors(**arguments)
