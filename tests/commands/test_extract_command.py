"""`extract-lora`: what it prints, and the options of mergekit's program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_commands import answer, refusal, run
from models import files_of, save_checkpoint

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `base` and `tuned`."""
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i}.self_attn.{p}_proj.weight": (12, 12) for i in range(2) for p in "qv"}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    base |= {"model.norm.weight": torch.ones(12), "model.layers.0.scale": torch.ones(3)}
    save_checkpoint(Path("base"), base, CONFIG)
    save_checkpoint(Path("tuned"), {n: x + torch.randn(x.shape, generator=draw) for n, x in base.items()}, CONFIG)
    return tmp_path


def test_the_table_has_a_row_for_each_kind_of_layer(models: Path) -> None:
    result = run("extract-lora", "tuned", "--base", "base", "-o", "out", "--rank", "4")
    assert result.exit_code == 0 and result.stdout == "out\n"
    text = result.stderr
    assert "self_attn.q_proj" in text and "self_attn.v_proj" in text and "saved whole" in text
    assert "dropped: model.layers.0.scale" in text and "warning: the adapter lacks model.layers.0.scale" in text
    assert (models / "out" / "adapter_model.safetensors").exists()


def test_json_has_every_matrix(models: Path) -> None:  # noqa: ARG001
    arguments = ("extract-lora", "tuned", "--base", "base", "-o", "out", "--exclude", "scale", "--json")
    data = answer(run(*arguments, "--rank", "12"))
    assert [row["rank"] for row in data["matrices"]] == [12] * 4
    assert data["kept"] == pytest.approx(1 - data["dropped"][0]["share"])
    assert sum(row["share"] for key in ("matrices", "saved", "dropped") for row in data[key]) == pytest.approx(1)
    again = answer(run(*arguments, "--energy", "0.5", "--overwrite"))
    assert all(row["kept"] >= 0.5 for row in again["matrices"]) and again["bytes"] < data["bytes"]


def test_the_options_of_mergekit_do_the_same(models: Path) -> None:
    ours = ("--rank", "3", "--include", "q_proj", "--include", "v_proj", "--exclude", r"layers\.1", "--save", "v_proj")
    theirs = ("--max-rank", "3", "-i", "q_proj", "-i", "v_proj", "-e", r"layers\.1", "--save-module", "v_proj")
    for folder, given in (("ours", ours), ("theirs", (*theirs, "--distribute-scale", "--no-embed-lora"))):
        result = run("extract-lora", "tuned", "--base", "base", "-o", f"{folder}/out", *given)
        assert result.exit_code == 0
    assert "--distribute-scale needs nothing here" in result.stderr
    assert files_of(models / "ours") == files_of(models / "theirs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "2", "--energy", "0.5"), "Give one of --rank, --energy and --size"),
        (("--rank", "2", "--max-rank", "3"), "found --max-rank and --rank, which say different things"),
        (("--base", "nowhere"), "extraction: base_model: found 'nowhere', but there is no "),
        (("-o", "base/out"), "lie in one another"),
    ],
)
def test_a_wrong_request_is_refused(models: Path, options: tuple[str, ...], message: str) -> None:  # noqa: ARG001
    result = run("extract-lora", "tuned", "--base", "base", "-o", "out", *options)
    assert result.exit_code == 2 and message in result.stderr


def test_an_output_is_replaced_if_asked(models: Path) -> None:
    arguments = ("extract-lora", "tuned", "--base", "base", "-o", "out", "-q", "--exclude", "scale")
    assert run(*arguments).exit_code == 0
    before = files_of(models / "out"), [path.stat().st_mtime_ns for path in sorted((models / "out").iterdir())]
    assert (again := run(*arguments[:-3], "--exclude", "scale")).exit_code == 0 and "already there" in again.stderr
    assert before == (
        files_of(models / "out"),
        [path.stat().st_mtime_ns for path in sorted((models / "out").iterdir())],
    )
    assert "out exists" in refusal(run(*arguments, "--rank", "5"))
    assert run(*arguments, "--rank", "5", "--overwrite").exit_code == 0
