"""`tune` and `head` on the command line: what they print, as JSON and for people, and the recipe of the docs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers_commands import answer, refusal, run
from helpers_tune import tiny  # noqa: F401

from mergekit_lfm import merge, perplexity
from mergekit_lfm.store.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    for name in ("encoder", "llama"):
        shutil.copytree(tiny / name, tmp_path / name)
        shutil.copy(tiny / f"{name}.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TUNE = ("tune", "llama", "--data", "llama.jsonl", "--task", "lm", "--steps", "3", "--threads", "1")


@pytest.mark.usefixtures("here")
def test_tune_names_its_result() -> None:
    result = run(*TUNE, "--dev", "llama.jsonl", "--method", "lora", "--rank", "2", "-o", "out")
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "out"
    shown = [line.split(maxsplit=1) for line in (result.stderr + result.stdout).splitlines() if line]
    assert ["made", "an adapter's folder, as PEFT has it"] in shown
    assert any(
        re.fullmatch(r"[\d,]+ of [\d,]+ numbers, 3 steps", words[-1]) for words in shown if words[0] == "trained"
    )
    data = answer(run(*TUNE, "--dev", "llama.jsonl", "--method", "lora", "--rank", "2", "-o", "out", "--json"))
    assert data["already_there"] and data["makes"] == "adapter" and data["best_step"] == 3
    assert 0 < data["trained"] < data["parameters"] and data["dev_loss"] > 0
    assert answer(run("inspect", "out", "--json"))


@pytest.mark.usefixtures("here")
def test_a_recipe_and_the_command_take_a_share_and_groups() -> None:
    """Both ways ask for the same; other groups, and another share, are another request."""
    Path("r.yaml").write_text(
        "job: tune\nmodel: llama\ndata: llama.jsonl\ntask: lm\nsteps: 3\ndev: 0.25\n"
        "groups: [{match: '*.layers.0.*', learning_rate: 1.0e-9, weight_decay: 0}]\n"
    )
    assert "0.25 of the data" in run("plan", "r.yaml", "out").stdout
    assert run("merge", "r.yaml", "out", "--threads", "1").exit_code == 0
    before, after = open_checkpoint("llama"), open_checkpoint("out")
    moved = {name: float((after.read(name) - before.read(name)).abs().max()) for name in before}
    assert all((change < 1e-7) == (".layers.0." in name) for name, change in moved.items())
    group = "*.layers.0.* learning_rate=1e-9 weight_decay=0"
    same = answer(run(*TUNE, "--dev", "0.25", "--group", group, "-o", "out", "--json"))
    assert same["already_there"] and same["dev_loss"] > 0
    assert "out exists" in refusal(run(*TUNE, "--dev", "0.5", "--group", group, "-o", "out"))
    assert "out exists" in refusal(run(*TUNE, "--dev", "0.25", "-o", "out"))
    assert "above 0 and below 1" in refusal(run(*TUNE, "--dev", "1", "-o", "x"))
    assert "no trained parameter has such a name" in refusal(run(*TUNE, "--group", "*.layers.9.*", "-o", "x"))
    assert not Path("x").exists() and not Path("x.training").exists()


@pytest.mark.usefixtures("here")
def test_the_course_of_a_training_is_drawn_from_its_record() -> None:
    pytest.importorskip("matplotlib")
    run(*TUNE, "--dev", "llama.jsonl", "--evaluate-every", "1", "-o", "out")
    lines = [json.loads(line) for line in Path("out.training/metrics.jsonl").read_text().splitlines()]
    assert [*lines[0]] == [
        "step",
        "loss",
        "learning_rate",
        "tokens",
        "per_second",
        "dev_loss",
        "seconds",
        "seconds_left",
    ]
    assert all(line["per_second"] > line["tokens"] / line["seconds"] > 0 for line in lines)  # a look is not in the pace
    assert lines[-1]["seconds_left"] == 0 < lines[0]["seconds_left"]
    results = [
        answer(run("curves", place, "-o", f"{i}.png", "--json")) for i, place in enumerate(("out", "out.training"))
    ]
    assert [each["runs"][0]["step"] for each in results] == [3, 3]
    pictures = [Path(f"{i}.png").read_bytes() for i in range(2)]
    assert all(each.startswith(b"\x89PNG") and len(each) > 10_000 for each in pictures)
    Path("broken.jsonl").write_text('{"step": 1, "loss": 2}\n')
    assert "line 1 is not a step of a training" in refusal(run("curves", "broken.jsonl", "-o", "x.png"))
    assert "found no metrics.jsonl at llama" in refusal(run("curves", "llama", "-o", "x.png"))
    assert "ends with .png" in refusal(run("curves", "out", "-o", "x.pdf"))


@pytest.mark.usefixtures("here")
def test_a_plan_of_tunings_is_a_table_and_data() -> None:
    Path("r.yaml").write_text(
        "name: base\njob: head\nmodel: ./encoder\nlabels: [docs, code]\n---\n"
        "job: tune\nmodel: base\ndata: [{path: x.jsonl, most: 3}]\ndev: x.jsonl\ntask: classification\nmethod: bitfit\n"
    )
    Path("x.jsonl").write_text('{"text": "a", "label": 0}\n' * 5)
    text = run("plan", "r.yaml", "out.safetensors").stdout
    for words in ("labels  docs, code", "x.jsonl, 3 each time", "development set", "a patch file", "0.001, linear"):
        assert words in text
    data = answer(run("plan", "r.yaml", "out.safetensors", "--json"))
    assert data["makes"] == "patch" and data["recipe"]["data"] == [{"path": "x.jsonl", "most": 3}]
    assert run("merge", "r.yaml", "out.safetensors", "--threads", "1").exit_code == 0
    changed = open_checkpoint("out.safetensors")
    assert changed and all(name.endswith("bias") or name.startswith("classifier") for name in changed)


@pytest.mark.slow
def test_the_recipe_of_the_docs_makes_a_model_that_knows_both_texts(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes" / "quickstart", tmp_path / "quickstart")
    shutil.copy(ROOT / "recipes" / "tuned.yaml", tmp_path)
    out = Path(merge(tmp_path / "tuned.yaml", tmp_path / "out"))
    for name in ("docs", "code"):
        text = (tmp_path / "quickstart" / f"{name}.txt").read_text("utf-8")[:8000]
        assert (
            perplexity(out, text).bits_per_byte
            < perplexity(tmp_path / "quickstart" / "base", text).bits_per_byte - 0.02
        )
