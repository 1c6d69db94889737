"""`synthesise` on tiny ResNets: images as files that `eval` reads, a student as a checkpoint, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of the same classes, and one of others."""
    folder = tmp_path_factory.mktemp("models")
    for name, width, classes in (("teacher", 8, 3), ("student", 4, 3), ("other", 4, 2)):
        torch.manual_seed(len(name))
        sizes: dict[str, Any] = {
            "embedding_size": width,
            "hidden_sizes": [width, width],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": classes,
        }
        config = ResNetConfig(**sizes, num_channels=3)
        ResNetForImageClassification(config).save_pretrained(folder / name)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16},
                 "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}  # fmt: skip
    (folder / "teacher" / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_images_are_made_and_a_student_learns_from_them(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    out, learned = str(tmp_path / "made.npz"), tmp_path / "learned"
    made = answer(run("synthesise", "teacher", "--count", "4", "--rounds", "20", "-o", out, "--json"))
    assert made["shape"] == [3, 16, 16] and made["files"] == [out, str(tmp_path / "made.png")]
    judged = answer(run("eval", "teacher", "--task", "classification", "--data", out, "--json"))
    assert judged["models"][0]["mean"] == {"accuracy": 1.0}  # its own labels

    gram = str(tmp_path / "gram.safetensors")
    assert run("stats", "gram", "teacher", "--task", "classification", "--data", out, "-o", gram).exit_code == 0
    for facts in (["--stats", gram], ["--data", out]):
        again = ["--preset", "lopes", "--count", "4", "--rounds", "2", "-o", str(tmp_path / "again.npz"), "--overwrite"]
        assert answer(run("synthesise", "teacher", *again, *facts, "--json"))["count"] == 4

    options = ["--preset", "dfq", "--rounds", "1", "-o", out, "--overwrite"]
    student = ["--student", "student", "--student-out", str(learned)]
    result = run("synthesise", "teacher", *options, *student)
    assert result.exit_code == 0 and "the student gives" in result.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "student", learned))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("running_mean" in name for name in changed) and any("weight" in name for name in changed)
    assert json.loads((learned / "synthesise.json").read_text())["preset"] == "dfq"


def test_requests_that_do_not_fit_are_refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    out, place = str(tmp_path / "made.npz"), str(tmp_path / "student")
    for arguments, words in (
        (["-o", str(tmp_path / "made.pt")], "expected .npz"),
        (["--student", "student", "-o", out], "without a place to write it"),
        (["--preset", "dfq", "-o", out], "dfq needs a student"),
        (["--preset", "lopes", "-o", out], "lopes needs records"),
        (["--student", "other", "--student-out", place, "-o", out], "the student 2; expected as many"),
        (["--low", "9", "-o", out], "expected a range of pixels"),
    ):
        assert words in refusal(run("synthesise", "teacher", *arguments))
    assert "does not say how large its images are" in refusal(run("synthesise", "student", "-o", out))
    assert not [*tmp_path.iterdir()]
