"""`synthesise` on tiny ResNets: images as files that `eval` reads, a student as a checkpoint, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import answer, refusal, run
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from mergekit_lfm import FormatError, PlanError, load_model, run_recipe, verify_output
from mergekit_lfm.api.image_forms import pixel_range
from mergekit_lfm.api.image_students import ImageStudent

SIZES: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of the same classes, and one of others."""
    folder = tmp_path_factory.mktemp("models")
    for name, width, classes in (("teacher", 8, 3), ("student", 4, 3), ("other", 4, 2)):
        torch.manual_seed(len(name))
        sizes = {**SIZES, "embedding_size": width, "hidden_sizes": [width, width], "num_labels": classes}
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
    assert "already there" in run("synthesise", "teacher", *options[:-1], *student).stderr
    assert verify_output(learned).result.differences == () and not [*tmp_path.glob("*.training")]


def test_requests_that_do_not_fit_are_refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    out, place = str(tmp_path / "made.npz"), str(tmp_path / "student")
    for arguments, words in (
        (["-o", str(tmp_path / "made.pt")], "expected .npz"),
        (["--student-out", place, "-o", out], "student_out: found it without `student`"),
        (["--preset", "dfq", "-o", out], "dfq needs a student"),
        (["--preset", "lopes", "-o", out], "lopes needs records"),
        (["--student", "other", "--student-out", place, "-o", out], "the student 2; expected as many"),
        (["--low", "9", "-o", out], "expected a range of pixels"),
    ):
        assert words in refusal(run("synthesise", "teacher", *arguments))
    assert "does not say how large its images are" in refusal(run("synthesise", "student", "-o", out))
    assert not [*tmp_path.iterdir()]


def test_settings_that_a_preset_does_not_read_are_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    out, student = str(tmp_path / "made.npz"), ["--student", "student", "--student-out", str(tmp_path / "learned")]
    for arguments, words in (
        (["--preset", "dfq", "--count", "4", "--steps", "2", *student], "dfq does not read count"),
        (["--preset", "dfnd", "--rounds", "4", "--images", "x.npz", *student], "dfnd does not read rounds"),
        (["--preset", "deepdream", "--data", "x.npz"], "deepdream does not read data"),
        (["--steps", "3"], "steps: found it without `student`"),
    ):
        assert words in refusal(run("synthesise", "teacher", *arguments, "-o", out))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        ({"image_mean": [0.5, 0.5], "image_std": [0.25, 0.5]}, (-2.0, 2.0)),
        ({"image_mean": [0.5], "image_std": [0.25], "do_normalize": False}, (0.0, 1.0)),
        ({}, (0.0, 1.0)),
        ({"image_mean": [0.5, 0.5]}, "expected as many numbers of both"),
        ({"image_mean": [0.5], "image_std": [0]}, "the latter above 0"),
        ({"image_mean": [0.5], "image_std": ["x"]}, "expected as many numbers of both"),
    ],
)
def test_the_range_of_pixels_is_the_processors(processor: dict[str, Any], wanted: Any) -> None:
    if isinstance(wanted, str):
        with pytest.raises(FormatError, match=wanted):
            pixel_range(processor, Path("preprocessor_config.json"))
    else:
        assert pixel_range(processor, Path("preprocessor_config.json")) == wanted


def test_broken_processors_are_named(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "student", "broken")
    Path("broken/preprocessor_config.json").write_text("{")
    assert "not JSON" in refusal(run("synthesise", "broken", "--size", "8", "-o", "made.npz"))


def test_images_of_four_channels_are_written_without_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ResNetConfig(**SIZES, num_channels=4)
    ResNetForImageClassification(config).save_pretrained("deep")
    monkeypatch.setitem(sys.modules, "PIL", None)  # as if it were not installed
    made = answer(run("synthesise", "deep", "--size", "8", "--count", "2", "--rounds", "1", "-o", "x.npz", "--json"))
    assert made["shape"] == [4, 8, 8] and made["files"] == ["x.npz"] and not Path("x.png").exists()


def test_names_of_files_and_modules_may_differ(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student whose file lacks the prefix of its modules, and a ViT's own statistics."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "student", "renamed")
    file = Path("renamed/model.safetensors")
    tensors = load_file(file)
    save_file({name.removeprefix("resnet."): x for name, x in tensors.items()}, file, {"format": "pt"})
    student = ["--student", "renamed", "--student-out", "learned", "--size", "8"]
    answer(run("synthesise", str(models / "teacher"), *student, "--count", "4", "--rounds", "1", "--steps", "2",
               "-o", "made.npz", "--json"))  # fmt: skip
    before, after = load_file(file), load_file("learned/model.safetensors")
    assert before.keys() == after.keys()
    means = [name for name in before if name.endswith("running_mean")]
    assert means and all(not torch.equal(before[name], after[name]) for name in means)

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "num_labels": 3,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained("vit")
    options = ["--task", "classification", "--data", "made.npz", "-o", "gram.safetensors"]
    assert run("stats", "gram", "vit", *options).exit_code == 0
    lopes = ["--preset", "lopes", "--stats", "gram.safetensors", "--count", "2", "--rounds", "1", "-o", "again.npz"]
    assert answer(run("synthesise", "vit", *lopes, "--json"))["count"] == 2


def test_a_student_with_parts_that_no_tensor_holds_is_refused(models: Path) -> None:
    loaded = load_model(models / "student", "classification")
    loaded.model.add_module("more", torch.nn.BatchNorm2d(2, affine=False))
    with pytest.raises(PlanError, match=r"hold more.running_mean, more.running_var of the student"):
        ImageStudent(loaded)


def test_planning_imports_no_torch(models: Path) -> None:
    code = (
        "import sys; from mergekit_lfm import plan_recipe\n"
        "recipe = {'job': 'synthesise', 'teachers': 'teacher', 'preset': 'dfq', 'student': 'student'}\n"
        "assert plan_recipe(recipe, 'out.npz').result.plan.student[1].name == 'out-student'\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=models)


STAGES = """
name: made
job: synthesise
teachers: teacher
preset: dfq
student: student
student_out: learned
rounds: 1
---
job: eval
models: [teacher, learned]
data: made
task: classification
"""


def test_later_stages_take_the_images_and_the_student(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "student"):
        Path(name).symlink_to(models / name)
    Path("recipe.yaml").write_text(STAGES)
    assert run("plan", "recipe.yaml", "out.json").exit_code == 0 and not Path("out.stages").exists()
    outcome = run_recipe("recipe.yaml", "out.json")
    assert outcome.result["teacher"]["made"].accuracy == 1.0 and outcome.result["learned"]["made"].examples == 128
    assert {path.name for path in Path("out.stages").iterdir()} == {
        "made.npz",
        "made.npz.lock.json",
        "made.png",
        "learned",
    }
    assert run_recipe("recipe.yaml", "out.json", drop_stages=True).already_there
    assert not Path("out.stages").exists()
    Path("recipe.yaml").write_text(STAGES.replace("student_out: learned", "student_out: made"))
    assert "made names another result" in refusal(run("plan", "recipe.yaml", "out.json"))


def test_a_student_of_two_teachers_has_the_classes_of_both(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    config = ResNetConfig(**{**SIZES, "num_labels": 5}, num_channels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "both")
    arguments = ["--preset", "amalgamation", "--student", str(tmp_path / "both"), "-o", str(tmp_path / "made.npz")]
    form = ["--size", "16", "--low", "0", "--high", "1", "--rounds", "10"]
    assert "other takes images of" in refusal(run("synthesise", "teacher", "other", "--size", "8", *arguments))
    assert "expected as many" in refusal(run("synthesise", "teacher", *arguments, *form))
    made = answer(run("synthesise", "teacher", "other", *arguments, *form, "--json"))
    assert made["student"] == str(tmp_path / "made-student") and made["count"] == 128
    ranges = [{"model": "other", "classes": [0, 1]}, {"model": "teacher", "classes": [2, 4]}]
    recipe = {"job": "synthesise", "teachers": ranges, "preset": "dafl", "size": 16, "low": 0, "high": 1}
    recipe |= {"student": str(tmp_path / "both"), "rounds": 1}
    run_recipe(recipe, tmp_path / "again.npz")
    labels = np.load(tmp_path / "again.npz")["labels"]
    assert labels.max() <= 4
    for classes in ([0, 2], [0, 0]):
        ranges[0]["classes"] = classes
        with pytest.raises(PlanError, match="classes from 0 on without a gap"):
            run_recipe(recipe, tmp_path / "wrong.npz")
    ranges[:] = [{"model": "other", "classes": [0, 2]}, {"model": "teacher", "classes": [3, 4]}]
    with pytest.raises(PlanError, match=r"other has 2 classes; expected 0 to 2"):
        run_recipe(recipe, tmp_path / "wrong.npz")
