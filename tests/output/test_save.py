"""A checkpoint that is saved while runs are killed: OUT is complete or not there, and the next run needs no help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import files_of, save_checkpoint

from mergekit_lfm import open_checkpoint
from mergekit_lfm.errors import PlanError
from mergekit_lfm.output import publish, save


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the models a and b."""
    for number, name in enumerate("ab"):
        save_checkpoint(tmp_path / name, {"x": torch.full((3,), float(number))}, {"name": name})
    return tmp_path


def write(folder: Path, name: str, *, overwrite: bool = False) -> None:
    """Save a copy of a model as `out`."""
    save.check_out(folder / "out", {"model": folder / name}, overwrite=overwrite)
    save.save_checkpoint(open_checkpoint(folder / name), folder / "out", {}, {})


def kill_in_sync(folder: Path, at: int, name: str, *, overwrite: bool = False) -> None:
    """Save, and end at this sync of a folder among the last steps."""
    calls = 0

    def sync(_: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(publish, "sync_folder", sync)
        write(folder, name, overwrite=overwrite)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_killed_before_the_rename_is_done_again(models: Path) -> None:
    kill_in_sync(models, 1, "a")
    assert not (models / "out").exists()
    write(models, "b")
    assert names(models) == {"a", "b", "out"} and files_of(models / "out") == files_of(models / "b")


def test_a_run_killed_after_the_rename_leaves_the_output_alone(models: Path) -> None:
    kill_in_sync(models, 2, "a")
    assert files_of(models / "out") == files_of(models / "a")
    with pytest.raises(PlanError, match="out exists"):
        write(models, "a")
    assert names(models) == {"a", "b", "out"}


def test_an_output_that_a_killed_run_had_moved_away_comes_back(models: Path) -> None:
    write(models, "a")
    kill_in_sync(models, 1, "b", overwrite=True)
    assert not (models / "out").exists()
    with pytest.raises(PlanError, match="out exists"):
        write(models, "b")
    assert files_of(models / "out") == files_of(models / "a")
    write(models, "b", overwrite=True)
    assert names(models) == {"a", "b", "out"} and files_of(models / "out") == files_of(models / "b")


def test_a_folder_of_somebody_else_is_left_alone(models: Path) -> None:
    (models / "a").rename(models / "out.partial")
    before = files_of(models)
    with pytest.raises(PlanError, match="not the unfinished output"):
        write(models, "b")
    assert files_of(models) == before
