"""`merge`, `plan` and `verify` of recipes with jobs; and recipes/extract.yaml as it stands."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import ROOT, answer, refusal, run
from helpers_extract import save_trio
from models import files_of
from safetensors.torch import load_file

from mergekit_lfm.artifacts.adapter import open_adapter
from mergekit_lfm.views.adapted import open_model

QUICKSTART = ROOT / "recipes" / "quickstart"
EXTRACT = "job: extract\nmodel: one\nbase_model: base\nrank: 2\n"
STAGES = f"name: lora\n{EXTRACT}---\nmerge_method: passthrough\nmodels: [{{model: base, adapter: lora}}]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base, two fine-tunes and recipes."""
    save_trio(tmp_path)
    (tmp_path / "extract.yaml").write_text(EXTRACT)
    (tmp_path / "stages.yaml").write_text(STAGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.usefixtures("here")
def test_a_dry_run_prints_the_adapter_to_make() -> None:
    result = run("merge", "extract.yaml", "--dry-run")
    assert result.exit_code == 0
    assert lines_of(result.stdout) == [
        "extract the change from base to one",
        "write an adapter at merged/extract",
        "rank 2, or the smaller side of a matrix",
        "saved whole if they differ: model.norm.weight",
        "",
        "product number shape rank at most",
        "self_attn.q_proj 2 12 x 10 2",
        "self_attn.v_proj 2 12 x 10 2",
    ]
    assert run("plan", "extract.yaml").stdout == result.stdout and not Path("merged").exists()
    data = answer(run("plan", "extract.yaml", "out", "--json"))
    assert data["out"] == "out" and data["recipe"]["rank"] == 2 and data["saved"] == ["model.norm.weight"]
    assert data["matrices"][0] == {
        "name": "model.layers.0.self_attn.q_proj.weight",
        "shape": [12, 10],
        "count": 1,
        "rank": 2,
    }


def test_a_plan_names_tensors_that_no_adapter_holds(here: Path) -> None:
    (here / "extract.yaml").write_text(EXTRACT.replace("rank: 2", "energy: 0.5\nexclude: [norm, v_proj]"))
    lines = lines_of(run("plan", "extract.yaml").stdout)
    assert "left out excluded: 3 tensors, such as model.layers.0.self_attn.v_proj.weight" in lines
    assert "rank as small as it keeps 0.5 of each matrix's change" in lines


@pytest.mark.usefixtures("here")
def test_it_writes_an_adapter_once() -> None:
    result = run("merge", "extract.yaml", "out")
    assert (result.exit_code, result.stdout) == (0, "out\n")
    assert lines_of(result.stderr)[0] == "tensors number rank of the change kept"
    again = run("merge", "extract.yaml", "out")
    assert (again.exit_code, again.stdout) == (0, "out\n")
    assert again.stderr == "already there: the adapter of the same request; nothing was done\n"
    data = json.loads(run("merge", "extract.yaml", "out", "--json").stdout)
    lock = json.loads(Path("out/adapter.lock.json").read_text())
    assert data["already_there"] and (data["digest"], data["output_digest"]) == (lock["plan"], lock["digest"])
    assert "out: good, all as its lock says" in run("verify", "out").stdout
    assert "out exists" in refusal(run("extract-lora", "one", "--base", "base", "-o", "out", "--rank", "3"))
    assert "already there" in run("extract-lora", "one", "--base", "base", "-o", "out", "--rank", "2").stderr


@pytest.mark.usefixtures("here")
def test_options_that_no_stage_takes_are_refused() -> None:
    result = run("merge", "extract.yaml", "--seed", "3", "--push-to", "me/x", "--nan", "warn")
    assert result.exit_code == 2
    assert "No stage of the recipe takes --seed, --push-to, --nan; leave it out." in result.stderr
    assert run("merge", "extract.yaml", "out", "--memory", "1GB", "--threads", "2", "--device", "cpu").exit_code == 0
    assert run("plan", "stages.yaml", "--seed", "3").exit_code == 0
    result = run("plan", "extract.yaml", "--explain", "x")
    assert result.exit_code == 2 and "No stage of the recipe takes --explain" in result.stderr


def test_an_output_of_a_job_is_not_pushed_by_a_stage_before_it(here: Path) -> None:
    text = "name: mean\nmerge_method: passthrough\nmodels: [{model: one}]\n---\n"
    (here / "stages.yaml").write_text(text + EXTRACT.replace("model: one", "model: mean"))
    result = run("merge", "stages.yaml", "--seed", "3", "--private")
    assert result.exit_code == 2 and "No stage of the recipe takes --private; leave it out." in result.stderr
    assert run("merge", "stages.yaml", "out").exit_code == 0
    assert Path("out/adapter_config.json").exists()


def test_all_stages_are_shown_and_their_warnings_printed(here: Path) -> None:
    (here / "stages.yaml").write_text(STAGES.replace("rank: 2", "rank: 2\nenergie: 1"))
    assert "energie: unknown key, did you mean energy?" in refusal(run("plan", "stages.yaml"))
    result = run("merge", "stages.yaml", "out", "--allow-unknown", "--dry-run")
    lines = lines_of(result.stdout)
    assert lines[:2] == ["stage lora", "extract the change from base to one"] and "the output" in lines
    data = answer(run("plan", "stages.yaml", "--allow-unknown", "--json"))
    assert [stage["stage"] for stage in data["stages"]] == ["lora"] and data["stages"][0]["recipe"]["job"] == "extract"
    assert not Path("out.stages").exists()
    result = run("merge", "stages.yaml", "out", "--allow-unknown")
    assert "warning: stage lora: energie has no effect here" in result.stderr and result.exit_code == 0
    assert {path.name for path in Path("out.stages").iterdir()} == {"lora"}
    assert run("merge", "stages.yaml", "out", "--allow-unknown", "--drop-stages").exit_code == 0
    assert not Path("out.stages").exists()
    assert run("verify", "out").exit_code == 0


@pytest.mark.usefixtures("here")
def test_explanations_are_of_merges_only() -> None:
    result = run("plan", "stages.yaml", "--explain", "*q_proj*")
    assert result.exit_code == 0 and "model.layers.0.self_attn.q_proj.weight" in result.stdout


@pytest.mark.usefixtures("here")
def test_verify_compares_the_output_of_stages_with_their_results() -> None:
    assert run("merge", "stages.yaml", "out").exit_code == 0
    result = run("verify", "out", "--against-inputs", "stages.yaml", "--sample", "all")
    assert result.exit_code == 0 and "and its inputs give; 5 tensors computed again" in result.stdout


# ------------------------------------------------------------------ recipes/extract.yaml


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extract") / "out"
    result = run("merge", str(ROOT / "recipes/extract.yaml"), str(out), "--threads", "2")
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    return out


def doubles(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: x.double().numpy() for name, x in tensors.items()}


def test_extract_yaml_gives_the_fine_tune_back_as_far_as_it_says(extracted: Path) -> None:
    """The kept share in float64: of every matrix at least 0.9, and of all as the lock and the card say."""
    factors = doubles(load_file(extracted / "adapter_model.safetensors"))
    base, docs = (doubles(load_file(QUICKSTART / name / "model.safetensors")) for name in ("base", "docs"))
    total = left = 0.0
    for name, x in docs.items():
        change = x - base[name]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            held = factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
        elif f"{key}.lora_embedding_A" in factors:
            held = (factors[f"{key}.lora_embedding_B"] @ factors[f"{key}.lora_embedding_A"]).T
        else:
            held = factors[f"base_model.model.{name}"] - base[name]
        missed = float(np.square(change - held).sum())
        assert missed <= 0.1001 * float(np.square(change).sum()), name  # bfloat16 rounds the factors
        total, left = total + float(np.square(change).sum()), left + missed
    kept = 1 - left / total
    stated = json.loads((extracted / "adapter.lock.json").read_text())["result"]
    parts = [*stated["reduced"], *({**each, "kept": each["energy"]} for each in stated["saved"])]
    assert sum(each["kept"] for each in parts) / sum(each["energy"] for each in parts) == pytest.approx(kept, abs=1e-3)
    (card,) = re.findall(r"kept of the change: ([\d.]+)%", (extracted / "README.md").read_text())
    assert float(card) / 100 == pytest.approx(kept, abs=1e-3) and kept > 0.9


def test_the_base_with_the_adapter_is_near_the_fine_tune(extracted: Path) -> None:
    changed, docs, base = (
        open_model(text) for text in (f"{QUICKSTART / 'base'}+{extracted}", QUICKSTART / "docs", QUICKSTART / "base")
    )

    def distance(one: Any) -> float:
        return float(sum((one.read(name).double() - docs.read(name).double()).square().sum() for name in docs))

    assert distance(changed) < 0.11 * distance(base)


def test_peft_loads_the_adapter_of_extract_yaml(extracted: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    models = [transformers.AutoModelForCausalLM.from_pretrained(QUICKSTART / name) for name in ("base", "docs")]
    ids = torch.arange(5, 25)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        before, wanted = (model(ids).logits.float() for model in models)
        wrapped = peft.PeftModel.from_pretrained(models[0], str(extracted)).eval()
        found = wrapped(ids).logits.float()
    assert (found - wanted).norm() < 0.5 * (before - wanted).norm()
    assert {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    assert open_adapter(extracted).base == "quickstart/base"


def test_extract_yaml_is_the_same_from_any_folder(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(QUICKSTART, tmp_path / "quickstart")
    shutil.copy(ROOT / "recipes/extract.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("merge", "extract.yaml", "out", "--threads", "1").exit_code == 0
    assert files_of(tmp_path / "out") == files_of(extracted)
