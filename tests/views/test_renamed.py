"""`rename` in a recipe: the rules, the merge under the new names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_llama import base_tensors, fine_tuned, load, save
from helpers_commands import refusal, run
from helpers_views import plain_tensors, save_plain
from models import save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.renamed import Renamed, old_names

BERT = ["bert.embeddings.weight", "bert.layer.0.gamma", "bert.layer.10.gamma", "pooler.weight"]


def new_names(*rules: tuple[str, str]) -> list[str]:
    return list(old_names([RenameRule(*rule) for rule in rules], BERT))


def test_the_first_rule_that_matches_holds() -> None:
    assert new_names(("bert.", "")) == ["embeddings.weight", "layer.0.gamma", "layer.10.gamma", "pooler.weight"]
    assert new_names(
        ("", "a."),
    ) == [f"a.{name}" for name in BERT]
    assert new_names(("bert.layer.", "h."), ("bert.", ""))[:2] == ["embeddings.weight", "h.0.gamma"]
    assert new_names(("bert.layer.0.", "bert.layer.0."), ("bert.", ""))[1:3] == ["bert.layer.0.gamma", "layer.10.gamma"]


def test_patterns_replace_every_match() -> None:
    assert new_names((r"re:layer\.(\d+)\.gamma$", r"h.\1.weight"))[1:3] == ["bert.h.0.weight", "bert.h.10.weight"]
    assert new_names((r"re:^bert\.", ""), (r"re:o", "0"))[::3] == ["embeddings.weight", "p00ler.weight"]
    assert new_names(("re:e", "E"))[0] == "bErt.EmbEddings.wEight".replace("s.wE", "s.wE")


def test_one_message_names_all_that_does_not_fit() -> None:
    rules = ((r"re:layer\.\d+", "layer"), ("bert.", ""), ("bert.layer", "x"), ("no", "x"))
    with pytest.raises(PlanError) as refused:
        new_names(*rules)
    lines = str(refused.value).splitlines()
    assert lines[0] == "the rules do not fit, 3 problems:"
    assert "bert.layer.0.gamma and bert.layer.10.gamma would both be 'bert.layer.gamma'" in lines[1]
    assert "'bert.layer' matches no tensor that an earlier rule leaves" in lines[2]
    assert "'no' matches no tensor" in lines[3]
    with pytest.raises(PlanError, match=r"pooler\.weight would have no name"):
        new_names(("pooler.weight", ""))


def test_names_change_and_bytes_do_not(tmp_path: Path) -> None:
    stored = open_checkpoint(save_plain(tmp_path / "model"))
    view = Renamed(stored, [RenameRule("up.", "layers.0.up.")])
    new = {old.replace("up.", "layers.0.up."): tensor for old, tensor in plain_tensors().items()}
    for old, name in zip(plain_tensors(), new, strict=True):
        assert torch.equal(view.read(name).view(new[name].shape), new[name])
        assert view.location(name) == stored.location(old) and view.name_in_files(name) == old
    assert view.content == open_checkpoint(save_checkpoint(tmp_path / "other", new, {})).content


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders a and b with models of one shape; the tensors of b have another prefix."""
    tensors = base_tensors(0)
    save(tmp_path / "a", tensors)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    tuned = {name.replace("model.", "decoder."): x for name, x in fine_tuned(tensors, seed=1).items()}
    save_checkpoint(tmp_path / "b", tuned, config, shards=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


B = {"model": "b", "rename": {"decoder.": "model."}, "parameters": {"weight": 3.0}}
A = {"model": "a", "parameters": {"weight": 1.0}}


def average(models: Path) -> dict[str, torch.Tensor]:
    """(a + 3 b) / 4 in float64, under the names of a."""
    a, b = load(models / "a"), load(models / "b")
    return {n: ((x.double() + 3 * b[n.replace("model.", "decoder.")].double()) / 4).float() for n, x in a.items()}


def test_models_with_other_names_are_merged(models: Path) -> None:
    recipe = {"merge_method": "linear", "models": [A, B]}
    (models / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = Path(merge(models / "recipe.yaml", models / "out"))
    merged = load(out)
    for name, exact in average(models).items():
        torch.testing.assert_close(merged.pop(name), exact, rtol=2**-23, atol=1e-9)
    assert not merged
    lock = json.loads((out / "merge.lock.json").read_text())
    assert lock["recipe"]["models"][1]["rename"] == {"decoder.": "model."}
    assert "decoder." in (out / "README.md").read_text()
    shown = run("plan", "recipe.yaml", "out2")
    assert "renamed" in shown.output and "b: 'decoder.' becomes 'model.'" in shown.output


def test_the_base_is_renamed_by_its_line(models: Path) -> None:
    """The output has the base's new names, in its files; the base is not merged as an input."""
    lines = [{"model": "b", "rename": B["rename"]}, {"model": "a", "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": "b", "models": lines}
    plan = make_plan(Recipe.parse(recipe))
    assert plan.labels == ("b", "a") and plan.template == 0 and len(plan.recipe.parts[0].inputs) == 1
    merged = load(Path(merge(recipe, models / "out")))
    a, b = load(models / "a"), load(models / "b")
    for name, x in a.items():
        before = b[name.replace("model.", "decoder.")].double()
        torch.testing.assert_close(merged[name], (before + 0.5 * (x.double() - before)).float(), rtol=1e-6, atol=1e-7)
    assert sorted(path.name for path in (models / "out").glob("*.safetensors")) == sorted(
        path.name for path in (models / "b").glob("*.safetensors")
    )


@pytest.mark.usefixtures("models")
def test_the_plan_depends_on_the_rules_and_their_order() -> None:
    def digest(rename: dict[str, str] | None) -> str:
        line = {"model": "b"} if rename is None else {"model": "b", "rename": rename}
        return make_plan(Recipe.parse({"merge_method": "passthrough", "models": [line]})).digest

    given: list[dict[str, str] | None] = [
        None,
        {"decoder.": "model."},
        {"decoder.": "m."},
        {"decoder.layers.": "m.", "decoder.": "model."},
        {"decoder.layers.": "m.", r"re:^decoder\.": "model."},
    ]
    assert len({digest(rename) for rename in given}) == len(given)
    assert digest({}) == digest(None)
    plain, normal = (
        Recipe.parse({"merge_method": "linear", "models": [A, b]}).normalised() for b in ({**A, "model": "b"}, B)
    )
    assert "rename" not in plain["models"][1] and normal["models"][1]["rename"] == B["rename"]
    assert Recipe.parse(normal).normalised() == normal


def test_an_alignment_sees_the_new_names(models: Path) -> None:
    recipe = {"merge_method": "linear", "models": [A, {**B, "align": {"to": "a"}}]}
    aligned = load(Path(merge(recipe, models / "aligned")))
    c = {name.replace("decoder.", "model."): x for name, x in load(models / "b").items()}
    save(models / "c", c)
    recipe["models"] = [A, {"model": "c", "align": {"to": "a"}, "parameters": B["parameters"]}]
    expected = load(Path(merge(recipe, models / "expected")))
    assert all(torch.equal(aligned[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    "rename, message",
    [
        (["decoder."], "models[1].rename: found ['decoder.'], expected a mapping"),
        ({"decoder.": 1}, "models[1].rename: found {'decoder.': 1}, expected a mapping"),
        ({"re:(": ""}, "models[1].rename: 're:(' to '': found no regular expression and its replacement (missing )"),
        (
            {"re:a": r"\2"},
            r"models[1].rename: 're:a' to '\\2': found no regular expression and its replacement (invalid",
        ),
        ({"decoder.": ""}, "b lacks model.embed_tokens.weight"),
        ({"encoder.": ""}, "the `rename` of b: 'encoder.' matches no tensor"),
        ({"re:^.*$": "x"}, "would both be 'x'"),
    ],
)
def test_one_message_names_every_mistake(models: Path, rename: Any, message: str) -> None:
    (models / "recipe.yaml").write_text(
        yaml.safe_dump({"merge_method": "linear", "models": [A, {**B, "rename": rename}]})
    )
    text = refusal(run("merge", "recipe.yaml", "out"))
    assert message in text
    assert not (models / "out").exists()


def test_the_key_belongs_to_a_model(models: Path) -> None:
    recipe = {"merge_method": "linear", "models": [A], "rename": {"decoder.": ""}}
    with pytest.raises(PlanError, match="new names belong to one model: put `rename` beside it"):
        Recipe.parse(recipe, where=models)
