"""The folders that --overwrite may delete: outputs of ours and saved models, with nothing else in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import files_of, save_checkpoint

from mergekit_lfm import merge
from mergekit_lfm.errors import PlanError

RECIPE = {"merge_method": "linear", "parameters": {"weight": 1}}


def recipe(folder: Path, **more: object) -> dict[str, object]:
    """A merge of two tiny models in `folder`."""
    for i in (1, 2):
        if not (folder / f"m{i}").exists():
            save_checkpoint(folder / f"m{i}", {"w": torch.full((4,), float(i))}, {"model_type": "none"})
    return {**RECIPE, "models": [{"model": str(folder / "m1")}, {"model": str(folder / "m2")}], **more}


def refused(folder: Path, out: Path, *names: str, overwrite: bool = True, resume: bool = True) -> None:
    """Ask for a merge that must not write to `out`, nor change anything; its message has these words."""
    made, before = recipe(folder), files_of(folder)
    with pytest.raises(PlanError) as caught:
        merge(made, out, overwrite=overwrite, resume=resume)
    assert files_of(folder) == before
    assert all(name in str(caught.value) for name in names), caught.value


def merged(folder: Path, *, overwrite: bool = False, resume: bool = True) -> tuple[Path, bool]:
    """The output of the merge, and whether it was there already."""
    outcome = merge(recipe(folder), folder / "out", overwrite=overwrite, resume=resume)
    assert outcome.path is not None
    return outcome.path, outcome.already_there


def test_a_folder_with_anything_else_in_it_is_not_deleted(tmp_path: Path) -> None:
    merged(tmp_path)
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "diary.txt").write_text("precious")
    refused(tmp_path, tmp_path / "out", "notes/diary.txt", "move them away")
    refused(tmp_path, tmp_path / "out", "notes/diary.txt", overwrite=False, resume=False)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("precious")
    refused(tmp_path, tmp_path / "photos", "one.jpg")


@pytest.mark.parametrize("foreign", ["optimizer.pt", "checkpoint-10/model.safetensors", ".env", "link"])
def test_a_saved_model_is_replaced_but_no_file_beside_it(tmp_path: Path, foreign: str) -> None:
    out = save_checkpoint(tmp_path / "out", {"w": torch.ones(4)}, {"model_type": "old"}, shards=1)
    (out / "README.md").write_text("a card")
    (out / "tokenizer.json").write_text("{}")
    path = out / foreign
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "m1") if foreign == "link" else path.write_text("precious")
    refused(tmp_path, out, foreign)
    path.unlink()
    assert merge(recipe(tmp_path), out, overwrite=True).path == out
    assert not (out / "tokenizer.json").exists()


def test_the_working_directory_and_the_home_are_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "models" / "here"
    merge(recipe(tmp_path), here)
    monkeypatch.chdir(here)
    refused(tmp_path, here, "the working directory")
    refused(tmp_path, Path(), "the working directory")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(here))
    refused(tmp_path, here, "the home directory")


def test_links_are_not_followed(tmp_path: Path) -> None:
    merge(recipe(tmp_path), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    refused(tmp_path, tmp_path / "link", "is a link to real")
    refused(tmp_path, tmp_path / "link", "is a link to real", overwrite=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to("elsewhere")
    refused(tmp_path, tmp_path / "out", "out.partial is a link to elsewhere", overwrite=False)
    (tmp_path / "out.partial").unlink()
    (tmp_path / "precious").write_text("precious")
    for name in ("merge.journal", "merge.journal.2", "model.safetensors"):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "merge.journal").touch()
        (tmp_path / "out.partial" / name).unlink(missing_ok=True)
        (tmp_path / "out.partial" / name).symlink_to(tmp_path / "precious")
        refused(tmp_path, tmp_path / "out", f"{name} is a link", overwrite=False)
        (tmp_path / "out.partial" / name).unlink()
        for path in (tmp_path / "out.partial").iterdir():
            path.unlink()
        (tmp_path / "out.partial").rmdir()
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("damage", ["gone", "changed", "shorter"])
def test_a_damaged_output_is_not_called_done(tmp_path: Path, damage: str) -> None:
    out, _ = merged(tmp_path)
    whole = files_of(tmp_path)
    damaged = out / ("model.safetensors" if damage == "shorter" else "config.json")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    if damage == "gone":
        damaged.unlink()
    words = ("is the output of this merge, but", damaged.name, "--overwrite makes it again")
    refused(tmp_path, out, *words, overwrite=False)
    assert merged(tmp_path, overwrite=True) == (out, False)
    assert files_of(tmp_path) == whole


@pytest.mark.parametrize(("overwrite", "resume"), [(True, True), (False, False)])
def test_asked_to_write_it_writes(tmp_path: Path, overwrite: bool, resume: bool) -> None:
    """The weights are changed and of the same size, which only reading them all would show."""
    out, _ = merged(tmp_path)
    whole = files_of(out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert merged(tmp_path) == (out, True)
    assert merged(tmp_path, overwrite=overwrite, resume=resume) == (out, False)
    assert files_of(out) == whole
