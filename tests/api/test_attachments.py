"""Bottleneck adapters as files: made, run by `eval`, averaged by the engine, and refused where weights are needed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_tune import tiny  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lfm import (
    FormatError,
    PlanError,
    average_attachments,
    evaluate_models,
    export_attached,
    merge_adapters,
    open_attachment,
    run_recipe,
    tune_model,
)
from mergekit_lfm.api.attachments import load_attached
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.recipe.registry import TUNE_METHODS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.recipe.tune_options import tune_options
from mergekit_lfm.runtime.attach import SHARED, attach
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import classes
from mergekit_lfm.train.texts import read_examples
from mergekit_lfm.tune.work import Prepared, TuneWork

HOW: dict[str, Any] = {"task": "classification", "steps": 8, "batch_size": 8, "learning_rate": 0.05, "threads": 1}


@pytest.fixture(scope="session")
def made(tiny: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:  # noqa: F811
    """A folder with two models and data, and with two adapters by each of two methods for one of them."""

    def make(folder: Path) -> None:
        for kind in ("bert", "llama"):
            shutil.copytree(tiny / kind, folder / kind)
            shutil.copy(tiny / f"{kind}.jsonl", folder)
        base, data = folder / "bert", folder / "bert.jsonl"
        for name, method, seed in [
            ("a", "houlsby", 0),
            ("b", "houlsby", 1),
            ("c", "compacter", 0),
            ("d", "compacter", 1),
        ]:
            tune_model(base, data, folder / f"{name}.safetensors", method=method, seed=seed, **HOW)
            shutil.rmtree(folder / f"{name}.safetensors.training")

    return made_once("tiny-attached", make)


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, where the test runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(method: str, base: str, **parameters: Any) -> Prepared:
    """A model that is ready to be trained by a method."""
    loaded = load_model(base, "classification")
    torch.manual_seed(0)
    options = tune_options(method, parameters)
    prepared: Prepared = TUNE_METHODS[method].prepare(TuneWork(loaded.model, "classification", options, 4, base))
    return prepared


@pytest.mark.usefixtures("here")
def test_eval_runs_a_model_with_an_adapter_and_inspect_describes_it() -> None:
    lines = [json.loads(line) for line in Path("bert.jsonl").read_text().splitlines()]
    loaded = load_model("bert", "classification")
    assert loaded.tokenizer is not None
    attach(loaded.model, open_attachment("a.safetensors"), open_checkpoint("bert").content)
    right = 0
    for line in lines:
        ids = torch.tensor([loaded.tokenizer(line["text"])["input_ids"]])
        right += int(loaded.model(ids).logits.argmax()) == line["label"]
    ran = ("--data", "bert.jsonl", "--task", "classification", "--json")
    scores = answer(run("eval", "bert", "bert+a.safetensors", *ran))["models"]
    assert [each["model"] for each in scores] == ["bert", "bert+a.safetensors"]
    correct = [each["files"][0]["correct"] for each in scores]
    assert correct[1] == right > correct[0]
    trunk, ids = load_attached("bert+a.safetensors", "embedding").model, torch.arange(2, 9)[None]
    with torch.no_grad():  # without a head the one in the file is not used
        assert torch.equal(trunk(ids).last_hidden_state, loaded.model.get_submodule("bert")(ids).last_hidden_state)
    data = answer(run("inspect", "a.safetensors", "--json"))["attachment"]
    assert data["method"] == "houlsby" and data["base"] == open_checkpoint("bert").content
    text = run("inspect", "a.safetensors").stdout
    assert "runs with its model alone" in text and "classifier.weight, classifier.bias" in text


@pytest.mark.usefixtures("here")
def test_the_engine_averages_adapters_by_their_weights() -> None:
    done = run("average", "a.safetensors", "b.safetensors", "--weights", "1,3", "-o", "mean.safetensors")
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "mean.safetensors"
    first, second, mean = (load_file(f"{name}.safetensors") for name in ("a", "b", "mean"))
    assert mean.keys() == first.keys()
    for name, x in mean.items():
        expected = first[name].double() / 4 + second[name].double() * 3 / 4
        assert float((x - expected).abs().max()) < 1e-7
    assert open_attachment("mean.safetensors").info.base == open_checkpoint("bert").content
    evaluate_models("bert+mean.safetensors", data="bert.jsonl", task="classification")
    again = average_attachments(["a.safetensors", "b.safetensors"], "mean.safetensors", weights=[2, 6])
    assert again.already_there and again.result.shares == (0.25, 0.75)
    with pytest.raises(PlanError, match=r"mean.safetensors exists"):
        average_attachments(["a.safetensors", "b.safetensors"], "mean.safetensors")
    average_attachments(["a.safetensors", "b.safetensors"], "mean.safetensors", overwrite=True)
    assert not torch.equal(load_file("mean.safetensors")["classifier.bias"], mean["classifier.bias"])


@pytest.mark.usefixtures("here")
def test_of_compacters_the_matrices_are_averaged_and_not_their_factors() -> None:
    average_attachments(["c.safetensors", "d.safetensors"], "mean.safetensors")
    at, found = "encoder.layer.1.attention_adapter", load_file("mean.safetensors")

    def matrix(tensors: Mapping[str, Tensor]) -> Tensor:
        left, right = tensors[f"{SHARED}.left"].double(), (tensors[f"{at}.up_s"] @ tensors[f"{at}.up_t"]).double()
        return torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)]).sum(0).T

    matrices = [matrix(load_file(f"{name}.safetensors")) for name in ("c", "d")]
    assert float(matrices[0].abs().max()) > 1e-3
    assert float((found[f"{at}.up.weight"] - (matrices[0] + matrices[1]) / 2).abs().max()) < 1e-7
    assert not any(name.startswith(SHARED) for name in found)


@pytest.mark.usefixtures("here")
def test_adamix_writes_the_mean_of_its_experts() -> None:
    prepared = prepare("adamix", "bert", experts=3)
    assert prepared.attachment is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in prepared.model.parameters():
            if x.requires_grad:
                x.copy_(torch.randn(x.shape, generator=generator))
    tensors = prepared.attachment().tensors
    trained = {name: x.detach() for name, x in prepared.model.named_parameters() if x.requires_grad}
    for layer in range(2):
        for part in ("down.weight", "down.bias", "up.weight", "up.bias"):
            at = f"encoder.layer.{layer}.ffn_adapter"
            experts = [trained[f"bert.{at}.experts.{i}.{part}"].double() for i in range(3)]
            assert float((tensors[f"{at}.{part}"] - (experts[0] + experts[1] + experts[2]) / 3).abs().max()) < 1e-6
    assert len(tensors) == 2 * 4 + 2


def test_adamix_killed_on_the_way_goes_on_to_the_same_numbers(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """The random numbers of a step depend on the seed and the step alone."""

    def train(place: Path, stop: int | None) -> Mapping[str, Tensor]:
        prepared = prepare("adamix", str(tiny / "bert"))
        assert prepared.loss is not None and prepared.attachment is not None
        examples = read_examples(tiny / "bert.jsonl", load_model(tiny / "bert", "classification"))

        def tell(done: int, _: int, __: Mapping[str, Any]) -> None:
            if done == stop:
                raise KeyboardInterrupt

        options, pauses = Options(steps=4, batch_size=2), Pauses(every_s=0, saving_share=math.inf)
        loss = prepared.loss(classes)
        fit(prepared.model, examples, loss, options, place=place, request="r", pauses=pauses, tell=tell)
        return prepared.attachment().tensors

    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", 2)
    rest = train(tmp_path / "killed", None)
    assert all(torch.equal(x, rest[name]) for name, x in whole.items())


RECIPE = "merge_method: linear\nmodels: [{model: ./bert}, {model: %s}]\nparameters: {weight: 1}\n"


REFUSED: list[tuple[list[str], str]] = [
    (["merge", "merged.yaml", "out"], "which is not a change of a weight and cannot be merged into weights; run it"),
    (["merge", "alone.yaml", "out"], "a.safetensors is a bottleneck adapter, which is not a change of a weight"),
    (
        ["stats", "gram", "bert+a.safetensors", "--data", "bert.jsonl", "--task", "lm", "-o", "out"],
        "which is not a change of a weight",
    ),
    (["extract-lora", "bert+a.safetensors", "--base", "bert", "-o", "out"], "which is not a change of a weight"),
    (["eval", "llama+a.safetensors", "--text", "bert.jsonl"], "belongs to a model of content"),
    (["eval", "bert+0.5*a.safetensors", "--text", "bert.jsonl"], "expected one bottleneck adapter, as a whole"),
    (["eval", "bert+a.safetensors+b.safetensors", "--text", "bert.jsonl"], "found 1*a.safetensors+1*b.safetensors"),
    (["average", "a.safetensors", "-o", "out.safetensors"], "found 1 adapters and 1 weights"),
    (
        ["average", "a.safetensors", "c.safetensors", "-o", "out.safetensors"],
        "form is compact, expected bottleneck",
    ),
    (["average", "a.safetensors", "b.safetensors", "-o", "out"], "give a name that ends in .safetensors"),
    (["average", "a.safetensors", "b.safetensors", "--weights", "1,-1", "-o", "out.safetensors"], "none below 0"),
    (["average", "a.safetensors", "bert/model.safetensors", "-o", "out.safetensors"], "is not a bottleneck"),
    (["average", "a.safetensors", "b.safetensors", "--overwrite", "-o", "a.safetensors"], "the output"),
    (["tune", "bert", "--method", "compacter", "--rules", "5", "-o", "out.safetensors"], "rules is 5; expected a"),
    (["tune", "bert", "--method", "houlsby", "-o", "out"], "makes a bottleneck adapter, which is a file"),
    (["tune", "bert", "--method", "adapter_fusion", "-o", "out.safetensors"], "expected files with commas"),
    (
        ["tune", "bert", "--method", "adapter_fusion", "--adapters", "a.safetensors", "-o", "out.safetensors"],
        "found one file, expected two or more",
    ),
    (
        ["tune", "llama", "--method", "adapter_fusion", "--adapters", "a.safetensors,b.safetensors"],
        "belongs to a model of content",
    ),
    (
        ["tune", "bert", "--method", "houlsby", "--overwrite", "-o", "weights.safetensors"],
        "not a bottleneck adapter",
    ),
    (["tune", "bert+a.safetensors", "--method", "lora", "-o", "out"], "which is not a change of a weight"),
]


def test_one_message_and_nothing_is_written(here: Path) -> None:
    Path("merged.yaml").write_text(RECIPE % "./bert+a.safetensors")
    Path("alone.yaml").write_text(RECIPE % "./a.safetensors")
    shutil.copy("bert/model.safetensors", "weights.safetensors")
    before = sorted(here.rglob("*"))
    for arguments, message in REFUSED:
        if arguments[0] == "tune":
            task = "lm" if arguments[1] == "llama" else "classification"
            data = ["--data", f"{arguments[1].partition('+')[0]}.jsonl", "--task", task, "--threads", "1"]
            arguments = [*arguments, *data, *([] if "-o" in arguments else ["-o", "out.safetensors"])]
        assert message in " ".join(refusal(run(*arguments)).split())
        assert sorted(here.rglob("*")) == before


@pytest.mark.usefixtures("here")
def test_a_damaged_file_and_one_of_another_kind_are_refused() -> None:
    with pytest.raises(PlanError, match="cannot be merged into weights"):
        merge_adapters(["a.safetensors", "b.safetensors"], "out")
    data = Path("a.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:-7])
    Path("facts.safetensors").write_bytes(data.replace(b'"lfm.config"', b'"lfm.confug"'))
    tensors = load_file("a.safetensors")
    save_file(tensors, "plain.safetensors")
    for name, message in [
        ("cut", "cut.safetensors"),
        ("facts", "has damaged metadata"),
        ("plain", "is not a bottleneck adapter file"),
    ]:
        with pytest.raises(FormatError, match=message):
            open_attachment(f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        open_attachment("none.safetensors")


@pytest.mark.usefixtures("here")
def test_the_same_request_again_does_nothing_and_a_fusion_depends_on_its_files() -> None:
    first, again = (tune_model("bert", "bert.jsonl", "e.safetensors", method="pfeiffer", **HOW) for _ in range(2))
    assert again.already_there and again.result == first.result and first.result.makes == "attachment"
    parameters = {"adapters": "a.safetensors, b.safetensors"}
    fused = tune_model("bert", "bert.jsonl", "f.safetensors", method="adapter_fusion", parameters=parameters, **HOW)
    inner = load_file("f.safetensors")
    assert torch.equal(
        inner["encoder.layer.1.ffn_adapter.adapters.1.up.weight"],
        load_file("b.safetensors")["encoder.layer.1.ffn_adapter.up.weight"],
    )
    tune_model("bert", "bert.jsonl", "b.safetensors", method="houlsby", seed=2, overwrite=True, **HOW)
    how = {**HOW, "method": "adapter_fusion", "parameters": parameters, "overwrite": True}
    other = tune_model("bert", "bert.jsonl", "f.safetensors", **how)
    assert other.digest != fused.digest and not other.already_there
    assert str(Path.cwd()) not in json.dumps(open_attachment("f.safetensors").info.options)


@pytest.mark.usefixtures("here")
def test_a_stage_of_a_recipe_is_judged_with_its_model() -> None:
    stage = "name: one\njob: tune\nmodel: ./bert\ndata: bert.jsonl\ntask: classification\nmethod: pfeiffer\nsteps: 2\n"
    judged = "job: eval\nmodels: [bert, bert+one]\ndata: bert.jsonl\ntask: classification\n"
    Path("r.yaml").write_text(f"{stage}---\n{judged}")
    scores = run_recipe("r.yaml", "out.json").result
    by_hand = evaluate_models("bert+out.stages/one.safetensors", data="bert.jsonl", task="classification").result
    assert scores["bert+one"] == by_hand.popitem()[1]  # type: ignore[attr-defined]
    other = stage.replace("name: one", "name: two") + "seed: 1\n"
    fused = stage.replace("name: one\n", "").replace("pfeiffer", "adapter_fusion")
    Path("r.yaml").write_text(f"{stage}---\n{other}---\n{fused}parameters: {{adapters: 'one, two'}}\n")
    assert run_recipe("r.yaml", "fused.safetensors").result.makes == "attachment"
    inner = load_file("fused.safetensors")["encoder.layer.1.ffn_adapter.adapters.1.up.weight"]
    assert torch.equal(inner, load_file("fused.stages/two.safetensors")["encoder.layer.1.ffn_adapter.up.weight"])
    Path("r.yaml").write_text(f"{stage}---\nmerge_method: passthrough\nmodels: [{{model: bert, adapter: one}}]\n")
    assert "is not a change of a weight and cannot be merged" in refusal(run("merge", "r.yaml", "out"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("kind", "method"), [("bert", "compacter"), ("llama", "parallel"), ("bert", "adapter_fusion")])
def test_an_exported_model_runs_without_this_package(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded by transformers with the folder's own code, it has the outputs of the model with its adapter."""
    import transformers
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(transformers.utils.hub, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    task = {"bert": "classification", "llama": "lm"}[kind]
    more: dict[str, Any] = {"parameters": {"adapters": "a.safetensors,b.safetensors"}} if "fusion" in method else {}
    tune_model(kind, f"{kind}.jsonl", "x.safetensors", method=method, **{**HOW, "task": task}, **more)
    done = answer(run("export", f"{kind}+x.safetensors", "-o", "out", "--json"))
    assert done["code"] == "modeling_attached.py" and export_attached(f"{kind}+x.safetensors", "out").already_there
    assert "mergekit" not in Path("out/modeling_attached.py").read_text()
    auto = getattr(transformers, done["auto"])
    loaded, info = auto.from_pretrained("out", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()) and type(loaded).__name__ == done["class_name"]
    ids, expected = torch.arange(2, 12).view(2, 5), load_attached(f"{kind}+x.safetensors", task).model.eval()
    plain = load_model(kind, task).model.eval()
    with torch.no_grad():
        found, wanted, before = (model.eval()(input_ids=ids).logits for model in (loaded, expected, plain))
    assert torch.equal(found, wanted) or torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(wanted, before, atol=1e-3)
    assert "good" in run("verify", "out").stdout and transformers.AutoTokenizer.from_pretrained("out")
    with pytest.raises(PlanError, match=rf"{done['class_name']} is a class of its own code, which is not run"):
        load_model("out", task)


@pytest.mark.usefixtures("here")
def test_only_a_model_with_an_adapter_is_exported() -> None:
    assert "has no bottleneck adapter, expected MODEL+FILE" in refusal(run("export", "bert", "-o", "out"))
    assert "belongs to a model of content" in refusal(run("export", "llama+a.safetensors", "-o", "out"))
    assert not Path("out").exists()


@pytest.mark.slow
def test_adapters_leave_states_of_other_texts_nearer_to_the_base_than_full_tuning(tmp_path: Path) -> None:
    """As He et al. 2021, arXiv 2106.03164, section 3.1, found it; by the cosine, on texts of another kind."""
    root = Path(__file__).parents[2] / "recipes" / "quickstart"
    how: dict[str, Any] = {"task": "lm", "steps": 40, "batch_size": 8, "threads": 1}
    ways = {"full": (1e-3, "full"), "lora": (1e-3, "lora"), "houlsby": (3e-3, "houlsby.safetensors")}
    base = load_attached(root / "base", "lm")
    assert base.tokenizer is not None
    tokens = base.tokenizer((root / "code.txt").read_text(), verbose=False)["input_ids"]
    ids = torch.tensor(tokens[:800]).view(8, 100)

    def states(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.normalize(model.model(input_ids=ids).last_hidden_state, dim=-1)

    moved = {}
    for method, (rate, name) in ways.items():
        out = tmp_path / name
        tune_model(root / "base", root / "docs.txt", out, method=method, learning_rate=rate, **how)
        loaded = load_attached(out if method == "full" else f"{root / 'base'}+{out}", "lm")
        moved[method] = float(1 - (states(loaded.model) * states(base.model)).sum(-1).mean())
    assert 1e-3 < moved["lora"] < moved["houlsby"] < moved["full"]
