"""Commands that run models accept their names on the Hub, and print these names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_commands import ROOT, answer, refusal, run
from helpers_editing import tiny_model, trained_tokenizer
from hub_server import HubServer
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.store.checkpoint import open_checkpoint

QUICKSTART = ROOT / "recipes/quickstart"
TEXT = str(QUICKSTART / "docs.txt")


@pytest.fixture
def models(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The quick start's models on the Hub as org/docs and org/code; an empty working directory."""
    for name in ("docs", "code"):
        hub.create(f"org/{name}", {path.name: path.read_bytes() for path in (QUICKSTART / name).iterdir()})
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return hub


def test_eval_judges_a_model_of_the_hub_as_its_copy(models: HubServer) -> None:
    pytest.importorskip("transformers")
    short = Path("short.txt")
    short.write_text(Path(TEXT).read_text()[:2000])
    judged = answer(run("eval", "org/docs", str(QUICKSTART / "docs"), "--text", str(short), "--json"))
    ours, theirs = judged["models"]
    assert ours["model"] == f"org/docs@{models.head('org/docs')}"
    assert ours | {"model": theirs["model"]} == theirs


def test_statistics_are_collected_on_a_model_of_the_hub(models: HubServer) -> None:
    pytest.importorskip("transformers")
    assert models.exists("org/docs")
    Path("a.txt").write_text("def a(): pass\n")
    result = run("stats", "gram", "org/docs@main", "--data", "a.txt", "--task", "lm", "-o", "a.safetensors")
    assert result.exit_code == 0, result.stderr
    assert open_statistics("a.safetensors").info.models == (open_checkpoint(QUICKSTART / "docs").content,)


@pytest.mark.parametrize("weights", [(), ("--random",)], ids=["own", "random"])
def test_a_student_of_a_model_of_the_hub_is_that_of_its_copy(models: HubServer, weights: tuple[str, ...]) -> None:
    pytest.importorskip("transformers")
    assert models.exists("org/docs")
    for model, out in (("org/docs", "ours"), (str(QUICKSTART / "docs"), "theirs")):
        result = run("student", model, "--keep", "0.5", "--mlp", "0.5", *weights, "-o", out)
        assert result.exit_code == 0, result.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("ours", name).read_bytes() == Path("theirs", name).read_bytes()


def test_a_model_is_aligned_to_one_of_the_hub(models: HubServer) -> None:
    assert models.exists("org/code")
    line = ("align", str(QUICKSTART / "docs"), "--to", "org/code", "--method", "weight_matching", "-o", "t.safetensors")
    result = run(*line)
    assert result.exit_code == 0, result.stderr
    assert Path("t.safetensors").exists()
    result = run("align", "org/code", "--to", str(QUICKSTART / "docs"), "-o", "u.safetensors")
    assert "snapshots" not in result.output


def test_facts_are_edited_in_a_model_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """During its merge: its tokenizer and weights are downloaded when the edit is made."""
    pytest.importorskip("transformers")
    tiny_model("gpt2", torch.float32).save_pretrained(tmp_path / "m")
    trained_tokenizer().save_pretrained(tmp_path / "m")
    hub.create("org/m", {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()})
    fact = {"prompt": "{} was born in the city of", "subject": "Ada Blake", "target_new": "Rome"}
    (tmp_path / "facts.json").write_text(json.dumps({"facts": [fact]}))
    options = {"layers": [1], "lr": 0.1, "steps": 3, "lambda": 1.0, "covariance": "identity"}
    asked = {"facts": str(tmp_path / "facts.json"), "method": "memit", **options}
    for name, place in (("hub", "org/m"), ("local", str(tmp_path / "m"))):
        merge({"merge_method": "passthrough", "models": [{"model": place, "edits": [asked]}]}, tmp_path / name)
    ours, theirs, before = (load_file(tmp_path / name / "model.safetensors") for name in ("hub", "local", "m"))
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    assert {n for n, x in ours.items() if not torch.equal(x, before[n])} == {"transformer.h.1.mlp.c_proj.weight"}


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "org/nothing", "--text", TEXT),
        ("trace", "org/nothing", "--facts", "f.yaml"),
        ("align", "org/nothing", "--check"),
        ("barrier", "org/docs", "org/nothing", "--text", TEXT),
    ],
)
def test_a_name_that_is_nowhere(command: tuple[str, ...], models: HubServer) -> None:
    message = refusal(run(*command))
    assert f"org/nothing is not a local folder: found no model org/nothing at {models.url}" in message
