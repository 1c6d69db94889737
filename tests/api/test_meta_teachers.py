"""`meta_from_teachers` as a whole: each algorithm, interruptions, refusals, the job and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import refusal, run
from helpers_tune import interrupt
from safetensors.torch import load_file

from mergekit_lfm import PlanError, meta_from_teachers, open_checkpoint, plan_recipe, run_recipe, verify_output
from mergekit_lfm.api import meta_teachers
from mergekit_lfm.api.meta_teachers_plans import plan_from_teachers
from mergekit_lfm.api.planned import PlannedJob
from mergekit_lfm.commands.jobs import show_of
from mergekit_lfm.meta import without_data
from mergekit_lfm.meta.pool import PoolEpisodes
from mergekit_lfm.recipe.meta_teachers import TeachersRecipe

transformers = pytest.importorskip("transformers")

TEACHERS = ["one", "two", "three"]
IMAGES: dict[str, Any] = {
    "steps": 2,
    "image_steps": 1,
    "batch_size": 2,
    "shots": 1,
    "queries": 2,
    "inner_steps": 1,
    "threads": 1,
}


def save_vit(folder: Path, seed: int, **more: Any) -> None:
    """A ViT of images of 4 x 4 for three classes."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 3, "initializer_range": 0.3}
    transformers.ViTForImageClassification(transformers.ViTConfig(**{**sizes, **more})).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three teachers of its shape, one of another shape, one of other classes, and one with BatchNorm."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(["new", *TEACHERS]):
        save_vit(folder / name, seed)
    save_vit(folder / "wide", 5, intermediate_size=12)
    save_vit(folder / "four", 6, num_labels=4)
    sizes: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "num_labels": 3}
    config = transformers.ResNetConfig(**sizes, num_channels=1, layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(folder / "norms")
    return folder


@pytest.fixture(autouse=True)
def _here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


def test_an_average_that_was_killed_before_it_was_written_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> list[str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(meta_teachers, "_save", killed)
        meta_from_teachers("new", TEACHERS, "out", threads=1)
    made = meta_from_teachers("new", TEACHERS, "out", threads=1)
    assert made.result.teachers == 3 and not Path("out.training").exists()


def test_a_request_has_the_range_of_pixels_and_the_model_may_be_a_teacher() -> None:
    for name in ("one", "two"):
        shutil.copytree(name, f"own-{name}")
    recipe = {"job": "meta", "model": "own-one", "teachers": ["own-one", "own-two"], "algorithm": "purer", "size": 4}

    def digest() -> str:
        return plan_from_teachers(TeachersRecipe.parse(recipe, label="meta"), Path("out")).request.digest

    before = digest()
    for name in ("one", "two"):
        Path(f"own-{name}/preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.1]}')
    assert digest() != before
    made = meta_from_teachers("own-one", ["own-one", "own-two"], "out", algorithm="purer", size=4, **IMAGES)
    assert made.result.teachers == 2


def test_the_average_is_the_mean_with_the_files_of_the_model() -> None:
    made = meta_from_teachers("new", TEACHERS, "out", threads=1)
    found, each = tensors("out"), [tensors(name) for name in TEACHERS]
    for name, x in found.items():
        mean = torch.stack([other[name].double() for other in each]).mean(0)
        torch.testing.assert_close(x.double(), mean, rtol=0, atol=2e-7)
    assert Path("out/config.json").read_bytes() == Path("new/config.json").read_bytes()
    names = {"config.json", "merge.lock.json", "meta.json", "model.safetensors"}
    assert {path.name for path in Path("out").iterdir()} == names
    assert verify_output("out").result.differences == () and not Path("out.training").exists()
    again = meta_from_teachers("new", TEACHERS, "out", threads=1)
    assert again.already_there and again.result == made.result and made.result.loss is None


def test_a_fusion_of_teachers_is_between_them() -> None:
    made = meta_from_teachers("new", TEACHERS, "out", algorithm="dro", steps=60, radius=0.1, threads=1)
    found, each = tensors("out"), [tensors(name) for name in TEACHERS]
    flat = {name: torch.cat([x[key].flatten() for key in sorted(x)]) for name, x in zip(TEACHERS, each, strict=True)}
    mean, out = torch.stack([*flat.values()]).mean(0), torch.cat([found[key].flatten() for key in sorted(found)])
    apart = (flat["one"] - mean).square().mean().sqrt()
    assert (out - mean).square().mean().sqrt() < 0.5 * apart and made.result.loss is not None
    assert made.result.loss < 0.3 and made.result.steps == 60  # 1 would be the mean of all


@pytest.mark.parametrize("name", ["purer", "bidf"])
def test_an_interrupted_run_goes_on_to_the_same_bytes_and_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {**IMAGES, "algorithm": name, **({"directions": 2} if name == "bidf" else {})}
    monkeypatch.setattr(without_data, "PATIENCE", 1)  # so that the curriculum is another one in the last steps
    how |= {"steps": 6} if name == "purer" else {}
    teachers = [*TEACHERS[:2], *(["norms"] if name == "purer" else [])]  # whose architecture may be another
    whole = meta_from_teachers("new", teachers, "whole", size=4, **how)
    drawn = interrupt(monkeypatch, PoolEpisodes)
    with pytest.raises(KeyboardInterrupt):
        meta_from_teachers("new", teachers, "parts", size=4, **how)
    parts = meta_from_teachers("new", teachers, "parts", size=4, **how)
    assert drawn == [*range(0, 2 * (how["steps"] + 1), 2)] and parts.result == whole.result
    same = Path("parts/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert same and not torch.equal(*(tensors(x)["classifier.weight"] for x in ("whole", "new")))
    asked = {"purer": (None, None), "bidf": (4 * 12 * 3, 8)}[name]  # 12 images, and each moved in two directions
    assert (whole.result.asked, whole.result.requests) == asked
    assert dict(open_checkpoint("whole")) == dict(open_checkpoint("new"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "purrer"}, "algorithm: found 'purrer', expected average, dro, purer, bidf, which need no data; did"),
    ({"radius": 0.1}, "radius: found it, expected none: average does not read radius; leave it out"),
    ({"teachers": ["one", "one"]}, "teachers: found one twice, expected each once"),
    ({"teachers": ["one"]}, "teachers: found 1, expected two or more, each of a task of its own"),
    ({"teachers": ["one", "missing"]}, r"teachers\[1\]: found 'missing', but there is no"),
    ({"teachers": ["one", "wide"]}, "the teachers differ from new; expected the same tensors"),
    ({"algorithm": "purer", "images": 5}, "images: found 5, expected at least 20, for 5 shots and 15 queries"),
    ({"algorithm": "bidf", "images": 20}, "images: found 20, expected at least 30 for bidf, one half for shots"),
    ({"algorithm": "purer", "teachers": ["one", "four"]}, "new has 3 classes, and four has 4; expected as many"),
    ({"algorithm": "bidf", "model": "norms", "size": 4}, "norms has BatchNorm, whose statistics do not follow"),
    ({"data": "x.npz"}, "data: "),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_wrong_settings_are_refused_by_the_plan(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_recipe({"job": "meta", "model": "new", "teachers": ["one", "two"], **change}, "out")


def test_a_model_too_large_for_dro_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_lfm.api.meta_teachers_plans.FUSED", 100)
    with pytest.raises(PlanError, match=r"new has [\d,]+ numbers; expected at most 100 for dro"):
        plan_recipe({"job": "meta", "model": "new", "teachers": ["one", "two"], "algorithm": "dro"}, "out")


def test_the_job_keeps_the_promises_of_its_declaration() -> None:
    document = {"job": "meta", "model": "new", "teachers": ["one", "two"], "algorithm": "dro", "steps": 2}
    planned = plan_recipe(document, "out").result
    assert isinstance(planned, PlannedJob)
    planned.plan.stand_in(Path("stand-in"))
    assert dict(open_checkpoint("stand-in")) == dict(open_checkpoint("new"))
    show = show_of(planned.job)
    assert "a network from embeddings" in show.plan_text(planned.plan)
    assert show.plan_data(planned.plan)["recipe"]["job"] == "meta"
    outcome = run_recipe(planned)
    assert "from 2 teachers" in show.done_text(outcome) and show.done_data(outcome)["asked"] is None
    assert run_recipe(planned).already_there
    recipe = TeachersRecipe.parse(document)
    assert TeachersRecipe.parse(recipe.normalised()).normalised() == recipe.normalised()


def test_the_command_says_how_often_black_boxes_were_asked() -> None:
    options = (
        "--algorithm bidf --steps 1 --image-steps 0 --batch-size 1 --shots 1 --queries 1 --directions 1 --threads 1"
    )
    result = run(*f"meta-teachers new one two -o out {options} --json".split())
    assert json.loads(result.stdout)["asked"] == 12 and json.loads(result.stdout)["requests"] == 2
    wrong = run(*["meta-teachers", "new", "one", "two", "-o", "other", "--directions", "3"])
    assert "average does not read directions; leave it out" in refusal(wrong)


def test_a_step_that_needs_too_much_is_refused_and_plans_say_how_much() -> None:
    message = refusal(run("meta-teachers", "new", *TEACHERS, "--algorithm", "purer", "--memory", "100kB", "-o", "out"))
    assert "a step needs some" in message and "the budget is 100 KB" in message and "smaller batch_size" in message
    assert not Path("out").exists() and not Path("out.training").exists()
    recipe = {"job": "meta", "model": "new", "teachers": TEACHERS, "algorithm": "purer"}
    needs = [
        plan_from_teachers(TeachersRecipe.parse({**recipe, **more}, label="meta"), Path("out")).need
        for more in ({}, {"images": 60}, {"algorithm": "bidf"}, {"algorithm": "average"})
    ]
    assert needs[3] is None and needs[0] and needs[1] and needs[2]
    assert needs[1].model > needs[0].model > needs[2].model  # gradients in all images, or none
    assert needs[1].inner == needs[0].inner == needs[2].inner


CALIBRATED = """
name: start
job: meta
model: new
teachers: [one, two, three]
algorithm: purer
steps: 2
image_steps: 1
batch_size: 2
---
name: adapted
job: tune
model: start
data: few.npz
task: classification
steps: 3
batch_size: 6
---
name: seen
job: synthesise
teachers: adapted
preset: deepdream
count: 6
rounds: 3
---
job: tune
model: adapted
data: [few.npz, seen]
task: classification
loss: {supcon: 1.0}
steps: 3
batch_size: 12
"""


def test_a_recipe_calibrates_an_adapted_model_by_images_of_its_own() -> None:
    generator = np.random.default_rng(1)
    images = generator.random((6, 1, 4, 4), dtype=np.float32)
    np.savez("few.npz", pixel_values=images, labels=np.arange(6) % 3)
    Path("calibrated.yaml").write_text(CALIBRATED)
    made = run_recipe("calibrated.yaml", "out", threads=1)
    before, after = tensors("out.stages/adapted"), tensors("out")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert made.result.steps == 3
    assert np.load("out.stages/seen.npz")["pixel_values"].shape == images.shape
