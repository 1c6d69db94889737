"""Templates of instructions, and clusters of tasks that are held out and judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import run
from helpers_tune import tiny  # noqa: F401

from mergekit_lfm import FormatError, PlanError, tune_model
from mergekit_lfm.recipe.templates import Template
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.examples import Examples, join
from mergekit_lfm.train.loop import mean_loss
from mergekit_lfm.train.losses import next_token
from mergekit_lfm.train.texts import read_examples

LINE: dict[str, Any] = {"task": "lm", "steps": 3, "batch_size": 4, "threads": 1, "learning_rate": 1e-2}
ASK = {"prompt": "Where was {name} born ?", "completion": " {city}"}
TELL = {"prompt": "{{ {name} }} was born in {city} in", "completion": " {year}"}
PEOPLE = [{"name": name, "city": city, "year": 1900 + i} for i, (name, city) in enumerate(
    [("Ada Blake", "Paris"), ("Leo Wagner", "Rome"), ("Mia Stone", "New York"), ("Zoë Müller", "Paris")])]  # fmt: skip


def write(path: str, lines: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    shutil.copytree(tiny / "llama", tmp_path / "llama")
    shutil.copy(tiny / "llama.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    write("people.jsonl", PEOPLE)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_a_template_makes_the_lines_that_hands_would_write() -> None:
    lines = [
        {"prompt": f"{{ {each['name']} }} was born in {each['city']} in", "completion": f" {each['year']}"}
        for each in PEOPLE
    ]
    by_hand = tune_model("llama", write("hand.jsonl", lines), "hand", **LINE)
    filled = tune_model("llama", [{"path": "people.jsonl", "templates": [TELL]}], "filled", **LINE)
    assert Path(by_hand, "model.safetensors").read_bytes() == Path(filled, "model.safetensors").read_bytes()


@pytest.mark.usefixtures("here")
def test_each_time_round_has_one_template_for_each_example_drawn_anew() -> None:
    templates = [Template.model_validate(each) for each in (ASK, TELL)]
    loaded = load_model("llama", "lm")
    people = read_examples(Path("people.jsonl"), loaded, templates=templates)
    assert len(people) == 8 and [len(x["input_ids"]) for x in people.items[:2]] == [
        len(read_examples(Path(write("one.jsonl", [one])), loaded).items[0]["input_ids"])
        for one in (Template.model_validate(each).fill(PEOPLE[0]) for each in (ASK, TELL))
        if isinstance(one, dict)
    ]
    other = read_examples(Path("llama.jsonl"), loaded)
    both, seen = join([people, other], [3, None]), [0, 0]
    for epoch in range(40):
        numbers = both.step(epoch, 3 + len(other), seed=7)
        mine = sorted(number for number in numbers if number < 8)
        assert len({number // 2 for number in mine}) == len(mine) == 3  # three examples, each in one form
        assert sorted(number for number in numbers if number >= 8) == [*range(8, 8 + len(other))]
        for number in mine:
            seen[number % 2] += 1
    assert min(seen) > 40  # of 120 draws: one form in three or less has a chance of 1e-4


def test_forms_leave_the_order_without_them_as_it_was() -> None:
    items = [{"x": torch.tensor(i)} for i in range(6)]
    plain, same = Examples(items), Examples(items, forms=(1,))
    assert [plain.step(i, 4, 3) for i in range(6)] == [same.step(i, 4, 3) for i in range(6)]


@pytest.mark.usefixtures("here")
def test_a_held_out_cluster_is_judged_and_not_trained_on() -> None:
    facts = {"path": "people.jsonl", "templates": [ASK, TELL], "cluster": "facts"}
    texts = {"path": "llama.jsonl", "cluster": "texts"}
    outcome = tune_model("llama", [facts, texts], "out", held_out=["facts"], **LINE)
    alone = tune_model("llama", "llama.jsonl", "alone", **LINE)
    assert Path(outcome, "model.safetensors").read_bytes() == Path(alone, "model.safetensors").read_bytes()
    templates = [Template.model_validate(each) for each in (ASK, TELL)]
    for when, model in (("before", "llama"), ("after", "out")):
        loaded = load_model(model, "lm")
        examples = read_examples(Path("people.jsonl"), loaded, templates=templates)
        loss = mean_loss(loaded.model, examples, next_token, Options())
        assert outcome.result.held_out["facts"][when] == pytest.approx(loss, rel=1e-5)
    again = tune_model("llama", [facts, texts], "out", held_out=["facts"], **LINE)
    assert again.already_there and again.result == outcome.result


@pytest.mark.usefixtures("here")
def test_a_plan_shows_templates_clusters_and_phases() -> None:
    Path("r.yaml").write_text(
        "job: tune\nmodel: ./llama\ntask: lm\nheld_out: [facts]\n"
        "data:\n  - {path: people.jsonl, cluster: facts, templates: [{prompt: '{name}', completion: ' {city}'}]}\n"
        "  - {path: llama.jsonl, most: 5}\n"
        "phases:\n  - {steps: 2, train: '*layers.0.*'}\n  - {steps: 1, train: ['*']}\n"
    )
    text = run("plan", "r.yaml", "out").stdout
    for words in ("people.jsonl, templates: 1, cluster facts", "phase 1, 2 steps", "*layers.0.*", "3 of 16 examples"):
        assert words in text
    result = run("merge", "r.yaml", "out", "--threads", "1")
    assert result.exit_code == 0 and "facts, held out" in result.stderr + result.stdout


@pytest.mark.usefixtures("here")
def test_templates_and_clusters_that_do_not_fit_are_refused() -> None:
    write("lines.jsonl", [PEOPLE[0], {"name": "Leo Wagner", "city": ["Rome"]}, {"name": "Mia Stone"}])
    with pytest.raises(FormatError, match=r'(?s)line 2: "city" is \["Rome"\], which a template.*line 3: no "city", wh'):
        tune_model("llama", [{"path": "lines.jsonl", "templates": [ASK]}], "out", **LINE)
    for entry, message in (
        ({"templates": [{"prompt": "{name", "completion": "x"}]}, r"templates\[0\].prompt: found '{name', expected"),
        ({"templates": [{"prompt": "{name!r}", "completion": "x"}]}, "no format behind a key"),
        ({"templates": [{"prompt": "{name}", "completion": " "}]}, "found no text"),
        ({"templates": [{"prompt": "{name}"}]}, r"templates\[0\].completion"),
    ):
        with pytest.raises(PlanError, match=message):
            tune_model("llama", [{"path": "people.jsonl", **entry}], "out", **LINE)
    with pytest.raises(PlanError, match=r"held_out\[0\]: found 'fact', expected a cluster of the data: facts"):
        tune_model("llama", [{"path": "people.jsonl", "cluster": "facts"}, "llama.jsonl"], "out", held_out=["fact"],
                   **LINE)  # fmt: skip
    with pytest.raises(PlanError, match="all data are held out"):
        tune_model("llama", [{"path": "llama.jsonl", "cluster": "a"}], "out", held_out=["a"], **LINE)
    with pytest.raises(PlanError, match="expected none for this task"):
        tune_model("llama", [{"path": "people.jsonl", "templates": [ASK]}], "out", **{**LINE, "task": "embedding"})
