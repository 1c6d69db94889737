"""`meta_train` as a whole: episodes of classes, files as tasks, interruptions, refusals, the test on new tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import refusal, run
from helpers_tune import bits_of, interrupt, tiny  # noqa: F401
from safetensors.torch import load_file

from mergekit_lfm import PlanError, meta_train, open_checkpoint, verify_output
from mergekit_lfm.api.recipes import run_recipe
from mergekit_lfm.commands.show.initialisations import done_text
from mergekit_lfm.meta import groups
from mergekit_lfm.meta.episodes import Episodes
from mergekit_lfm.recipe.meta_recipe import MetaRecipe
from mergekit_lfm.runtime.load import load_model

HOW: dict[str, Any] = {"steps": 3, "batch_size": 2, "threads": 1, "inner_steps": 2, "shots": 2, "queries": 2}
CLASSES: dict[str, Any] = {"task": "classification", "ways": 3, "learning_rate": 3e-3}


def write_texts(file: Path, classes: int, first: int = 0) -> Path:
    """Five texts of each class, which name it."""
    names = ("Ada Blake", "Leo Wagner", "Mia Stone", "Paris", "a baker", "Rome", "Danish", "New York")
    said = ("works", "is good", "was born in", "speaks", "rained")
    lines = [{"text": f"{names[first + n]} {word}", "label": n} for n in range(classes) for word in said]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with a classifier of three classes and texts of five, and an encoder with three files of pairs."""
    for kind in ("bert", "encoder"):
        shutil.copytree(tiny / kind, tmp_path / kind)
    write_texts(tmp_path / "seen.jsonl", 5)
    write_texts(tmp_path / "new.jsonl", 3, first=5)
    lines = (tiny / "encoder.jsonl").read_text().splitlines(keepends=True)
    for number in range(3):
        (tmp_path / f"pairs{number}.jsonl").write_text("".join(lines[5 * number : 5 * number + 5]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bytes_of(folder: str) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(Path(folder).iterdir())
        if path.suffix in (".safetensors", ".bin")
    }


@pytest.mark.usefixtures("here")
def test_a_model_is_learned_from_episodes_and_judged_on_new_classes() -> None:
    test = {"data": ["new.jsonl"], "episodes": 4, "rates": [0.03, 0.1], "steps": [1, 3]}
    how: dict[str, Any] = {**CLASSES, **HOW, "algorithm": "metasgd", "test": test}
    made = meta_train("bert", "seen.jsonl", "out", **how)
    scores = made.result.facts["test"]
    assert list(scores) == ["random", "start", "joint", "metasgd"]
    assert all(0 <= score["mean"] <= 1 and score["steps"] in (1, 3) for score in scores.values())
    assert {score["rate"] for score in scores.values()} <= {0.03, 0.1, None} and scores["metasgd"]["rate"] is None
    tensors, before = load_file("out/model.safetensors"), load_file("bert/model.safetensors")
    assert tensors.keys() == before.keys() and not torch.equal(*(x["classifier.weight"] for x in (tensors, before)))
    rates = load_file("out/meta-metasgd.bin")
    named = dict(load_model("bert", "classification").model.named_parameters())
    assert {name: x.shape for name, x in rates.items()} == {name: x.shape for name, x in named.items()}
    assert dict(open_checkpoint("out")).keys() == before.keys() and verify_output("out").result.differences == ()
    shown = done_text(made)
    assert "on new tasks, with 95 % intervals:" in shown and "joint training" in shown and "metasgd" in shown
    again = meta_train("bert", "seen.jsonl", "out", **how)
    assert again.already_there and again.result == made.result


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["maml", "mtl", "relation", "reptile", "mgml", "continual", "meta_lstm"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {**CLASSES, **HOW, "algorithm": name, "inner_steps": None if name == "relation" else 1}
    monkeypatch.setattr(groups, "EPOCH", 1)  # so that the momentum is another one in the fourth step
    how |= {"steps": 5} if name == "mgml" else {}
    whole = meta_train("bert", "seen.jsonl", "whole", **how)
    drawn = interrupt(monkeypatch, Episodes)
    with pytest.raises(KeyboardInterrupt):
        meta_train("bert", "seen.jsonl", "parts", **how)
    parts = meta_train("bert", "seen.jsonl", "parts", **how)
    assert drawn == [*range(0, 2 * how["steps"], 2)] and bytes_of("parts") == bytes_of("whole")
    assert parts.result.facts == whole.result.facts  # of a stream: how it was met


@pytest.mark.usefixtures("here")
def test_files_are_tasks_and_an_adapter_is_learned() -> None:
    files = [f"pairs{number}.jsonl" for number in range(2)]
    test = {"data": "pairs2.jsonl", "episodes": 3, "rates": [0.1], "steps": [1]}
    options: dict[str, Any] = {"task": "embedding", "method": "lora", "parameters": {"rank": 2}, "test": test}
    made = meta_train("encoder", files, "out", algorithm="metasgd", **options, **HOW)
    assert made.result.makes == "adapter" and list(made.result.facts["test"]) == ["start", "joint", "metasgd"]
    tensors = load_file("out/adapter_model.safetensors")
    assert any(bool(x.any()) for name, x in tensors.items() if "lora_B" in name)
    assert len(load_file("out/meta-metasgd.bin")) == len(tensors)


@pytest.mark.usefixtures("here")
def test_files_of_one_classification_are_tasks_with_the_models_classes() -> None:
    for number in (0, 1):
        write_texts(Path(f"task{number}.jsonl"), 3, first=3 * number)
    how: dict[str, Any] = {**CLASSES, **HOW, "ways": None, "algorithm": "mtl"}
    made = meta_train("bert", ["task0.jsonl", "task1.jsonl"], "out", **how)
    assert made.result.steps == 3
    with pytest.raises(PlanError, match="found the label 3; expected 0 to 2, the classes of the head"):
        meta_train("bert", ["task0.jsonl", "seen.jsonl"], "other", **how)


@pytest.mark.usefixtures("here")
def test_domains_make_a_prompt_and_a_gate_of_its_slopes() -> None:
    """PEFT's prompt, as `tune` makes it; what is judged adapts through the gate."""
    for number in (0, 1, 2):
        write_texts(Path(f"task{number}.jsonl"), 3)
    how: dict[str, Any] = {**CLASSES, **HOW, "ways": None, "algorithm": "gram", "parameters": {"tokens": 2}}
    how |= {"test": {"data": "task2.jsonl", "episodes": 3, "rates": [0.1], "steps": [1]}}
    for method in ("prompt", "p_tuning"):
        made = meta_train("bert", ["task0.jsonl", "task1.jsonl"], method, method=method, **how)
        assert made.result.makes == "prompt" and list(made.result.facts["test"]) == ["start", "joint", "gram"]
        assert load_file(f"{method}/adapter_model.safetensors")["prompt_embeddings"].shape[0] == 2
    gates = load_file("prompt/meta-gram.bin")
    (gate,) = (x for name, x in gates.items() if "prompt_encoder" in name)
    assert gate.shape[0] == 2 and bool(gate.any())


@pytest.mark.usefixtures("here")
def test_classes_have_names_whose_vectors_another_model_makes() -> None:
    names = {number: f"words {number}" for number in range(5)}
    texts: dict[str, Any] = {"model": "encoder", "names": names}
    test = {"data": ["new.jsonl"], "episodes": 3, "rates": [0.1], "steps": [1]}
    how: dict[str, Any] = {**CLASSES, **HOW, "algorithm": "film"}
    made = meta_train("bert", "seen.jsonl", "out", texts=texts, test=test, **how)
    assert list(made.result.facts["test"]) == ["random", "start", "joint", "film"]
    assert "textual.weight" in load_file("out/meta-film.bin")
    other = meta_train("bert", "seen.jsonl", "other", texts={**texts, "names": {**names, 4: "rain"}}, **how)
    assert other.digest != made.digest
    with pytest.raises(PlanError, match="found no name of the classes 3, 4; expected one of each"):
        meta_train("bert", "seen.jsonl", "third", texts={**texts, "names": dict(list(names.items())[:3])}, **how)
    with pytest.raises(PlanError, match=r"texts: found none, expected \{model, names\} for film"):
        meta_train("bert", "seen.jsonl", "third", **how)


@pytest.mark.usefixtures("here")
def test_a_model_is_made_editable_and_judged_by_edits() -> None:
    write_texts(Path("wrong.jsonl"), 3, first=4)
    test = {"data": ["wrong.jsonl", "new.jsonl"], "episodes": 4, "rates": [0.1], "steps": [1, 2]}
    how: dict[str, Any] = {**CLASSES, **HOW, "ways": None, "algorithm": "editable", "shots": 1, "test": test}
    write_texts(Path("right.jsonl"), 3)
    made = meta_train("bert", ["wrong.jsonl", "right.jsonl"], "out", **how)
    assert list(made.result.facts["test"]) == ["random", "start", "joint", "editable"]


@pytest.mark.usefixtures("here")
def test_defaults_of_the_outer_steps_are_those_of_the_algorithm() -> None:
    """Reptile's step is not clipped, so that it is task arithmetic; the others are a training as any other."""
    whole = {"job": "meta", "model": "bert", "data": ["seen.jsonl"], "task": "classification", "ways": 3}
    found = {name: MetaRecipe.parse({**whole, "algorithm": name}).options for name in ("maml", "reptile")}
    how = {name: (x.optimizer, x.learning_rate, x.clip) for name, x in found.items()}
    assert how == {"maml": ("adamw", 2e-5, 1.0), "reptile": ("sgd", 0.5, 0.0)}
    given = MetaRecipe.parse({**whole, "algorithm": "reptile", "clip": 2.0, "optimizer": "adamw"})
    assert (given.options.clip, given.options.learning_rate) == (2.0, 2e-5)
    assert MetaRecipe.parse(given.normalised()).options == given.options


@pytest.mark.usefixtures("here")
def test_processes_of_torchrun_are_refused_where_they_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        PlanError, match="torchrun shares no mtl, whose steps depend on all tasks or on those before; start it alone"
    ):
        meta_train("bert", "seen.jsonl", "out", **{**CLASSES, **HOW, "algorithm": "mtl"})


REFUSED = [
    ({"algorithm": "mamml"}, "algorithm: found 'mamml', expected maml, fomaml"),
    ({"algorithm": "purer"}, "purer needs no data: give `teachers` in place of `data`, or use `meta-teachers`"),
    ({"ways": 4}, "bert has 3 classes, and an episode 4; expected as many"),
    ({"ways": None}, "data: found one file, expected several, each a task, or `ways`"),
    ({"queries": 4}, "an episode needs 2 and 4 other examples of each class, together 6; class 0 has 5"),
    (
        {"algorithm": "mtl", "accumulate": 2},
        "accumulate: found 2, expected 1 for mtl, whose steps are not cut into parts",
    ),
    (
        {"algorithm": "reptile", "on_disk": True, "ways": None, "clip": 1.0},
        "clip: found it, expected none with on_disk",
    ),
    ({"dev": 0.1}, "dev: found it, expected none in a meta-learning"),
    ({"method": "mask"}, "method: found mask, expected one that trains the same part in each step"),
    ({"method": "bitfit", "algorithm": "metasgd"}, "expected one that makes a folder, into which metasgd puts a file"),
    ({"algorithm": "proto", "task": "embedding"}, "task: found 'embedding', expected classification for proto"),
    ({"memory": 2_000_000}, "a step needs some .* choose an algorithm that holds one pass \\(fomaml, or reptile\\)"),
    ({"test": {"data": "new.jsonl", "rates": [-1]}}, "test.rates: found \\[-1.0\\], expected numbers above 0"),
    ({"test": "gone.jsonl"}, "test.data\\[0\\].path"),
    ({"parameters": {"group_count": 2}}, "parameters.group_count"),
    (
        {"algorithm": "mgml", "parameters": {"group_count": 3}},
        "batch_size: found 2, expected a multiple of group_count",
    ),
    ({"algorithm": "continual", "parameters": {"stay": 2}}, "parameters.stay"),
    ({"algorithm": "editable"}, "ways: found 3, expected none for editable: data files, the first of changed answers"),
    (
        {"algorithm": "editable", "ways": None, "test": "new.jsonl"},
        "test.data: found one file, expected two or more, as `data` has them",
    ),
    ({"algorithm": "meta_lstm", "inner_rate": 2.0}, "inner_rate: found 2, expected a number below 1 for meta_lstm"),
    ({"algorithm": "gram", "ways": None, "batch_size": 1}, "batch_size: found 1, expected 2 or more for gram"),
    ({"algorithm": "gram", "method": "prefix"}, "method: found prefix, expected a method that trains"),
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_mistakes_are_refused_before_anything_is_written(options: dict[str, Any], message: str) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(PlanError, match=message):
        meta_train("bert", "seen.jsonl", "out", **{**CLASSES, **HOW, **options})
    assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("here")
def test_the_command_and_a_recipe_make_the_same_and_a_merge_takes_it_as_base() -> None:
    words = "meta bert --data seen.jsonl --task classification --ways 3 --shots 2 --queries 2"
    numbers = "--steps 2 --batch-size 2 --inner-steps 1 --threads 1 --learning-rate 0.003 --algorithm reptile"
    assert run(*words.split(), *numbers.split(), "-o", "out").exit_code == 0
    document = """
name: start
job: meta
model: bert
data: seen.jsonl
task: classification
algorithm: reptile
ways: 3
shots: 2
queries: 2
steps: 2
batch_size: 2
inner_steps: 1
learning_rate: 0.003
---
merge_method: linear
parameters: {weight: 1}
models: [{model: start}, {model: bert}]
"""
    Path("r.yaml").write_text(document)
    run_recipe("r.yaml", "merged", threads=1)
    assert bytes_of("merged.stages/start") == bytes_of("out")
    Path("alone.yaml").write_text(document.partition("---")[0])
    shown = run("plan", "alone.yaml").stdout
    assert "memory of a step" in shown and "3 classes: 2 examples of each class to adapt on, 2 to judge by" in shown
    message = refusal(run("meta", "bert", "--data", "seen.jsonl", "--task", "lm", "-o", "x"))
    assert "data: found one file, expected several" in message


@pytest.mark.slow
def test_fine_tunes_of_a_learned_start_merge(tmp_path: Path) -> None:
    """The recipe of the docs with fewer steps: over both subjects the average is better than either fine-tune."""
    base, _, *tuned, both = bits_of("start.yaml", tmp_path, {40: 6, 60: 30})
    assert both < min(tuned) < base
