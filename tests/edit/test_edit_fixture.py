"""A small model that has learned 480 facts: where it stores them, the worth of edits, and edits that must fail."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_lfm import merge
from mergekit_lfm.artifacts.facts import FactsFile, read_facts_file
from mergekit_lfm.edit.scores import score_facts
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.edit.trace import Trace, trace
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.runtime.load import load_model

script = pytest.importorskip("recipes.make.facts")
world = pytest.importorskip("recipes.make.facts_world")
benchmark = pytest.importorskip("benchmarks.editing")

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "recipes" / "make" / name for name in ("facts.py", "facts_world.py")]
LAYERS, LOCAL = 6, 4
Measured = Callable[[str, int], Mapping[str, float]]
LONG = pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="takes minutes more: LONG_TESTS=1 runs it")

# The lower bound for each edit, in percent: method and number of facts, and the measure. Three seeds reach
# all of them; training differs between processors, so the bounds leave room below the measured values.
LEAST = {
    ("ROME, layer 0", 1): {"ES": 95, "PS": 90, "NS": 92, "NA": 90},
    ("MEMIT, layer 0", 10): {"ES": 97, "PS": 93, "NS": 93},
    ("MEMIT, layer 0", 40): {"ES": 95, "PS": 92, "NS": 87, "unedited": 70},
    ("MEMIT, layers 0-3", 10): {"ES": 95, "PS": 65, "NS": 97, "unedited": 95},
}


def test_every_template_keeps_the_subject_out_of_the_lower_layers_reach() -> None:
    for relation, templates in world.TEMPLATES.items():
        assert len(templates) == 6
        for i, template in enumerate(templates):
            before, after = template.split("{}")
            assert len(after.split()) >= LOCAL, (relation, template)
            assert (before == "") == (i < 3)


def test_no_name_alone_tells_who_is_meant() -> None:
    people = [person.split() for person in world.make_world(0).facts]
    for part in (0, 1):
        names = [person[part] for person in people]
        assert min(names.count(name) for name in names) > 1
    assert len(people) == 120
    assert len({tuple(person) for person in people}) == 120


def test_the_files_are_nested_and_ask_nothing_that_another_edit_changes(tmp_path: Path) -> None:
    known = world.make_world(3)
    files = {name: _read(tmp_path / f"{name}.yaml", data) for name, data in world.make_files(known, 3).items()}
    large = files["facts_100"]
    assert len({fact.subject for fact in large.facts}) == 100
    for size in world.EDITS:
        assert files[f"facts_{size}"].facts == large.facts[:size]
        assert files[f"facts_{size}"].unedited == large.unedited
    subjects = {fact.subject for fact in large.facts}
    assert not any(subject in statement.prompt for statement in large.unedited for subject in subjects)
    assert not {fact.subject for fact in files["others_10"].facts} & {fact.subject for fact in large.facts[:10]}
    edited = {fact.text for name in ("facts_100", "conflict") for fact in files[name].facts}
    asked = {text for fact in large.facts for text in fact.neighborhood_prompts}
    assert asked and not asked & edited
    pairs = [fact.subject for fact in files["conflict"].facts]
    assert {pairs.count(subject) for subject in pairs} == {2}
    for fact in large.facts:
        assert fact.target_true in known.facts[fact.subject].values()
        assert fact.target_new != fact.target_true
        assert all(statement.target in known.facts[fact.subject].values() for statement in fact.same_subject)


def _read(path: Path, data: Mapping[str, object]) -> FactsFile:
    path.write_text(yaml.safe_dump(data), "utf-8")
    return read_facts_file(path)


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """The files that the script makes; trained once for every text of it and version of torch."""
    torch.set_num_threads(1)
    content = b"".join(path.read_bytes() for path in SCRIPTS) + version("torch").encode()
    kept = request.config.cache.mkdir("facts") / hashlib.sha256(content).hexdigest()[:16]

    def make(_: Path) -> None:
        if not (kept / "learned").exists():
            learned = script.make_facts(kept)
            (kept / "learned").write_text(str(learned), "utf-8")

    made_once("facts", make)
    return kept


@pytest.fixture(scope="session")
def subject(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return benchmark.open_subject(folder, tmp_path_factory.mktemp("grams"))


@pytest.fixture(scope="session")
def traced(subject: Any) -> Trace:
    known = FactsFile(subject.facts("known").facts[:30])
    return trace(subject.loaded.model, subject.loaded.tokenizer, known)


@pytest.fixture(scope="session")
def measured(subject: Any, made_once: Callable[..., Path]) -> Measured:
    """The numbers of an edit of LEAST; one fact stands for the mean of twenty edits."""

    def measure(name: str, size: int) -> Mapping[str, float]:
        def make(folder: Path) -> None:
            editor = benchmark.METHODS[name]
            if size == 1:
                some = FactsFile(subject.facts("facts_40").facts[: benchmark.SINGLES])
                found = benchmark.measure_singly(subject, editor, some)
            else:
                found = benchmark.measure(subject, editor, subject.facts(f"facts_{size}"))
            (folder / "found.json").write_text(json.dumps(found), "utf-8")

        found: Mapping[str, float] = json.loads((made_once(f"{name}, {size}", make) / "found.json").read_text("utf-8"))
        return found

    return measure


@pytest.mark.slow
def test_the_model_has_learned_all_facts_whichever_template_asks(folder: Path, subject: Any) -> None:
    assert int((folder / "learned").read_text("utf-8")) >= 475
    before: Any = score_facts(subject.loaded.model, subject.loaded.tokenizer, subject.facts("facts_100"))
    assert before.es == 0
    assert before.ns == 1
    assert min(before.na, before.sa, before.unedited) >= 0.97
    assert before.ps <= 0.01


@pytest.mark.slow
def test_it_knows_them_at_the_last_token_of_the_subject_in_the_lower_layers(traced: Trace) -> None:
    """Measured as shares of all that noise on the subject destroys."""
    destroyed = traced.clean - traced.corrupted
    assert destroyed >= 0.5
    share: dict[str, dict[str, list[Any]]] = {
        kind: {role: [x and x / destroyed for x in effects] for role, effects in roles.items()}
        for kind, roles in traced.effects.items()
    }
    states, mlps = share["hidden"], share["mlp"]
    assert min(states["last subject token"][:LOCAL]) >= 0.75
    assert max(states["first subject token"]) <= 0.25
    assert max(map(abs, states["last token"][:LOCAL])) < 1e-3
    assert states["last token"][LAYERS - 1] >= 0.9
    assert max(mlps["last subject token"]) == mlps["last subject token"][0] >= 0.6
    assert 0 in traced.layers()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), LEAST)
def test_an_edit_holds_and_spares_the_rest(measured: Measured, name: str, size: int) -> None:
    found = measured(name, size)
    assert {what: found[what] for what, least in LEAST[name, size].items() if found[what] < least} == {}


@pytest.mark.slow
def test_the_recipe_that_edits_twice_and_merges_teaches_both(folder: Path, subject: Any) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "facts_edited.yaml").read_text("utf-8"))
    place = subject.grams.path.parent
    for name in ("model", "facts_10.yaml", "others_10.yaml"):
        (place / "facts").mkdir(exist_ok=True)
        (place / "facts" / name).symlink_to(folder / name)
    (place / "facts" / "gram.safetensors").symlink_to(subject.grams.path)
    merged = Path(merge(Recipe.parse(recipe, where=place), place / "merged"))
    loaded = load_model(merged, "lm")
    for name in ("facts_10", "others_10"):
        scores = score_facts(loaded.model, loaded.tokenizer, subject.facts(name))
        assert scores.ea is not None and scores.pa is not None and scores.na is not None
        assert scores.ea >= 0.9 and scores.pa >= 0.8 and scores.na >= 0.8
        assert scores.unedited is not None and scores.unedited >= 0.9


@LONG
@pytest.mark.slow
def test_a_hundred_edits_hold_and_spare_the_rest(subject: Any) -> None:
    found = benchmark.measure(subject, benchmark.METHODS["MEMIT, layers 0-3"], subject.facts("facts_100"))
    assert found["ES"] >= 95 and found["PS"] >= 65
    assert found["NS"] >= 87 and found["unedited"] >= 60


@LONG
@pytest.mark.slow
def test_rome_fails_where_facts_are_not_looked_up_at_the_subject(tmp_path: Path) -> None:
    """A GPT-2 that has learned as much, and looks everything up at the last token of the text."""
    assert script.make_facts(tmp_path / "control", control=True) >= 475
    control = benchmark.open_subject(tmp_path / "control", tmp_path)
    traced = trace(control.loaded.model, control.loaded.tokenizer, FactsFile(control.facts("known").facts[:20]))
    states: Mapping[str, Any] = traced.effects["hidden"]
    assert max(map(abs, states["last subject token"])) <= 0.05
    assert states["last token"][0] >= 0.5
    single = FactsFile(control.facts("facts_10").facts)
    for layer in range(LAYERS):
        rome = partial(benchmark.located, method="rome", layers=[layer], clamp=4.0)
        assert benchmark.measure_singly(control, rome, single)["ES"] <= 30, layer


@pytest.mark.slow
def test_fine_tuning_breaks_facts_about_others(subject: Any, measured: Measured) -> None:
    tuned = benchmark.measure(subject, benchmark.fine_tuned, subject.facts("facts_40"))
    located = measured("MEMIT, layer 0", 40)
    assert tuned["ES"] >= 95
    assert tuned["NS"] <= located["NS"] - 25
    assert tuned["unedited"] <= located["unedited"] - 25


@pytest.mark.slow
def test_an_edit_of_the_last_layer_does_not_reach_the_answer(subject: Any) -> None:
    last = partial(benchmark.located, method="rome", layers=[LAYERS - 1], clamp=4.0)
    assert benchmark.measure(subject, last, subject.facts("facts_10"))["ES"] <= 10


@pytest.mark.slow
def test_existing_knowledge_outweighs_the_facts_when_lambda_is_large(subject: Any) -> None:
    # At 10, where it turns, one or four of ten facts are learned, depending on the training processor; at 20 none.
    heavy = partial(benchmark.located, method="memit", layers=list(range(LOCAL)), clamp=0.75, lambda_ratio=20.0)
    assert benchmark.measure(subject, heavy, subject.facts("facts_10"))["ES"] <= 20


@pytest.mark.slow
def test_two_facts_of_one_subject_are_refused_in_one_batch(subject: Any) -> None:
    with pytest.raises(PlanError, match="one subject"):
        edit(subject.loaded, None, FactsFile(subject.facts("conflict").facts[:4]), layers=[0], covariance="identity")
