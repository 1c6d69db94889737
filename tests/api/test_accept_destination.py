"""A forbidden output folder or a full disk: one clear message, inputs untouched, nothing at OUT."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_faults import WRITES, Forks, output_snapshot, snapshot, warm_interpreter
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


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--no-resume", "--overwrite")], ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_output_may_not_touch_an_input(work: Work, place: str, options: tuple[str, ...]) -> None:
    (work.folder / "link").symlink_to("models/a")
    work.refused(options=options, out=place)
    work.refused(options=options, out=work.folder / place)


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


def writing_calls(work: Work) -> dict[str, int]:
    """The calls that can meet a full disk, each with its number of uses in a whole run."""
    whole = work.run(out="whole")
    names = (*set(WRITES) - {"copy_file_range"}, "posix_fallocate", "fdatasync", "fsync", "mkdir", "open")
    counts = {name: whole.count(name, where="whole") for name in names}
    return {name: count for name, count in counts.items() if count} | {
        "mkdir": 1
    }  # later calls find the existing folder


SLOW = [pytest.param(error, marks=pytest.mark.slow) for error in (errno.EDQUOT, errno.EROFS)]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, *SLOW], ids=errno.errorcode.get)
def test_full_disk(work: Work, error: int) -> None:
    """Whichever call first meets the full disk: one message, nothing at OUT; with space again, the merge goes on.

    The moments are those of a full disk; other errors differ by what the message says, and come once for each call.
    """
    calls = writing_calls(work)
    assert {"pwrite", "open"} <= calls.keys()
    expected = output_snapshot(work.folder / "whole")
    shutil.rmtree(work.folder / "whole")
    for name, count in calls.items():
        moments = {1, (count + 1) // 2, count} if error == errno.ENOSPC else {(count + 1) // 2}
        for nth in sorted(moments & set(range(1, count + 1))):
            work.refused(os.strerror(error), "out.partial", early=False, fail=name, nth=nth, where="out", error=error)
            ran = work.run()
            assert ran.code == 0, (name, nth, ran.err)
            assert output_snapshot(work.folder / "out") == expected, (name, nth)
            assert not (work.folder / "out.partial").exists()
            shutil.rmtree(work.folder / "out")


def test_filesystem_without_reservation(work: Work) -> None:
    """If space cannot be reserved or ranges copied, plain calls replace them."""
    whole = work.run(out="whole")
    for name in ("posix_fallocate", "copy_file_range"):
        ran = work.run(fail=name, error=errno.EOPNOTSUPP)
        assert ran.code == 0, ran.err
        assert output_snapshot(work.folder / "out") == output_snapshot(work.folder / "whole")
        shutil.rmtree(work.folder / "out")
    assert whole.code == 0


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
