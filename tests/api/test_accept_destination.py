"""A forbidden output folder or a full disk: one clear message, inputs untouched, nothing at OUT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_faults import Forks, snapshot, warm_interpreter
from helpers_work import Work


@pytest.fixture
def work(tmp_path: Path, cli: Forks) -> Work:
    return Work(tmp_path, cli)


# ------------------------------------------------------------------ the place of the output


PLACES = {
    "an input": "models/a",
    "an input by another name": "models/../models/./b/",
    "an input through a link": "link",
    "inside an input": "models/b/merged",
    "deep inside an input": "models/b/new/merged",
    "a folder that contains the inputs": "models",
    "the folder of everything": ".",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_output_may_not_touch_an_input(work: Work, place: str) -> None:
    (work.folder / "link").symlink_to("models/a")
    work.refused(out=place)
    work.refused(options=("--no-resume", "--overwrite"), out=work.folder / place)


def test_output_is_a_file(work: Work) -> None:
    (work.folder / "out").write_text("precious")
    work.refused("out is a file")
    work.refused("out is a file", options=("--overwrite",))


def test_output_in_a_file(work: Work) -> None:
    (work.folder / "file").write_text("precious")
    work.refused("file", out="file/out")


@pytest.mark.parametrize("options", [(), ("--no-resume",)], ids=str)
def test_output_exists_and_is_something_else(work: Work, options: tuple[str, ...]) -> None:
    (work.folder / "out").mkdir()
    (work.folder / "out" / "diary.txt").write_text("precious")
    work.refused("out", "--overwrite", options=options)


def test_empty_output_folder_is_used(work: Work) -> None:
    (work.folder / "out").mkdir()
    assert work.run().code == 0
    assert (work.folder / "out" / "model.safetensors").exists()


def test_folders_above_the_output_are_made(work: Work) -> None:
    assert work.run(out="new/deep/out").code == 0
    assert (work.folder / "new" / "deep" / "out" / "config.json").exists()


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_folders_that_only_look_like_ours(work: Work, name: str) -> None:
    """A folder that happens to be called OUT.partial or OUT.replaced is not cleared away."""
    (work.folder / name).mkdir()
    (work.folder / name / "diary.txt").write_text("precious")
    for options in ((), ("--no-resume",), ("--overwrite",)):
        work.run(*options)
        assert [path.read_text() for path in work.folder.rglob("diary.txt")] == ["precious"], options


# ------------------------------------------------------------------ the disk


def test_too_little_space_is_known_beforehand(work: Work) -> None:
    work.refused("disk", free=1000)


def test_disk_that_fills_up_in_reality(work: Work) -> None:
    """In a file system of 40 kB: refused beforehand or, if the file system claims to have space, at the first write."""
    space = work.folder / "small"
    space.mkdir()
    script = f"mount -t tmpfs -o size=40k none {space} || exit 77; exec {sys.executable} {__file__} {work.folder}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode in (1, 77) and ("unshare" in ran.stderr or "mount" in ran.stderr):
        pytest.skip("no user namespaces here")
    assert ran.returncode == 0, ran.stderr


def in_a_small_file_system(folder: Path) -> None:
    """The part of the last test that runs where `small` is a file system of its own."""
    with warm_interpreter() as forks:
        work = Work.__new__(Work)
        work.folder, work.cli = folder, forks
        work.refused("disk", "small", out="small/out")
        before = snapshot(folder / "models", times=True)
        ran = work.run(out="small/out", free=1 << 40)
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert ran.err.startswith("error: ")
        assert "No space left on device" in ran.err
        assert "small/out" in ran.err
        assert "Traceback" not in ran.err
        assert not (folder / "small" / "out").exists()
        assert snapshot(folder / "models", times=True) == before


if __name__ == "__main__":
    in_a_small_file_system(Path(sys.argv[1]))
