"""Digits in five views: the worth of merges with statistics, and the recipes, script and benchmark that show it."""

from __future__ import annotations

import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import doubles
from safetensors.torch import load_file

from mergekit_lfm import merge

pytest.importorskip("sklearn")
script = pytest.importorskip("recipes.make.digits")
benchmark = pytest.importorskip("benchmarks.digits_multitask")

ROOT = Path(__file__).parents[2]
NAMES = ("digits_regmean.yaml", "digits_fisher.yaml", "digits_aligned.yaml")
REGMEAN, FISHER, ALIGNED = (ROOT / "recipes" / name for name in NAMES)
AVERAGE, ARITHMETIC = "average", "task arithmetic, best lambda"


@pytest.fixture(scope="module")
def folders(made_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The recipes' inputs, narrower than the script makes them, and their outputs."""

    def make(folder: Path) -> None:
        torch.set_num_threads(1)
        script.make_digits(folder, width=32)

    root = tmp_path_factory.mktemp("digits")
    (root / "digits").symlink_to(made_once("digits", make))
    merged = {
        path.stem: Path(merge(shutil.copy(path, root), root / path.stem, threads=1))
        for path in (REGMEAN, FISHER, ALIGNED)
    }
    models = [{"model": str(root / "digits" / name)} for name in script.VIEWS]
    average = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    merged[AVERAGE] = Path(merge(average, root / AVERAGE, threads=1))
    pair = [{"model": str(root / "digits" / name)} for name in ("one", "two")]
    merged["apart"] = Path(merge({**average, "models": pair}, root / "apart", threads=1))
    return merged | {name: root / "digits" / name for name in ("base", "one", "two", *script.VIEWS)}


@pytest.fixture(scope="module")
def judged(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    tasks = script.make_tasks(0)
    return {name: script.judge(script.load(folder), tasks) for name, folder in folders.items()}


def test_views_are_of_the_same_images_and_training_has_none_of_those_for_judging() -> None:
    tasks = script.make_tasks(3)
    turned, flipped, below = (tasks[name].train[0].view(-1, 8, 8) for name in ("rot180", "mirrored", "upside_down"))
    assert torch.equal(turned, flipped.flip(1))
    assert torch.equal(turned, below.flip(2))
    for task in tasks.values():
        assert len(task.train[0]) == script.TRAINED_ON
        assert len(task.train[0]) + len(task.test[0]) == 1797
        seen = {row.tobytes() for row in task.train[0].numpy()}
        assert not any(row.tobytes() in seen for row in task.test[0].numpy())


def test_two_that_were_trained_apart_are_merged_when_one_is_aligned_to_the_other(folders: dict[str, Path]) -> None:
    task = {"upright": script.make_upright(0)}
    found = {name: script.judge(script.load(folders[name]), task)["upright"] for name in ("one", "two", "apart")}
    aligned = script.judge(script.load(folders["digits_aligned"]), task)["upright"]
    assert min(found["one"], found["two"]) > 90
    assert aligned > found["apart"] + 20
    assert aligned > 60


def test_every_fine_tune_is_good_at_its_view_and_forgets_the_others(judged: dict[str, dict[str, float]]) -> None:
    for view in script.VIEWS:
        own, others = judged[view][view], [judged[view][other] for other in script.VIEWS if other != view]
        assert own == max(result[view] for result in judged.values())
        assert own > judged["base"][view] + 5
        assert own > max(others) + 5


def test_regmean_is_better_than_fisher_and_both_than_the_average(judged: dict[str, dict[str, float]]) -> None:
    regmean, fisher, average = (
        statistics.mean(judged[name].values()) for name in ("digits_regmean", "digits_fisher", AVERAGE)
    )
    assert regmean > fisher + 1
    assert fisher > average + 0.5


def test_the_first_layer_of_regmean_is_the_least_squares_fit_to_the_answers(
    folders: dict[str, Path],
) -> None:
    """The inputs of the first layer are the images: numpy fits one linear map to all five layers' outputs on them."""
    inputs, targets = [], []
    for name, task in script.make_tasks(0).items():
        images = doubles(task.train[0])
        tensors = load_file(folders[name] / "model.safetensors")
        inputs.append(np.hstack([images, np.ones((len(images), 1))]))
        targets.append(images @ doubles(tensors["first.weight"]).T + doubles(tensors["first.bias"]))
    x, y = np.concatenate(inputs), np.concatenate(targets)
    average = load_file(folders[AVERAGE] / "model.safetensors")
    mean = np.vstack([doubles(average["first.weight"]).T, doubles(average["first.bias"])])  # [inputs + 1, outputs]
    pull = np.sqrt(1e-6 * np.linalg.norm(x.T @ x)) * np.eye(len(mean))  # the recipe's ridge, as rows of the problem
    fitted = x @ np.linalg.lstsq(np.vstack([x, pull]), np.vstack([y, pull @ mean]), rcond=None)[0]
    merged = load_file(folders["digits_regmean"] / "model.safetensors")
    found = x[:, :-1] @ doubles(merged["first.weight"]).T + doubles(merged["first.bias"])
    assert np.abs(found - fitted).max() < 2e-4 * np.abs(fitted).max()  # Gram matrices are rounded to float32
    apart = x @ mean
    assert np.abs(apart - fitted).max() > 0.05 * np.abs(fitted).max()


def test_fisher_gives_a_weight_to_the_models_whose_predictions_depend_on_it(folders: dict[str, Path]) -> None:
    """A bias of the last layer has the Fisher information E p (1 - p): the merge is computed from the images alone."""
    rows = {}
    for name, task in script.make_tasks(0).items():
        model = script.load(folders[name])
        with torch.no_grad():
            p = doubles(model(task.train[0]).double().softmax(1))
        rows[name] = (p * (1 - p)).mean(0), doubles(model.last.bias)
    weights, biases = (np.stack(side) for side in zip(*rows.values(), strict=True))
    expected = (weights * biases).sum(0) / weights.sum(0)
    found = load_file(folders["digits_fisher"] / "model.safetensors")["last.bias"]
    np.testing.assert_allclose(doubles(found), expected, rtol=1e-3, atol=1e-5)


def test_the_script_writes_the_models_of_the_recipes_and_judges_them(
    folders: dict[str, Path],
    judged: dict[str, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "BASE_EPOCHS", 1)
    monkeypatch.setattr(script, "TUNE_EPOCHS", 1)
    monkeypatch.setattr("sys.argv", ["digits.py", str(tmp_path / "digits"), "--width", "16"])
    script.main()
    assert (tmp_path / "digits" / ".gitignore").read_text("utf-8") == "*\n"
    for recipe in (REGMEAN, FISHER):
        merge(shutil.copy(recipe, tmp_path), tmp_path / recipe.stem, threads=1)

    monkeypatch.setattr("sys.argv", ["digits.py", "--judge", str(folders["base"]), str(folders["rot90"])])
    script.main()
    rows = re.findall(r"^\| (/\S+) \|(.*)\|$", capsys.readouterr().out, re.M)
    assert [row[0] for row in rows] == [str(folders["base"]), str(folders["rot90"])]
    for name, (_, cells) in zip(("base", "rot90"), rows, strict=True):
        values = list(judged[name].values())
        expected = [*values, statistics.mean(values)]
        assert [float(cell) for cell in cells.split("|")] == pytest.approx(expected, abs=0.051)


def test_the_benchmark_finds_the_order_on_one_small_net_too() -> None:
    (found,) = benchmark.run((64,), (0,), (0.1,)).values()
    assert found["RegMean, alpha 1"][0] > found["Fisher"][0] + 1
    assert found["Fisher"][0] > found[AVERAGE][0] + 0.5
    assert found["trained on all tasks"][0] > found["RegMean, alpha 1"][0]
    assert len(benchmark.table({64: found}).splitlines()) == 2 + len(found)


@pytest.mark.slow
def test_regmean_fisher_task_arithmetic_average_come_in_this_order_as_the_docs_say() -> None:
    torch.set_num_threads(1)
    (found,) = benchmark.run((256,), (0, 1, 2), benchmark.LAMBDAS).values()
    means = {row: statistics.mean(values) for row, values in found.items()}
    assert means["RegMean, alpha 1"] > means["Fisher"] + 2
    assert means["Fisher"] > means[ARITHMETIC] + 0.5
    assert means[ARITHMETIC] > means[AVERAGE] + 0.5
    written = dict(
        re.findall(
            r"^\| (.+?) \| [\d.]+ \([\d.-]+\) \| \**([\d.]+)\** \(",
            (ROOT / "docs" / "statistics.md").read_text("utf-8"),
            re.M,
        )
    )
    # training rounds differently on other processors: one image of 450 in one view is 0.04
    assert {row: float(value) for row, value in written.items()} == pytest.approx(means, abs=1)
