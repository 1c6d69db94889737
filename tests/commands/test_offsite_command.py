"""Offsite tuning: emulators, their ends put back into the model, and emulators that do not fit it."""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_editing import LLAMA, trained_tokenizer
from helpers_tune import BERT, tiny, transformers  # noqa: F401
from safetensors.torch import load_file

from mergekit_lfm import emulate_model, merge, perplexity, plug_in_ends, tune_model
from mergekit_lfm.output.lock import verify
from mergekit_lfm.plan.student import spread

ROOT = Path(__file__).parents[2]
SIX = {"num_hidden_layers": 6}
HOW: dict[str, Any] = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "threads": 1}


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A Llama of six layers, and a classifier of six, with data for them."""
    torch.manual_seed(1)
    for name, made in (
        ("llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **SIX}))),
        ("bert", transformers.BertForSequenceClassification(transformers.BertConfig(**{**BERT, **SIX}, num_labels=3))),
    ):
        made.save_pretrained(tmp_path / name)
        trained_tokenizer().save_pretrained(tmp_path / name)
        shutil.copy(tiny / f"{name}.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors(folder: str | PathLike[str]) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize(
    ("count", "kept", "layers"), [(8, 4, [0, 2, 5, 7]), (5, 3, [0, 2, 4]), (5, 1, [2]), (3, 0, [])]
)
def test_layers_are_kept_evenly_from_the_first_to_the_last(count: int, kept: int, layers: list[int]) -> None:
    """As in the authors' code: layer round(i * (count - 1) / (kept - 1))."""
    assert spread(count, kept) == layers


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("kind", "task"), [("llama", "lm"), ("bert", "classification")])
def test_the_model_gets_the_ends_and_the_head_of_its_tuned_emulator(kind: str, task: str) -> None:
    made = answer(run("offsite", "emulate", kind, "--ends", "1", "--keep", "0.5", "-o", "emulator", "--json"))
    assert (made["layers"], made["of"], made["ends"]) == ([0, 1, 4, 5], 6, 1)
    tuned = tune_model("emulator", f"{kind}.jsonl", "tuned", task=task, train=made["train"], **HOW)
    done = answer(run("offsite", "plug-in", kind, "tuned", "-o", "out", "--json"))
    assert (done["tuned"], done["of"]) == ([0, 5], 6) and verify(Path("out")) == []
    model, ends, out = tensors(kind), tensors(tuned), tensors("out")
    assert out.keys() == model.keys()
    for name, x in out.items():
        first, last = ("s.0." in name or "r.0." in name), ("s.5." in name or "r.5." in name)
        theirs = first or last or "classifier" in name
        wanted = ends[name.replace(".5.", ".3.") if last else name] if theirs else model[name]
        assert torch.equal(x, wanted)
        assert torch.equal(x, model[name]) != theirs
    assert run("offsite", "plug-in", kind, "tuned", "-o", "out").exit_code == 0  # already there
    assert (
        "layers  4 of 6: 0, 1, 4, 5; 1 at each end" in run("offsite", "emulate", kind, "--ends", "1", "-o", "e").stderr
    )


@pytest.mark.usefixtures("here")
def test_an_emulator_that_is_not_tuned_gives_the_model_and_an_adapter_is_taken() -> None:
    emulator = emulate_model("llama", "emulator", keep=0)
    assert emulator.result.layers == (0, 1, 4, 5)
    same = tensors(plug_in_ends("llama", emulator, "same"))
    model = tensors("llama")
    assert same.keys() == model.keys() and all(torch.equal(x, model[name]) for name, x in same.items())
    tune_model("emulator", "llama.jsonl", "lora", task="lm", method="lora", train=emulator.result.train, **HOW)
    out = tensors(plug_in_ends("llama", "emulator+lora", "out"))
    changed = {name.split(".")[2] for name, x in out.items() if not torch.equal(x, model[name])}
    assert changed == {"0", "1", "4", "5"}


@pytest.mark.usefixtures("here")
def test_others_than_an_emulator_of_the_model_are_refused() -> None:
    shutil.copytree("llama", "other")
    weights = tensors("other")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    from safetensors.torch import save_file

    save_file(weights, "other/model.safetensors", {"format": "pt"})
    emulate_model("llama", "emulator")  # has layer 2
    assert "model.layers.2.mlp.up_proj.weight has other numbers" in refusal(
        run("offsite", "plug-in", "other", "emulator", "-o", "out")
    )
    tune_model("emulator", "llama.jsonl", "whole", task="lm", **HOW)
    assert "more than its ends was tuned" in refusal(run("offsite", "plug-in", "llama", "whole", "-o", "out"))
    assert "is of a model of 6, but" in refusal(run("offsite", "plug-in", "emulator", "emulator", "-o", "out"))
    assert "has no mergekit_config.yml" in refusal(run("offsite", "plug-in", "llama", "llama", "-o", "out"))
    recipe = {"merge_method": "linear", "models": [{"model": "llama"}], "parameters": {"weight": 1}}
    merge(recipe, "merged")
    assert "found another recipe" in refusal(run("offsite", "plug-in", "llama", "merged", "-o", "out"))
    assert "expected 1 to 2" in refusal(run("offsite", "emulate", "llama", "--ends", "3", "-o", "out"))
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_recipe_of_offsite_tuning_makes_a_better_model(tmp_path: Path) -> None:
    """Better than the model before; the emulator, before it is tuned, is worse than both."""
    shutil.copytree(ROOT / "recipes" / "quickstart", tmp_path / "quickstart")
    shutil.copy(ROOT / "recipes" / "offsite.yaml", tmp_path)
    out = Path(merge(tmp_path / "offsite.yaml", tmp_path / "out"))
    text = (tmp_path / "quickstart" / "docs.txt").read_text("utf-8")[:8000]
    base, emulator = tmp_path / "quickstart" / "base", tmp_path / "out.stages" / "emulator"
    before, shallow, after = (perplexity(each, text).bits_per_byte for each in (base, emulator, out))
    assert after < before - 0.1 < shallow - 0.2
