"""The checks before an output is published: its inputs are as they were, and OUT.partial holds what was planned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_progress import Counted
from helpers_stats import write_fisher
from helpers_views import make_patch
from models import files_of, output_of, save_checkpoint

from mergekit_lfm.align.elements import random_transform
from mergekit_lfm.arch import find_symmetries
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output import journal as journals
from mergekit_lfm.output import writer
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import open_checkpoint

SHAPES = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
LINEAR: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}}


def save_models(folder: Path) -> None:
    """Two chains of linear layers, with Fisher information of each, a transform of b and a patch of a."""
    draw = torch.Generator().manual_seed(0)
    for name in "ab":
        tensors = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
        save_checkpoint(folder / name, tensors, {}, shards=2)
        write_fisher(folder / f"{name}.fisher", folder / name, {key: x.abs() for key, x in tensors.items()})
    transform = random_transform({}, find_symmetries(open_checkpoint(folder / "b")), seed=1, kinds=["order"])
    transform.save(folder / "b.transform")
    make_patch(open_checkpoint(folder / "a"), ["0.weight"], rank=1).save(folder / "a.patch")


def plan_with(folder: Path, kind: str = "") -> Plan:
    """The plan of a merge that also reads a file of this kind."""
    models: dict[str, dict[str, Any]] = {name: {"model": name} for name in "ab"}
    recipe = dict(LINEAR)
    if kind == "fisher":
        recipe = {"merge_method": "fisher"}
        models = {name: {"model": name, "stats": f"{name}.fisher"} for name in "ab"}
    if kind == "transform":
        models["b"]["align"] = "b.transform"
    if kind == "patch":
        models["a"]["edits"] = ["a.patch"]
    if kind == "result":
        recipe["edits"] = ["a.patch"]
    return make_plan(Recipe.parse({**recipe, "models": [*models.values()]}, where=folder))


def rewrite(path: Path) -> None:
    """Write other bytes of the same number into the file, and set its time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """Put another file, with the same bytes and times, in the place of this one."""
    status, data = path.stat(), path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


WEIGHTS = "a/model-00002-of-00002.safetensors"
CHANGES: list[tuple[Callable[[Path], object], str, str]] = [
    (rewrite, WEIGHTS, ""),
    (replace, WEIGHTS, ""),
    (Path.unlink, "a/model-00001-of-00002.safetensors", ""),
    (rewrite, "b/model-00001-of-00002.safetensors", "transform"),
    (rewrite, "b.fisher", "fisher"),
    (rewrite, "b.transform", "transform"),
    (rewrite, "a.patch", "patch"),
    (rewrite, "a.patch", "result"),
]


@pytest.mark.parametrize(("change", "name", "kind"), CHANGES)
def test_an_input_that_changes_during_the_merge_is_no_output(
    tmp_path: Path, change: Callable[[Path], object], name: str, kind: str
) -> None:
    save_models(tmp_path)
    plan = plan_with(tmp_path, kind)
    done: list[int] = []

    def progress(nbytes: int) -> None:
        if nbytes and not done:
            change(tmp_path / name)
            done.append(nbytes)

    with pytest.raises(FormatError, match=f"{Path(name).name} was changed"):
        execute(plan, tmp_path / "out", threads=1, progress=Counted(progress))
    assert not (tmp_path / "out").exists()


class Interrupted(Exception):
    """Stands for the end of the process."""


def interrupt(plan: Plan, out: Path) -> None:
    """Merge, but for the last part."""
    left = plan.bytes_written

    def progress(nbytes: int) -> None:
        nonlocal left
        left -= nbytes
        if nbytes and left < plan.bytes_written // 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        execute(plan, out, threads=1, progress=Counted(progress))


def test_an_input_that_changed_since_an_interrupted_run_is_merged_again(tmp_path: Path) -> None:
    """With its time set back the plan is the same, but the finished part was made from the old bytes."""
    save_models(tmp_path)
    interrupt(plan_with(tmp_path), tmp_path / "out")
    rewrite(tmp_path / "a" / "model-00001-of-00002.safetensors")
    done = execute(plan_with(tmp_path), tmp_path / "out")
    assert done.resumed_bytes == 0
    assert [line for line in done.findings if "model-00001-of-00002.safetensors was changed" in line]
    execute(plan_with(tmp_path), tmp_path / "fresh")
    assert output_of(tmp_path / "out") == output_of(tmp_path / "fresh")


def test_unfinished_work_on_a_model_of_the_same_name_elsewhere_is_not_reused(tmp_path: Path) -> None:
    """The plans are equal, as they name no folder of this machine."""
    for home in ("one", "two"):
        save_models(tmp_path / home)
    rewrite(tmp_path / "two" / "a" / "model-00001-of-00002.safetensors")
    plan = plan_with(tmp_path / "two")
    interrupt(plan_with(tmp_path / "one"), tmp_path / "out")
    assert plan.digest == plan_with(tmp_path / "one").digest
    assert execute(plan, tmp_path / "out").resumed_bytes == 0
    execute(plan, tmp_path / "fresh")
    assert output_of(tmp_path / "out") == output_of(tmp_path / "fresh")


def test_damaged_segments_of_an_interrupted_run_are_merged_again(tmp_path: Path) -> None:
    save_models(tmp_path)
    plan = plan_with(tmp_path)
    interrupt(plan, tmp_path / "out")
    journal = [json.loads(line) for line in (tmp_path / "out.partial" / journals.JOURNAL).read_text().splitlines()]
    finished = [entry["tensor"] for entry in journal if "tensor" in entry]
    assert 1 < len(finished) < len(plan.tensors)
    shard = next(shard for shard in plan.shards if finished[0] in shard.offsets)
    with (tmp_path / "out.partial" / shard.name).open("r+b") as file:
        file.seek(shard.offsets[finished[0]])
        file.write(b"\xa5")
    done = execute(plan_with(tmp_path), tmp_path / "out")
    assert [
        line
        for line in done.findings
        if f"damaged segments of the interrupted run were made again, of {finished[0]}" in line
    ]
    left = {job.name: job.nbytes for job in plan.tensors if job.name in finished[1:]}
    assert done.resumed_bytes == sum(left.values())
    execute(plan_with(tmp_path), tmp_path / "fresh")
    assert output_of(tmp_path / "out") == output_of(tmp_path / "fresh")


def test_unchanged_inputs_are_resumed(tmp_path: Path) -> None:
    save_models(tmp_path)
    interrupt(plan_with(tmp_path), tmp_path / "out")
    assert execute(plan_with(tmp_path), tmp_path / "out").resumed_bytes > 0


# ------------------------------------------------------------------ what lies in OUT.partial


def put_link(folder: Path) -> None:
    """A shard lies elsewhere, and a link to it in its place."""
    shard = next(folder.glob("*1-of-*.safetensors"))
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


def put_code(folder: Path) -> None:
    """A folder with a file."""
    (folder / "code").mkdir()
    (folder / "code" / "model.py").touch()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model.bin does not belong to it": lambda folder: (folder / "model.bin").touch(),
    "code/model.py does not belong to it": put_code,
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "README.md has": lambda folder: (folder / "README.md").write_text("short"),
    "model-00002-of-00002.safetensors is missing": lambda folder: (
        folder / "model-00002-of-00002.safetensors"
    ).unlink(),
    "model-00001-of-00002.safetensors is a link": put_link,
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=DAMAGES)
def test_other_files_in_a_complete_looking_folder_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, damage: Callable[[Path], object]
) -> None:
    """The run before was killed just before the end: all but the rename is done."""

    def killed(_: Path) -> None:
        raise Interrupted

    save_models(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(writer, "move_into_place", killed)
        execute(plan_with(tmp_path), tmp_path / "out")
    damage(tmp_path / "out.partial")
    before = files_of(tmp_path)
    with pytest.raises(PlanError, match=f"{message}(.|\n)*--no-resume"):
        execute(plan_with(tmp_path), tmp_path / "out")
    assert files_of(tmp_path) == before and not (tmp_path / "out").exists()
    execute(plan_with(tmp_path), tmp_path / "fresh")
    if message.startswith("model.bin"):
        (tmp_path / "out.partial" / "model.bin").unlink()
        execute(plan_with(tmp_path), tmp_path / "out")
        assert output_of(tmp_path / "out") == output_of(tmp_path / "fresh")


def kill_before_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    """Merge, but for the rename of OUT.partial to OUT; an output that is replaced is moved away already."""

    def kill(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise Interrupted
        return rename(path, target)

    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Path, "rename", kill)
        execute(plan_with(folder), folder / "out", **how)


def damage_weights(folder: Path) -> None:
    with (folder / "out.partial" / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xa5")


def change_weights(folder: Path) -> None:
    rewrite(folder / "b" / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("change", [damage_weights, change_weights])
def test_a_complete_looking_folder_that_no_longer_fits_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    save_models(tmp_path)
    kill_before_the_end(tmp_path, monkeypatch)
    change(tmp_path)
    assert execute(plan_with(tmp_path), tmp_path / "out").resumed_bytes == 0
    execute(plan_with(tmp_path), tmp_path / "fresh")
    assert output_of(tmp_path / "out") == output_of(tmp_path / "fresh")


def test_the_output_that_it_was_to_replace_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_models(tmp_path)
    execute(plan_with(tmp_path, "result"), tmp_path / "out")
    before = files_of(tmp_path / "out")
    kill_before_the_end(tmp_path, monkeypatch, overwrite=True)
    assert not (tmp_path / "out").exists()
    damage_weights(tmp_path)
    with pytest.raises(PlanError, match="use --overwrite"):
        execute(plan_with(tmp_path), tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    execute(plan_with(tmp_path), tmp_path / "out", overwrite=True)
    execute(plan_with(tmp_path), tmp_path / "fresh")
    assert output_of(tmp_path / "out") == output_of(tmp_path / "fresh")


def test_other_files_among_unfinished_work_are_not_published(tmp_path: Path) -> None:
    save_models(tmp_path)
    interrupt(plan_with(tmp_path), tmp_path / "out")
    (tmp_path / "out.partial" / "model-00003-of-00003.safetensors").touch()
    (tmp_path / "out.partial" / "config.json.tmp").touch()  # of a run that was killed while it wrote the file
    with pytest.raises(PlanError, match=r"model-00003-of-00003.safetensors does not belong to it"):
        execute(plan_with(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "model-00003-of-00003.safetensors").unlink()
    execute(plan_with(tmp_path), tmp_path / "out")
    execute(plan_with(tmp_path), tmp_path / "fresh")
    assert output_of(tmp_path / "out") == output_of(tmp_path / "fresh")


# ------------------------------------------------------------------ documents


def put_half_a_character(folder: Path) -> Path:
    """A config whose dtype the merge replaces, with half of a surrogate pair in it."""
    path = folder / "a" / "config.json"
    path.write_text(json.dumps({"dtype": "float16", "name": "\ud800"}))
    return path


def test_a_document_that_cannot_be_written_stops_the_merge_before_it_starts(tmp_path: Path) -> None:
    save_models(tmp_path)
    path = put_half_a_character(tmp_path)
    with pytest.raises(FormatError, match=f"{path.name} cannot be written"):
        execute(plan_with(tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_whose_name_is_no_text_stops_the_merge_before_it_starts(tmp_path: Path) -> None:
    save_models(tmp_path)
    name = "a\udcff"  # as Python gives a byte of a file's name that is not UTF-8
    (tmp_path / "a").rename(tmp_path / name)
    plan = make_plan(Recipe.parse({**LINEAR, "models": [{"model": name}, {"model": "b"}]}, where=tmp_path))
    with pytest.raises(FormatError, match=r"merge.lock.json cannot be written"):
        execute(plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_side_files_are_those_that_the_plan_has_read(tmp_path: Path) -> None:
    """Another one that is saved meanwhile is another plan's."""
    save_models(tmp_path)
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text('{"planned": true}')
    plan = plan_with(tmp_path)
    digest = plan.digest
    path.write_text('{"planned": 0}')
    execute(plan, tmp_path / "out")
    assert (tmp_path / "out" / path.name).read_text() == '{"planned": true}'
    assert json.loads((tmp_path / "out" / "merge.lock.json").read_text())["plan"] == digest
    assert plan_with(tmp_path).digest != digest
