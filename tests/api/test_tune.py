"""`tune_model` as a whole: recipes of stages, kills, repetition, refusals, and methods against PEFT and by hand."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import refusal, run
from helpers_editing import LLAMA, trained_tokenizer
from helpers_faults import warm_interpreter
from helpers_jobs import MODULES
from helpers_tune import tiny, transformers  # noqa: F401
from safetensors.torch import load_file

from mergekit_lfm import PlanError, collect_stats, open_checkpoint, tune_model
from mergekit_lfm.api.recipes import plan_recipe, run_recipe
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.locks import lock_folder
from mergekit_lfm.train.loop import mean_loss
from mergekit_lfm.train.losses import LOSSES, next_token
from mergekit_lfm.train.texts import read_examples
from mergekit_lfm.views.adapted import open_model

LINE: dict[str, Any] = {"task": "lm", "steps": 4, "batch_size": 4, "threads": 1}


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with the tiny models and their data."""
    for path in tiny.iterdir():
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
        else:
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_lora_is_the_adapter_that_peft_trains() -> None:
    """The same adapter, batches and rates in a loop of PEFT's model by hand."""
    import warnings

    import peft

    from mergekit_lfm.train.examples import seed_of

    options = Options(steps=4, batch_size=4, learning_rate=1e-2, clip=0.0, schedule="constant")
    tune_model(
        "llama",
        "llama.jsonl",
        "ours",
        method="lora",
        learning_rate=1e-2,
        clip=0.0,
        schedule="constant",
        parameters={"rank": 3},
        **LINE,
    )
    loaded = load_model("llama", "lm")
    examples = read_examples(Path("llama.jsonl"), loaded)
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed_of(0, "start"))
        config = peft.LoraConfig(r=3, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(loaded.model, config)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        total, number = next_token(model, examples.batch(examples.step(step, 4, options.seed)))
        optimizer.zero_grad()
        (total / number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    ours, theirs = load_file("ours/adapter_model.safetensors"), peft.get_peft_model_state_dict(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], x, atol=1e-5) for name, x in theirs.items())


@pytest.mark.usefixtures("here")
def test_routing_collapses_to_a_lora_for_each_file() -> None:
    """Each has the outputs of PEFT's model with that task, and the adapter itself those of all skills alike."""
    import peft

    from mergekit_lfm.recipe.registry import TUNE_METHODS
    from mergekit_lfm.recipe.tune_options import tune_options
    from mergekit_lfm.runtime.quiet import quiet
    from mergekit_lfm.tune.work import TuneWork

    kind, task, files = "bert", "classification", ["bert.jsonl", "other.v2.jsonl"]
    shutil.copy(*files)
    how: dict[str, Any] = {**LINE, "task": task, "method": "mhr", "learning_rate": 0.05, "dev": files[0]}
    parameters = {"rank": 3, "skills": 3, "heads": 4}
    made = tune_model(kind, files, "out", parameters=parameters, **how)
    options = tune_options("mhr", parameters)
    loaded = load_model(kind, task, dtype="float64")
    prepared = TUNE_METHODS["mhr"].prepare(TuneWork(loaded.model, task, options, 4, kind, tasks=(kind, "other")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in prepared.model.named_parameters():
            if x.requires_grad:
                x.copy_(torch.randn(x.shape, generator=generator) * (2 if "router" in name else 0.1))
    prepared.model.eval()
    adapter, ids = prepared.adapter(), torch.arange(2, 12).view(2, 5)
    with torch.no_grad():
        routed = [prepared.model(input_ids=ids, task_ids=torch.tensor([t, t])).logits for t in range(3)]
    for expected, made_of in zip(routed, [*adapter.parts.values(), adapter], strict=True):
        chosen = ("r", "lora_alpha", "task_type", "target_modules", "modules_to_save")
        with quiet():
            config = peft.LoraConfig(**{name: made_of.config[name] for name in chosen})
            plain = peft.get_peft_model(load_model(kind, task, dtype="float64").model, config)
            peft.set_peft_model_state_dict(plain, dict(made_of.tensors))
        with torch.no_grad():
            assert torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-6)
    assert not torch.allclose(routed[0], routed[1], atol=1e-3)
    judged = [load_model(open_model(f"{kind}+{out}"), task) for out in ("out", f"out/tasks/{kind}", "out/tasks/other")]
    examples = read_examples(Path(files[0]), judged[0])
    losses = [mean_loss(each.model, examples, LOSSES[task], Options()) for each in judged]
    assert made.result.dev_loss == pytest.approx(losses[0], rel=1e-5) and losses[1] != losses[2]
    assert tune_model(kind, files, "out", parameters=parameters, **how).already_there
    assert "good" in run("verify", "out").stdout
    Path("out/tasks/other/adapter_model.safetensors").write_bytes(b"damaged")
    assert run("verify", "out").exit_code == 1


@pytest.mark.usefixtures("here")
def test_svf_keeps_singular_vectors_and_mask_the_entries_that_count() -> None:
    before = load_file("bert/model.safetensors")
    how: dict[str, Any] = {"task": "classification", "steps": 5, "learning_rate": 0.02, "threads": 1}
    tune_model("bert", "bert.jsonl", "svf.safetensors", method="svf", **how)
    after = load_file("svf.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    left, values, right = torch.linalg.svd(before[name].double())
    inside = left.T @ after[name].double() @ right.T  # diagonal, if the singular vectors are the same
    assert float((inside - torch.diag(inside.diagonal())).abs().max()) < 1e-5
    assert float((inside.diagonal() - values).abs().max()) > 1e-3
    collect_stats("fisher", "bert", "bert.jsonl", "fisher.safetensors", task="classification")
    tune_model(
        "bert",
        "bert.jsonl",
        "mask.safetensors",
        method="mask",
        stats="fisher.safetensors",
        parameters={"share": 0.01},
        **how,
    )
    fisher, masked = load_file("fisher.safetensors"), load_file("mask.safetensors")
    names = [name.removeprefix("fisher/") for name in fisher]
    whole = torch.cat([fisher[f"fisher/{name}"].flatten() for name in names])
    least = whole.sort(descending=True).values[int(0.01 * len(whole)) - 1]
    for name in names:
        new = masked.get(name, before[name])
        assert not bool(((new != before[name]) & (fisher[f"fisher/{name}"] < least)).any())
    assert sum(int((x != before[name]).sum()) for name, x in masked.items()) > 0.005 * len(whole)


@pytest.mark.usefixtures("here")
def test_frozen_features_and_a_trained_head_are_logistic_regression() -> None:
    """The head alone, on features that do not change, ends where a solver of the convex problem does."""
    how: dict[str, Any] = {"task": "classification", "steps": 400, "batch_size": 16, "weight_decay": 0.0, "threads": 1}
    Path("train.jsonl").write_text("".join(Path("bert.jsonl").read_text().splitlines(keepends=True)[:6]))
    tune_model(
        "bert", "train.jsonl", "probed", method="lp_ft", parameters={"probe": 1.0}, learning_rate=0.05, clip=0.0, **how
    )
    loaded, before = load_model("bert", "classification"), load_file("bert/model.safetensors")
    after = load_file("probed/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    examples = read_examples(Path("train.jsonl"), loaded)
    seen: list[torch.Tensor] = []
    loaded.model.get_submodule("classifier").register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].detach())
    )
    with torch.no_grad():
        for batch in examples.in_order(1):
            loaded.model(**{name: x for name, x in batch.items() if name != "labels"})
    features, labels = torch.cat(seen).double(), torch.stack([item["labels"] for item in examples.items])
    scores = features @ after["classifier.weight"].double().T + after["classifier.bias"].double()
    residual = scores.softmax(-1) - torch.nn.functional.one_hot(labels, 3)
    gradient = torch.cat([residual.T @ features, residual.sum(0)[:, None]], 1) / len(labels)
    start = features @ before["classifier.weight"].double().T + before["classifier.bias"].double()
    first = start.softmax(-1) - torch.nn.functional.one_hot(labels, 3)
    assert float(gradient.norm()) < 0.05 * float((first.T @ features / len(labels)).norm())


STAGES = """\
name: lora
job: tune
model: ./llama
data: llama.jsonl
task: lm
method: lora
steps: 3
---
name: whole
job: tune
model: ./llama
data: [llama.jsonl, {path: llama.jsonl, most: 3}]
task: lm
steps: 3
---
merge_method: linear
models: [{model: ./llama+lora}, {model: whole}]
parameters: {weight: 1}
"""


@pytest.mark.usefixtures("here")
def test_stages_tune_and_merge_and_an_unchanged_one_is_not_run_again() -> None:
    Path("r.yaml").write_text(STAGES)
    planned = plan_recipe("r.yaml", "out").result
    assert planned.stages is not None and not Path("out.stages").exists()
    assert run("plan", "r.yaml", "out").exit_code == 0
    first = run_recipe("r.yaml", "out")
    tensors = [load_file(f"{folder}/model.safetensors") for folder in ("llama", "out.stages/whole", "out")]
    assert all(not torch.equal(tensors[0][name], x) for name, x in tensors[1].items() if "proj" in name)
    times = {path: path.stat().st_mtime_ns for path in Path("out.stages").rglob("*") if path.is_file()}
    content = open_checkpoint("out").content
    again = run_recipe("r.yaml", "out")
    assert again.already_there and again.digest == first.digest
    Path("r.yaml").write_text(STAGES.replace("steps: 3\n---\nmerge", "steps: 4\n---\nmerge"))
    run_recipe("r.yaml", "out", overwrite=True)
    assert open_checkpoint("out").content != content
    lora = {path: path.stat().st_mtime_ns for path in Path("out.stages/lora").iterdir()}
    assert lora == {path: when for path, when in times.items() if path in lora}
    assert "good" in run("verify", "out").stdout and "good" in run("verify", "out.stages/whole").stdout


@pytest.mark.usefixtures("here")
def test_the_same_request_again_does_nothing_another_is_refused() -> None:
    made = tune_model("llama", "llama.jsonl", "out", **LINE)
    again = tune_model("llama", "llama.jsonl", "out", **LINE)
    assert again.already_there and again.result == made.result and again.digest == made.digest
    with pytest.raises(PlanError, match="out exists"):
        tune_model("llama", "llama.jsonl", "out", seed=1, **LINE)
    other = tune_model("llama", "llama.jsonl", "out", seed=1, overwrite=True, **LINE)
    assert other.digest != made.digest
    Path("llama.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(PlanError, match="out exists"):
        tune_model("llama", "llama.jsonl", "out", seed=1, **LINE)
    assert sorted(path.name for path in Path("out.training").iterdir() if not path.name.startswith(".")) == [
        "metrics.jsonl"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", "--data", "none.jsonl", "--task", "lm"], "there is no"),
        (["bert", "--data", "wrong.jsonl", "--task", "classification"], "found the label 7; expected 0 to 2"),
        (["llama", "--data", "long.jsonl", "--task", "lm"], "of at most 48 tokens"),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--device", "cuda"], "cannot be used here"),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--method", "bitfit"], "name that ends in .safetensors"),
        (
            ["llama", "--data", "llama.jsonl", "--task", "lm", "--rank", "3"],
            "has no such parameter; dora, lokr, lora, mhr have it",
        ),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--patience", "3"], "`dev` and `evaluate_every` beside it"),
        (
            ["llama", "--data", "llama.jsonl", "--task", "lm", "--learning-rate", "1e38", "--clip", "0"],
            "not finite",
        ),
        (["encoder", "--data", "encoder.jsonl", "--task", "embedding", "--method", "lp_ft"], "has no head of its own"),
        (["bert", "--data", "llama.jsonl", "--task", "classification"], "found no labels"),
        (
            ["bert", "--data", "bert.jsonl", "--dev", "image.npz", "--task", "classification"],
            "expected input_ids",
        ),
        (["llama", "--data", "image.npz", "--task", "lm"], "arrays are for classifiers"),
        (["llama", "--data", "half.jsonl", "--task", "lm"], "line 1: half a character"),
        (["encoder", "--data", "pair.jsonl", "--task", "embedding"], "found one pair, expected two or more"),
        (["encoder", "--data", "encoder.jsonl", "--task", "embedding", "--accumulate", "2"], "expected 1 for a loss"),
        (["encoder", "--data", "encoder.jsonl", "--task", "embedding", "--batch-size", "1"], "2 or more for a loss"),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--method", "lora", "--rank", "99"], "at most 32"),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--method", "lora", "--targets", " ,"], "names of modules"),
        (
            ["tied", "--data", "llama.jsonl", "--task", "lm", "--method", "lora", "--targets", "lm_head"],
            "would not go",
        ),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--evaluate-every", "2"], "`dev` beside it"),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--method", "mhr", "--heads", "5"], "heads is 5; expected"),
        (
            ["encoder", "--data", "encoder.jsonl", "--task", "embedding", "--method", "mhr"],
            "needs a task for each text",
        ),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--method", "mhr", "--checkpointing"], "none for mhr"),
        (["llama", "--data", "llama.jsonl", "--task", "lm", "--weight-decay", "inf"], "weight_decay is inf"),
    ],
)
def test_one_message_and_nothing_is_left(arguments: list[str], message: str, here: Path) -> None:
    np.savez("image.npz", pixels=np.zeros((4, 2), np.float32), labels=np.zeros(4, np.int64))
    Path("half.jsonl").write_text('{"text": "\\ud800 a"}\n')
    Path("pair.jsonl").write_text('{"text": "a", "positive": "b"}\n')
    Path("wrong.jsonl").write_text('{"text": "a", "label": 7}\n')
    Path("long.jsonl").write_text(json.dumps({"prompt": "word " * 60, "completion": "b"}) + "\n")
    before = sorted(here.rglob("*"))
    found = refusal(run("tune", *arguments, "-o", "out", "--threads", "1"))
    assert message in found
    left = [path for path in sorted(here.rglob("*")) if path not in before]
    assert left == []


@pytest.mark.usefixtures("here")
def test_a_folder_that_is_not_ours_is_not_written_to() -> None:
    Path("out.training").mkdir()
    Path("out.training/mine.txt").write_text("mine")
    with pytest.raises(PlanError, match=r"out.training holds mine.txt, which is not the state of a training"):
        tune_model("llama", "llama.jsonl", "out", **LINE)
    assert Path("out.training/mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(here: Path) -> None:
    arguments = ["tune", "llama", "--data", "llama.jsonl", "--task", "lm", "--steps", "100", "--threads", "1", "-q"]
    with warm_interpreter(*MODULES) as forks:

        def finish(out: str) -> str:
            ran = forks.command(*arguments, "-o", out, cwd=here)
            assert ran.code == 0, ran.err
            return open_checkpoint(out).content

        expected = finish("first")
        begun = time.monotonic()
        assert finish("whole") == expected
        seconds = time.monotonic() - begun
        for moment, sent in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGKILL)):
            out = f"out{moment}"
            forks.command(*arguments, "-o", out, cwd=here, kill_after_s=seconds * (moment + 1) / 4, signal=sent)
            assert not Path(out).exists() or open_checkpoint(out).content == expected
            assert finish(out) == expected


def test_a_second_run_for_the_same_output_is_refused(here: Path) -> None:
    Path("out.training").mkdir()
    with lock_folder(here / "out.training"), pytest.raises(PlanError, match=r"out.training"):
        tune_model("llama", "llama.jsonl", "out", **LINE)


@pytest.mark.usefixtures("here")
def test_transformers_loads_and_runs_the_result() -> None:
    tune_model("bert", "bert.jsonl", "out", task="classification", steps=3, threads=1)
    model, info = transformers.BertForSequenceClassification.from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(2, 12)[None]
    ours = load_model("out", "classification").model
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)


@pytest.mark.usefixtures("here")
def test_a_decoder_that_classifies_reads_the_last_token_of_each_row() -> None:
    """A batch has the loss of its rows, although some end with the token by which others would be lengthened."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, num_labels=3)
    transformers.LlamaForSequenceClassification(config).save_pretrained("decoder")
    trained_tokenizer("ended").save_pretrained("decoder")
    how: dict[str, Any] = {"task": "classification", "steps": 1, "batch_size": 16, "threads": 1, "clip": 0.0}
    tune_model("decoder", "bert.jsonl", "whole", **how)
    tune_model("decoder", "bert.jsonl", "parts", accumulate=16, **how)  # rows alone are not lengthened
    first = [json.loads(Path(f"{out}.training/metrics.jsonl").read_text())["loss"] for out in ("whole", "parts")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.usefixtures("here")
def test_overwriting_replaces_a_patch_alone_and_no_input() -> None:
    shutil.copy("bert/model.safetensors", "weights.safetensors")
    how: dict[str, Any] = {"task": "classification", "method": "svf", "steps": 1, "threads": 1, "overwrite": True}
    with pytest.raises(PlanError, match="exists and is not a patch, which alone is overwritten"):
        tune_model("bert", "bert.jsonl", "weights.safetensors", **how)
    collect_stats("fisher", "bert", "bert.jsonl", "fisher.safetensors", task="classification")
    how |= {"method": "mask", "stats": "fisher.safetensors"}
    with pytest.raises(PlanError, match=r"the output .*fisher.safetensors"):
        tune_model("bert", "bert.jsonl", "fisher.safetensors", **how)


@pytest.mark.usefixtures("here")
def test_experts_in_one_tensor_stay_and_are_refused_where_they_would_be_lost() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**LLAMA, "num_hidden_layers": 1}, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained("mixtral")
    trained_tokenizer().save_pretrained("mixtral")
    with pytest.raises(PlanError, match=r"mixtral holds: .*experts.*choose a method that makes an adapter"):
        tune_model("mixtral", "llama.jsonl", "full", **LINE)
    for method in ("lora", "lokr", "ln"):
        tune_model("mixtral", "llama.jsonl", method, method=method, **LINE)
        with pytest.warns(UserWarning, match=rf"for mixtral\+{method}, and its config names mixtral alone"):
            tune_model(f"mixtral+{method}", "llama.jsonl", f"{method}.lora", method="lora", **LINE)


@pytest.mark.usefixtures("here")
def test_a_pooler_that_embeddings_do_not_use_is_in_no_layer() -> None:
    how: dict[str, Any] = {"task": "embedding", "method": "layerwise", "steps": 3, "threads": 1, "learning_rate": 0.01}
    tune_model("encoder", "encoder.jsonl", "out", **how)
    before, after = load_file("encoder/model.safetensors"), load_file("out/model.safetensors")
    same = {name for name, x in before.items() if torch.equal(x, after[name])}
    assert same and all(name.startswith("pooler.") for name in same)
