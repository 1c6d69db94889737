"""Merges of rewritten models: `align` in a recipe gives the bytes of merging the rewritten checkpoint."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_llama import base_tensors, cast, fine_tuned, save
from helpers_commands import refusal, run
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge, open_statistics
from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.align.find import find_transform
from mergekit_lfm.api.align import Aligned, align_models
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.api.prepare import prepare
from mergekit_lfm.arch import find_symmetries
from mergekit_lfm.artifacts.transform import open_transform
from mergekit_lfm.collect.run import collect
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.rewritten import rewrite

Tensors = dict[str, torch.Tensor]
ONE = {"parameters": {"weight": 1}}


def planted(folder: Path, tensors: Tensors, seed: int, kinds: tuple[Any, ...]) -> Tensors:
    """The rewritten tensors; writes the transform to folder/t.safetensors."""
    transform = random_transform(tensors, find_symmetries(open_checkpoint(folder)), seed=seed, kinds=kinds)
    transform.save(folder.parent / "t.safetensors")
    return rewrite(tensors, transform)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """Models a and b, and b rewritten by every kind of element: in the folder `saved`, and as t.safetensors."""
    monkeypatch.chdir(tmp_path)
    dtype = getattr(request, "param", torch.float32)
    b = cast(base_tensors(2), dtype)
    save(tmp_path / "a", cast(base_tensors(1), dtype))
    save(tmp_path / "b", b)
    save(tmp_path / "saved", planted(tmp_path / "b", b, 3, ("order", "scale", "rotation", "inside")))
    return tmp_path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        {"merge_method": "linear", "parameters": {"weight": 1}},
        {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.3}},
        {"merge_method": "ties", "base_model": "a", "parameters": {"weight": 1, "density": 0.4}},
    ],
    ids=lambda method: method["merge_method"],
)
@pytest.mark.parametrize("models", [torch.float32, torch.bfloat16], indirect=True, ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("models")
def test_a_transform_file_gives_the_merge_of_the_rewritten_model(method: dict[str, Any]) -> None:
    first = [] if "base_model" in method else [{"model": "a"}]
    whole = Path(merge({**method, "models": [*first, {"model": "saved"}]}, "whole"))
    runs: list[dict[str, Any]] = [{}, {"threads": 1, "memory": "40MB"}, {"threads": 3}]
    for number, options in enumerate(runs):
        recipe = {**method, "models": [*first, {"model": "b", "align": "t.safetensors"}]}
        streamed = Path(merge(recipe, f"streamed{number}", **options))
        assert weights(streamed) == weights(whole)
    assert run("verify", str(streamed)).exit_code == 0


def test_passthrough_writes_the_rewritten_model(models: Path) -> None:
    out = Path(merge({"merge_method": "passthrough", "models": [{"model": "b", "align": "t.safetensors"}]}, "out"))
    expected, found = load_file(models / "saved" / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lock = json.loads((out / "merge.lock.json").read_text())
    assert lock["recipe"]["models"] == [{"model": "b", "parameters": {}, "align": "t.safetensors"}]
    assert len(lock["inputs"][0]["files"][0]["view"]["transform"]) == 32


def test_documents_do_not_name_the_folder_of_a_transform(models: Path):
    recipe = {"merge_method": "passthrough", "models": [{"model": "b", "align": str(models / "t.safetensors")}]}
    out = Path(merge(recipe, "out"))
    for file in ("merge.lock.json", "README.md"):
        assert str(models) not in (out / file).read_text()


def test_another_transform_is_another_plan(models: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": "b", "align": "t.safetensors"}]}
    before = make_plan(Recipe.parse(recipe)).digest
    b = load_file(models / "b" / "model.safetensors")
    planted(models / "b", b, 4, ("order",))
    assert make_plan(Recipe.parse(recipe)).digest != before


def test_a_transform_of_another_model_is_refused(models: Path) -> None:
    save(models / "c", cast(fine_tuned(base_tensors(2), 1), torch.float32))
    transform = random_transform({}, find_symmetries(open_checkpoint(models / "b")), seed=1, kinds=["order"])
    facts = transform.info
    named = type(facts)(facts.method, models=(open_checkpoint(models / "b").content,))
    type(transform)(transform.symmetries, transform.elements, named).save(models / "of_b.safetensors")
    merge({"merge_method": "passthrough", "models": [{"model": "b", "align": "of_b.safetensors"}]}, "fine")
    with pytest.raises(PlanError, match=r"of_b.safetensors rewrites another model, of content"):
        merge({"merge_method": "passthrough", "models": [{"model": "c", "align": "of_b.safetensors"}]}, "refused")
    assert not (models / "refused").exists()


def test_a_transform_to_another_model_is_refused(models: Path) -> None:
    save(models / "c", fine_tuned(base_tensors(1), 1))
    find_transform(models / "b", models / "a", restarts=1).save(models / "b_to_a.st")
    b = {"model": "b", "align": "b_to_a.st"}
    merge({"merge_method": "linear", "models": [b, {"model": "a"}], **ONE}, "fine")
    with pytest.raises(PlanError, match=r"b_to_a.st aligns b to a model of content .*, which is not in the recipe"):
        make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "c"}, b], **ONE}))
    merge({"merge_method": "passthrough", "models": [b]}, "alone")


def test_too_little_memory_is_refused_before_the_work(models: Path, monkeypatch: pytest.MonkeyPatch):
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("mergekit_lfm.api.prepare.find_transform", work)
    entry = {"model": "b", "align": {"to": "a", "method": "rotation"}}
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, entry], **ONE}
    with pytest.raises(PlanError, match=r"for one worker, a budget of 1 MB, less .* MB for transforms, patches and"):
        merge(recipe, "out", memory="1MB")
    assert not (models / "out.partial").exists()


@pytest.mark.usefixtures("models")
def test_the_planned_bounds_hold():
    entry = {"model": "b", "align": {"to": "a", "method": "rotation", "sweeps": 3}}
    before = make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}, entry], **ONE}))
    after = prepare(before, Path("out"))
    assert after.digest == before.digest and not after.pending
    for job in before.tensors:
        assert Budget(after).scratch(job) <= Budget(before).scratch(job)
        after.models[1].read(job.name)
    assert 0 < Budget(after).resident_views <= Budget(before).resident_views


def test_a_model_that_the_table_does_not_fit_is_refused(models: Path) -> None:
    save(models / "deeper", base_tensors(2, layers=3))
    (models / "recipe.yaml").write_text(
        "merge_method: passthrough\nmodels: [{model: deeper, align: t.safetensors}]\n", encoding="utf-8"
    )
    message = refusal(run("merge", "recipe.yaml", "out"))
    assert "the `align` of deeper: deeper does not fit the symmetry table" in message
    assert "model.layers.2.input_layernorm.weight [64] float32 is not in the table" in message
    assert not (models / "out").exists()


@pytest.mark.usefixtures("models")
def test_memory_of_rewriting_is_in_the_plan() -> None:
    plain = make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **ONE}))
    entry = {"model": "b", "align": "t.safetensors"}
    aligned = make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}, entry], **ONE}))
    jobs = zip(plain.tensors, aligned.tensors, strict=True)
    more = {job.name: Budget(aligned).scratch(job) - Budget(plain).scratch(before) for before, job in jobs}
    assert more["model.layers.0.mlp.down_proj.weight"] >= 64 * 96 * 8
    assert all(nbytes >= 0 for nbytes in more.values())


@pytest.mark.parametrize("method", ["activation_matching", "rotation", "ot"])
def test_a_request_with_statistics(models: Path, method: str) -> None:
    random = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(260, (4, 16), generator=random)} for _ in range(4)]
    collect("cross", models / "a", batches, "ab.st", other=models / "b", task="lm")
    align = {"to": "a", "method": method, "stats": "ab.st"}
    found = find_transform(models / "b", models / "a", method, statistics=open_statistics("ab.st"))
    found.save("found.st")
    average = {"merge_method": "linear", **ONE}
    asked = Path(merge({**average, "models": [{"model": "a"}, {"model": "b", "align": align}]}, "asked"))
    given = Path(merge({**average, "models": [{"model": "a"}, {"model": "b", "align": "found.st"}]}, "given"))
    assert weights(asked) == weights(given)
    other = {"model": "a", "align": {**align, "to": "saved"}}
    with pytest.raises(PlanError, match=r"ab.st is of the models"):
        merge({**average, "models": [{"model": "saved"}, other]}, "refused")
    assert not (models / "refused").exists() and not (models / "refused.partial").exists()


REQUESTS: dict[str, dict[str, Any]] = {
    "weight_matching": {"restarts": 2, "seed": 3},
    "rotation": {"sweeps": 3},
    "ot": {"regularisation": 0.05, "cost": "cosine"},
}


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("method", REQUESTS)
def test_a_request_gives_the_same_as_the_command_and_its_file(method: str) -> None:
    options = REQUESTS[method]
    request = {"to": "a", "method": method, **options}
    average = {"merge_method": "linear", **ONE}
    asked = Path(merge({**average, "models": [{"model": "a"}, {"model": "b", "align": request}]}, "asked", threads=1))
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = run("align", "b", "--to", "a", "--method", method, *flags, "-o", "found.st", "-q")
    assert (result.exit_code, result.stdout) == (0, "found.st\n")
    given = Path(
        merge({**average, "models": [{"model": "a"}, {"model": "b", "align": "found.st"}]}, "given", threads=2)
    )
    assert weights(asked) == weights(given)
    lock = json.loads((asked / "merge.lock.json").read_text())
    assert lock["recipe"]["models"][1]["align"].items() >= request.items()
    assert lock["inputs"][1]["files"][0]["view"]["align"]["method"] == method


def test_a_request_is_found_once_and_kept(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (models / "recipe.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\n"
        "models: [{model: a}, {model: b, align: {to: a, restarts: 1}}]\n",
        encoding="utf-8",
    )
    shown = run("merge", "recipe.yaml", "out", "--dry-run").stdout
    assert "aligned      b to a: the merge finds the transform by weight_matching when it runs" in shown
    told = run("merge", "recipe.yaml", "out")
    assert (told.exit_code, told.stderr.splitlines()[0]) == (0, "aligning b to a by weight_matching")

    def again(*_: object, **__: object) -> None:
        raise AssertionError("found twice")

    monkeypatch.setattr("mergekit_lfm.api.prepare.find_transform", again)
    assert "already there" in run("merge", "recipe.yaml", "out").stderr
    assert run("merge", "recipe.yaml", "other").exit_code == 0
    assert weights(models / "out") == weights(models / "other")
    recipe = Recipe.load(models / "recipe.yaml")
    changed = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b", "align": {"to": "a"}}], **ONE}
    assert make_plan(recipe).digest != make_plan(Recipe.parse(changed)).digest


def test_models_that_cannot_be_aligned_are_refused_in_the_plan(models: Path) -> None:
    save(models / "deeper", base_tensors(2, layers=3))
    entry = {"model": "deeper", "align": {"to": "a"}}
    with pytest.raises(PlanError, match=r"the `align` of deeper: deeper and a differ in shape"):
        make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}, entry], **ONE}))
    (models / "odd").mkdir()
    (models / "odd" / "config.json").write_text('{"model_type": "odd"}')
    (models / "odd" / "model.safetensors").write_bytes(weights(models / "b"))
    entry = {"model": "odd", "align": {"to": "a"}}
    with pytest.raises(PlanError, match="odd has model_type 'odd', which has no symmetry table"):
        make_plan(Recipe.parse({"merge_method": "linear", "models": [{"model": "a"}, entry], **ONE}))


def test_other_widths_take_the_shapes_of_the_model_aligned_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    for name, width in (("narrow", 4), ("wide", 7)):
        shapes = {"0.weight": (width, 3), "0.bias": (width,), "1.weight": (2, width), "1.bias": (2,)}
        (tmp_path / name).mkdir()
        made = {part: torch.randn(shape, generator=random) for part, shape in shapes.items()}
        save_file(made, tmp_path / name / "model.safetensors")
    wide = {"model": "wide", "align": {"to": "narrow", "method": "ot"}}
    out = Path(merge({"merge_method": "linear", "models": [{"model": "narrow"}, wide], **ONE}, "out"))
    assert load_file(out / "model.safetensors")["0.weight"].shape == (4, 3)
    with pytest.raises(PlanError, match="wide is transported to other widths"):
        merge({"merge_method": "linear", "models": [wide, {"model": "narrow"}], **ONE}, "refused")
    wide["align"] = {"to": "narrow"}
    with pytest.raises(PlanError, match="`ot` allows other numbers of hidden units"):
        merge({"merge_method": "linear", "models": [{"model": "narrow"}, wide], **ONE}, "refused")


def test_save_writes_the_rewritten_model_and_compares_its_outputs(models: Path) -> None:
    found = ["--method", "rotation", "--sweeps", "3", "-o", "found.st"]
    result = run("align", "b", "--to", "a", *found, "--save", "near", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert told["saved"]["same"] and told["saved"]["difference"] <= told["saved"]["tolerance"]
    assert told["scores"]["distance_after"] < told["scores"]["distance_before"]
    assert run("verify", "near").exit_code == 0
    assert weights(models / "near") != weights(models / "b")
    message = refusal(run("align", "b", "--to", "a", "-o", "found.st"))
    assert message == "error: found.st exists and differs: method, options; choose another output, or use --overwrite\n"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["-o", "b/model.safetensors", "--overwrite"], "lies in the input b, which is only read"),
        (["-o", "a/new.st"], "lies in the input a, which is only read"),
        (["-o", "t.safetensors", "--initial", "t.safetensors", "--overwrite"], "lies in the input t.safetensors"),
        (["-o", "/dev/full", "--overwrite"], "/dev/full is not a file, expected the name of one to write"),
        (["-o", "new.st", "--save", "saved"], "saved exists; choose another output, or use --overwrite"),
        (["-o", "new.st", "--save", "b/deep"], "b/deep and the input b lie in one another"),
    ],
)
def test_forbidden_outputs_are_refused_before_the_work(
    models: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("mergekit_lfm.api.align.find_transform", work)
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    assert expected in refusal(run("align", "b", "--to", "a", *arguments))
    assert {path: path.read_bytes() for path in models.rglob("*") if path.is_file()} == before


def test_a_chain_is_saved_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    for name in "ab":
        shapes = {"0.weight": (5, 3), "0.bias": (5,), "1.weight": (2, 5), "1.bias": (2,)}
        (tmp_path / name).mkdir()
        made = {part: torch.randn(shape, generator=random) for part, shape in shapes.items()}
        save_file(made, tmp_path / name / "model.safetensors")
    result = run("align", "b", "--to", "a", "-o", "t.st", "--save", "near")
    assert "near: written\n" in result.stderr and re.search(
        r"^outputs +not compared: running it needs", result.stderr, re.M
    )
    b, near = (load_file(tmp_path / name / "model.safetensors") for name in ("b", "near"))
    x = torch.randn(4, 3, generator=random)
    said = [(x @ m["0.weight"].T + m["0.bias"]).relu() @ m["1.weight"].T + m["1.bias"] for m in (b, near)]
    assert torch.allclose(said[0], said[1], atol=1e-6)
    assert not torch.equal(b["0.weight"], near["0.weight"])


def skipping(x: torch.Tensor, m: dict[str, torch.Tensor]) -> torch.Tensor:
    """A net whose second layer has a skip connection, which its tensors do not show: they form a chain."""
    first = (x @ m["0.weight"].T).relu()
    return (first + (first @ m["1.weight"].T).relu()) @ m["2.weight"].T


def test_a_skip_connection_is_taken_for_a_chain_and_the_outputs_are_not_said_to_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    for name in "ab":
        shapes = {"0.weight": (8, 3), "1.weight": (8, 8), "2.weight": (2, 8)}
        (tmp_path / name).mkdir()
        made = {part: torch.randn(shape, generator=random) for part, shape in shapes.items()}
        save_file(made, tmp_path / name / "model.safetensors")
    told = json.loads(run("align", "b", "--to", "a", "-o", "t.st", "--json").stdout)
    transform = open_transform("t.st")
    b = load_file(tmp_path / "b" / "model.safetensors")
    x = torch.randn(4, 3, generator=random)
    assert not torch.allclose(skipping(x, b), skipping(x, rewrite(b, transform)), rtol=0.1)
    assert transform.info.outputs == told["outputs"]
    assert told["outputs"].startswith("not compared: running it needs a config.json")
    assert "A skip connection" in told["outputs"] and "A skip connection" in run("inspect", "t.st").stdout


def test_both_models_run_wherever_they_can(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def align(out: str, **options: Any) -> Aligned:
        return align_models("b", "a", out, restarts=1, sweeps=1, **options)

    assert align("same.st").result.info.outputs == open_transform("same.st").info.outputs == "the same"
    again = align("same.st")
    assert again.already_there and again.result.info.outputs == "the same"
    soft = align_models("b", "a", "soft.st", method="ot", regularisation=0.1)
    assert soft.result.info.outputs == "not compared: the method changes them on purpose"
    monkeypatch.setattr("mergekit_lfm.api.align.default_memory", lambda: 1000)
    assert "--save runs them all the same" in align("large.st").result.info.outputs
    assert align("large.st", overwrite=True, save="near").result.info.outputs == "the same"
    monkeypatch.undo()
    monkeypatch.chdir(models)
    monkeypatch.setattr("mergekit_lfm.judge.same.compare_outputs", lambda *_: (0.19, 1e-4))
    with pytest.warns(Finding, match=r"wrong.st: it changes the outputs of .*b"):
        assert align("wrong.st").result.info.outputs == "different"
    result = run("align", "b", "--to", "a", "--restarts", "1", "-o", "wrong2.st", "--json")
    assert (result.exit_code, json.loads(result.stdout)["outputs"]) == (1, "different")


def test_check_runs_the_model_with_random_elements(models: Path) -> None:
    result = run("align", "a", "--check", "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["good"]) == (0, True)
    assert {row["part"] for row in told["findings"]} == {"kept", "needed", "enough"}
    assert told["tensors"] == 21
    assert "21 tensors in 5 groups, every one named; as expected" in run("align", str(models / "a"), "--check").stdout


def test_messages_name_the_needs_of_align(models: Path):
    assert "Give --to MODEL and -o FILE, or --check." in run("align", "a").stderr
    message = refusal(run("align", "b", "--to", "a", "--cost", "cosine", "-o", "t.st"))
    assert "align.cost: weight_matching has no such parameter" in message
    useless = run("align", "b", "--to", "a", "--method", "ot", "--initial", "t.safetensors", "-o", "t.st")
    assert "--initial: the result of ot does not depend on a start; leave it out." in useless.stderr
    message = refusal(run("align", "b", "--to", "a", "--order", "ffn.7", "-o", "t.st"))
    assert "order: found 'ffn.7', did you mean ffn." in message
    assert not (models / "t.st").exists()


@pytest.mark.usefixtures("models")
def test_inspect_describes_a_transform():
    told = json.loads(run("inspect", "t.safetensors", "--json").stdout)["transform"]
    assert told["groups"]["residual"] == {"kind": "units", "size": 64, "moved": 0, "acts": ["matrix"]}
    assert told["groups"]["ffn.0"]["moved"] > 80
    shown = run("inspect", "t.safetensors").stdout
    assert re.search(r"^heads +2 +64 +\d+ +groups, queries, query key, value output$", shown, re.M)


def test_a_touched_model_that_is_aligned_is_compared_and_a_changed_one_refused(models: Path) -> None:
    entry = {"model": "b", "align": {"to": "a", "method": "weight_matching", "restarts": 1}}
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, entry], **ONE}
    merge(recipe, "out")
    path = models / "b" / "model.safetensors"
    os.utime(path, ns=(1, 1))
    assert merge(recipe, "out").already_there
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"out was made from other inputs: .* of b.* changed since"):
        merge(recipe, "out")
