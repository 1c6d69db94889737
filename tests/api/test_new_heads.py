"""`add_head`: the trunk is the model's, the head is new and by the seed; and all that is tuned from it composes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers_commands import refusal, run
from helpers_tune import tiny, transformers  # noqa: F401
from safetensors.torch import load_file, save_file

from mergekit_lfm import FormatError, add_head, tune_model
from mergekit_lfm.api.recipes import plan_recipe, run_recipe


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    for name in ("encoder", "bert", "llama"):
        shutil.copytree(tiny / name, tmp_path / name)
    shutil.copy(tiny / "bert.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_the_trunk_stays_and_the_head_is_by_the_seed() -> None:
    made = add_head("encoder", "four", labels=["a", "b", "c", "d"])
    assert made.result.added == ("classifier.bias", "classifier.weight") and not made.result.dropped
    old, new = load_file("encoder/model.safetensors"), load_file("four/model.safetensors")
    assert new.keys() == {f"bert.{name}" for name in old} | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(new[f"bert.{name}"], x) for name, x in old.items())
    assert new["classifier.weight"].shape == (4, 32) and float(new["classifier.weight"].std()) > 0.01
    model, info = transformers.BertForSequenceClassification.from_pretrained("four", output_loading_info=True)
    assert not info["missing_keys"] and model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert add_head("encoder", "four", labels=["a", "b", "c", "d"]).already_there
    other = load_file(Path(add_head("encoder", "other", labels=4, seed=1)) / "model.safetensors")
    assert not torch.equal(other["classifier.weight"], new["classifier.weight"])
    assert "good" in run("verify", "four").stdout


@pytest.mark.usefixtures("here")
def test_an_old_head_is_replaced_and_a_decoder_gets_one() -> None:
    assert add_head("bert", "two", labels=2).result.added == ("classifier.bias", "classifier.weight")
    with pytest.warns(UserWarning, match="lm_head.weight is of a head that the new one replaces"):
        made = add_head("llama", "decoder", labels=3)
    assert made.result.added == ("score.weight",) and made.result.dropped == ("lm_head.weight",)
    tuned = tune_model("decoder", "bert.jsonl", "tuned", task="classification", steps=2, threads=1)
    assert tuned.result.steps == 2


@pytest.mark.usefixtures("here")
def test_tuned_patches_and_adapters_go_onto_it_in_one_recipe() -> None:
    Path("r.yaml").write_text(
        "name: base\njob: head\nmodel: ./encoder\nlabels: 3\n---\n"
        "name: lora\njob: tune\nmodel: base\ndata: bert.jsonl\ntask: classification\nmethod: lora\nsteps: 3\n---\n"
        "name: full\njob: tune\nmodel: base\ndata: bert.jsonl\ntask: classification\nsteps: 3\n---\n"
        "merge_method: linear\nmodels: [{model: base+lora}, {model: full}]\nparameters: {weight: 1}\n"
    )
    plan_recipe("r.yaml", "out")
    out = Path(run_recipe("r.yaml", "out"))
    head = load_file(out / "model.safetensors")["classifier.weight"]
    parts = [load_file(f"out.stages/{name}/model.safetensors")["classifier.weight"] for name in ("base", "full")]
    assert not torch.equal(head, parts[0]) and not torch.equal(head, parts[1])
    assert run("eval", "out", "--data", "bert.jsonl", "--task", "classification").exit_code == 0


@pytest.mark.usefixtures("here")
def test_no_label_or_part_of_a_model_is_refused() -> None:
    for labels, found in (("0", "0"), ("a,a", "['a', 'a']"), ("a,,b", "['a', '', 'b']"), ("-3", "-3")):
        message = refusal(run("head", "encoder", f"--labels={labels}", "-o", "x"))
        assert f"labels: found {found}, expected a number from 1, or a list of names" in message
    shutil.copytree("encoder", "part")
    tensors = load_file("part/model.safetensors")
    save_file({name: x for name, x in tensors.items() if "layer.1." not in name}, "part/model.safetensors")
    with pytest.raises(FormatError, match=r"lacks bert.encoder.layer.1.*give the whole model"):
        add_head("part", "x", labels=2)
    assert not Path("x").exists() and not Path("x.partial").exists()
