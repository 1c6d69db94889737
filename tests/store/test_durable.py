"""Files are replaced whole or not at all, by several runs at once too, and whatever killed runs left there."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers_faults import save_model
from helpers_merges import LINEAR, write_recipe
from torch import ones

from mergekit_lfm import merge
from mergekit_lfm.errors import FormatError
from mergekit_lfm.output.writer import Output
from mergekit_lfm.store import durable
from mergekit_lfm.store.durable import leftovers, replace_file


def test_several_runs_replace_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)  # as long as a name may be
    contents = [bytes([n]) * 10_000 for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: replace_file(path, [content[:9], content[9:]]), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"new"
        assert len(list(tmp_path.iterdir())) == 2
        raise OSError(28, "No space left on device")

    replace_file(tmp_path / "x", b"old")
    with pytest.raises(OSError, match=r"No space left on device: .*/x"):
        replace_file(tmp_path / "x", parts())
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_or_link_in_the_place_of_a_temporary_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "x.tmp").symlink_to("elsewhere")
    (tmp_path / "y.tmp").mkdir()
    for name in ("x", "y"):
        replace_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a recipe whose merge was interrupted before it published, and left a temporary file."""
    for name in ("a", "b"):
        save_model(tmp_path / name, {"x": ones(4)})

    def die(output: Output, _files: object) -> None:
        (output.partial / f".config.json.{'0' * 16}.tmp").write_bytes(b"{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            merge(write_recipe(tmp_path, LINEAR), tmp_path / "out")
    return tmp_path


def test_files_of_a_killed_run_do_not_reach_the_output(killed: Path) -> None:
    assert leftovers(killed / "out.partial")
    merge(write_recipe(killed, LINEAR), killed / "out")
    assert not [path for path in (killed / "out").iterdir() if path.name.endswith(".tmp")]


def test_a_journal_ends_at_a_line_that_is_too_long(killed: Path) -> None:
    journal = killed / "out.partial" / "merge.journal"
    with journal.open("ab") as lines:
        lines.write(b'{"tensor": "' + b"x" * 2_000_000 + b'"}\n')
    merge(write_recipe(killed, LINEAR), killed / "out")
    assert (killed / "out" / "model.safetensors").exists()


def test_a_journal_that_is_a_pipe_is_refused(killed: Path) -> None:
    journal = killed / "out.partial" / "merge.journal"
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(FormatError, match=r"merge\.journal is a pipe"):
        merge(write_recipe(killed, LINEAR), killed / "out")


def test_space_is_reserved_although_signals_interrupt_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python repeats interrupted calls, but not those by ctypes."""
    reserve_really, interruptions = durable._fallocate, [1, 1]
    assert reserve_really is not None

    def fallocate(*args: object) -> int:
        if interruptions:
            interruptions.pop()
            ctypes.set_errno(errno.EINTR)
            return -1
        return int(reserve_really(*args))

    monkeypatch.setattr(durable, "_fallocate", fallocate)
    with (tmp_path / "x").open("wb") as file:
        durable.reserve(file.fileno(), 1 << 20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 1 << 20 and not interruptions
