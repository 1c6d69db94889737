"""`make_student` beside models of transformers that are cut by hand: layers, units of MLPs, and new weights."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import ROOT, answer, refusal, run
from helpers_editing import LLAMA
from helpers_tune import BERT, tiny, transformers  # noqa: F401
from safetensors.torch import load_file, save_file

from mergekit_lfm import FormatError, PlanError, collect_stats, make_student, open_checkpoint, verify_output
from mergekit_lfm.api.recipes import plan_recipe, run_recipe

GPT2 = {"vocab_size": 340, "n_positions": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 0}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_hidden_layers": 3}, "model.layers"),
    "encoder": ("BertModel", "BertConfig", {**BERT, "num_hidden_layers": 3}, "encoder.layer"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": 1, "initializer_range": 0.1}, "transformer.h"),
}
# The modules of an MLP by their names in a layer: those that write units, and the one that reads them.
MLPS = {
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "encoder": (("intermediate.dense",), "output.dense"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
}
IDS = torch.arange(24).view(2, 12) * 7 % 340


def make_model(kind: str, folder: Path) -> Any:
    """A model of three layers with random weights and biases, saved."""
    torch.manual_seed(5)
    name, config, facts, _ = MODELS[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**facts))
    with torch.no_grad():
        for parameter, x in model.named_parameters():
            if parameter.endswith("bias"):
                x.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model.eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS)[0]
    return found


def loaded(kind: str, folder: Any) -> Any:
    model, report = getattr(transformers, MODELS[kind][0]).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def weights_of(layer: Any, kind: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of modules that write units, weights and bias [units, inputs + 1]; of the one that reads them [units, outputs].

    The latter shares its memory with the model.
    """
    turned = kind == "gpt2"  # Conv1D stores [in, out]
    writers = []
    for name in MLPS[kind][0]:
        module = layer.get_submodule(name)
        weight = module.weight.T if turned else module.weight
        writers.append(torch.cat([weight, *([] if module.bias is None else [module.bias[:, None]])], 1).detach())
    reader = layer.get_submodule(MLPS[kind][1]).weight.detach()
    return writers, reader if turned else reader.T


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", MODELS)
def test_layers_and_units_are_those_of_the_model_cut_by_hand(kind: str) -> None:
    """Units by the product of norms in float64; the outputs of transformers' model without these layers and units."""
    model = make_model(kind, Path(kind))
    chosen = {}
    for number, layer in enumerate(model.get_submodule(MODELS[kind][3])):
        writers, reader = weights_of(layer, kind)
        worth = np.prod([np.linalg.norm(x.double().numpy(), axis=1) for x in (*writers, reader)], axis=0)
        ranked = sorted(range(len(worth)), key=lambda i: (-worth[i], i))
        chosen[number], dropped = sorted(ranked[: len(ranked) // 2]), ranked[len(ranked) // 2 :]
        reader[dropped] = 0
    layers = model.get_submodule(MODELS[kind][3])
    path, _, last = MODELS[kind][3].rpartition(".")
    order = [2, 0, 2]
    setattr(model.get_submodule(path), last, torch.nn.ModuleList(copy.deepcopy(layers[i]) for i in order))
    for number, layer in enumerate(model.get_submodule(MODELS[kind][3])):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    made = make_student(kind, "student", layers=order, mlp=0.5)
    student = loaded(kind, Path(made))
    torch.testing.assert_close(outputs(student), outputs(model), atol=1e-5, rtol=1e-5)
    units = len(chosen[0]) * 2
    assert (made.result.layers, made.result.of, made.result.units, made.result.of_units) == (
        (2, 0, 2), 3, units // 2, units,
    )  # fmt: skip
    assert made.result.parameters == sum(x.numel() for x in {id(x): x for x in student.parameters()}.values())
    first, _ = weights_of(student.get_submodule(MODELS[kind][3])[1], kind)
    assert first[0].shape[0] == units // 2 and verify_output("student").result.differences == ()
    assert make_student(kind, "student", layers=order, mlp=0.5).already_there


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", MODELS)
def test_units_that_nothing_reads_are_dropped_first(kind: str) -> None:
    """Then the outputs are the model's."""
    model = make_model(kind, Path(kind))
    for layer in model.get_submodule(MODELS[kind][3]):
        weights_of(layer, kind)[1][1::2] = 0
    model.save_pretrained(kind)
    student = loaded(kind, Path(make_student(kind, "student", mlp=0.5)))
    torch.testing.assert_close(outputs(student), outputs(model), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("here")
def test_statistics_rank_units_by_their_part_of_the_output(tiny: Path) -> None:  # noqa: F811
    """The root mean square of each unit's part of the down-projection's output, from the activations themselves."""
    shutil.copytree(tiny / "llama", "llama")
    model = transformers.LlamaForCausalLM.from_pretrained("llama").eval()
    down, seen = model.model.layers[1].mlp.down_proj, []
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().flatten(0, -2)))
    ids = IDS % model.config.vocab_size
    with torch.inference_mode():
        model(ids)
    collect_stats("gram", "llama", [{"input_ids": ids}], "gram.safetensors", task="lm")
    parts = torch.cat(seen)[:, :, None] * down.weight.detach().double().T  # [tokens, units, width]
    worth = parts.pow(2).sum(2).mean(0).sqrt()
    kept = sorted(worth.argsort(descending=True)[: len(worth) // 3].tolist())
    make_student("llama", "student", mlp=1 / 3, stats="gram.safetensors")
    old, new = (load_file(f"{name}/model.safetensors") for name in ("llama", "student"))
    for side, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"model.layers.1.mlp.{side}_proj.weight"
        assert torch.equal(new[name], old[name].index_select(axis, torch.tensor(kept)))
    shutil.copytree("llama", "other")
    save_file({name: x + 1 for name, x in old.items()}, "other/model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match=r"stats: gram.safetensors was collected on another model, .* stats gram other"):
        make_student("other", "x", mlp=0.5, stats="gram.safetensors")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", MODELS)
def test_random_weights_are_by_the_seed_and_need_a_config_alone(kind: str) -> None:
    make_model(kind, Path(kind))
    one = make_student(kind, "one", keep=0.67, mlp=0.5, random=True)
    Path(kind, "model.safetensors").unlink()
    before = torch.get_rng_state()
    make_student(kind, "same", keep=0.67, mlp=0.5, random=True, seed=0)
    make_student(kind, "other", layers=[0, 2], mlp=0.5, random=True, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    files = {name: Path(name, "model.safetensors").read_bytes() for name in ("one", "same", "other")}
    assert files["one"] == files["same"] != files["other"] and len(files["one"]) == len(files["other"])
    student = loaded(kind, "one")
    config = json.loads(Path("one/config.json").read_text())
    assert one.result.layers == (0, 2) and one.result.seed == 0 and not one.warnings
    torch.manual_seed(0)
    expected = getattr(transformers, MODELS[kind][0])(student.config).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in student.state_dict().items())
    assert config["architectures"] == [MODELS[kind][0]] and outputs(student).isfinite().all()


@pytest.mark.usefixtures("here")
def test_a_student_is_a_stage_that_later_ones_tune_and_judge(tiny: Path) -> None:  # noqa: F811
    shutil.copytree(tiny / "bert", "bert")
    shutil.copy(tiny / "bert.jsonl", "bert.jsonl")
    Path("r.yaml").write_text(
        "name: gram\njob: stats\nkind: gram\nmodel: ./bert\ndata: bert.jsonl\ntask: classification\n---\n"
        "name: small\njob: student\nmodel: ./bert\nlayers: [1]\nmlp: 0.25\nstats: gram\n---\n"
        "name: tuned\njob: tune\nmodel: small\ndata: bert.jsonl\ntask: classification\nsteps: 2\n---\n"
        "job: eval\nmodels: [small, tuned]\ndata: bert.jsonl\ntask: classification\n"
    )
    plan_recipe("r.yaml", "out.json")
    shutil.copytree(tiny / "llama", "models/teacher")
    shutil.copy(tiny / "llama.jsonl", "texts.jsonl")
    blocks = re.findall("```yaml\n(.*?)```", (ROOT / "docs/distillation.md").read_text(), re.DOTALL)
    (block,) = (each for each in blocks if "job: student" in each)
    Path("docs.yaml").write_text(block)
    plan_recipe("docs.yaml", "out")
    run_recipe("r.yaml", "out.json")
    small, tuned = (open_checkpoint(f"out.stages/{name}") for name in ("small", "tuned"))
    assert dict(small) == dict(tuned) and small["bert.encoder.layer.0.intermediate.dense.weight"].shape == (12, 32)


@pytest.mark.usefixtures("here")
def test_the_command_says_the_kept_parts_and_refuses_others(tiny: Path) -> None:  # noqa: F811
    for name in ("llama", "encoder"):
        shutil.copytree(tiny / name, name)
    found = answer(run("student", "llama", "--layers", "1", "--mlp", "0.5", "-o", "out", "--json"))
    assert (found["layers"], found["of"], found["units"] * 2) == ([1], 2, found["of_units"])
    assert "layers: 0, 1 of 2" in run("student", "llama", "--keep", "1", "-o", "all").stderr
    shutil.copytree("encoder", "xlm")
    config = json.loads(Path("xlm/config.json").read_text())
    Path("xlm/config.json").write_text(json.dumps({**config, "model_type": "xlm-roberta"}))
    shutil.copytree("llama", "quantised")
    config = json.loads(Path("llama/config.json").read_text())
    text = json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    Path("quantised/config.json").write_text(text)
    for model, options, message in (
        ("llama", ["--layers", "0,2,5"], "layers: found 2, 5, and llama has 2 layers; expected numbers from 0 to 1"),
        ("llama", ["--layers", "0,x"], "layers[1]: "),
        ("llama", ["--layers", "0", "--keep", "0.5"], "keep: found beside `layers`, expected one of the two"),
        ("llama", [], "nothing makes the model smaller or new: give layers, keep, mlp or random"),
        ("llama", ["--mlp", "1.5"], "mlp: found 1.5, expected less than or equal to 1"),
        ("llama", ["--keep", "0"], "keep: found 0.0, expected greater than 0"),
        ("llama", ["--mlp", "0.5", "--seed", "3"], "seed: found without `random`"),
        ("llama", ["--layers", "0", "--stats", "llama/config.json"], "stats: found without `mlp`"),
        ("xlm", ["--mlp", "0.5"], "xlm has model_type 'xlm-roberta', whose MLPs are not known; expected one of bert, "),
        ("quantised", ["--layers", "0"], "quant_method 'gptq'"),
        ("quantised", ["--random"], "quantised (gptq)"),
    ):
        assert message in refusal(run("student", model, *options, "-o", "x")), message
    assert not Path("x").exists()
    Path("llama/config.json").unlink()
    with pytest.raises(FormatError, match=r"found no config.json with a model_type"):
        make_student("llama", "x", random=True)
