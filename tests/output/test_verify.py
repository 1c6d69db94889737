"""Verifying an output: every change of its folder or of its lock is a difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import run
from models import save_checkpoint
from safetensors.torch import load_file, save_file

from mergekit_lfm import merge
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.lock import lock_of, verify

SHARDS = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
RECIPE: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output of a merge in two shards."""
    for seed, name in enumerate("ab"):
        draw = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(5, generator=draw) for key in ("u", "v", "w", "x")}
        save_checkpoint(tmp_path / name, tensors, {}, shards=2)
    return merge_into(tmp_path / "out")


def merge_into(out: Path) -> Path:
    models = [{"model": str(out.parent / name)} for name in "ab"]
    return Path(merge({**RECIPE, "models": models}, out))


def change_lock(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = out / "merge.lock.json"
    lock = json.loads(path.read_text())
    change(lock)
    path.write_text(json.dumps(lock))


def move_tensor(out: Path) -> None:
    """Move a tensor to the other shard, and say so in the index, so that loaders find the same model."""
    one, two = (load_file(out / name) for name in SHARDS)
    name = next(iter(one))
    two[name] = one.pop(name)
    for file, tensors in zip(SHARDS, (one, two), strict=True):
        save_file(tensors, out / file, metadata={"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = SHARDS[1]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def change_metadata(out: Path) -> None:
    """Other metadata in a header of the same length."""
    path = out / SHARDS[0]
    path.write_bytes(path.read_bytes().replace(b'{"format":"pt"}', b'{"format":"tf"}'))


def swap_link(out: Path) -> None:
    """A shard elsewhere, with a link in its place."""
    (out / SHARDS[1]).rename(out.parent / "elsewhere")
    (out / SHARDS[1]).symlink_to(out.parent / "elsewhere")


def add_code(out: Path) -> None:
    (out / "modeling.py").write_text("print()")


def name_other_input(out: Path) -> None:
    change_lock(out, lambda lock: lock["inputs"][0].update(model="another"))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (move_tensor, "u is in model-00002-of-00002.safetensors, the lock says model-00001-of-00002.safetensors"),
    (change_metadata, "the header of model-00001-of-00002.safetensors was changed"),
    (swap_link, "model-00002-of-00002.safetensors is a link to "),
    (add_code, "modeling.py is not in the lock"),
    (name_other_input, "merge.lock.json was changed"),
]


@pytest.mark.parametrize(("damage", "line"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_change_is_a_difference(out: Path, damage: Callable[[Path], None], line: str) -> None:
    assert verify(out) == []
    damage(out)
    found = verify(out)
    assert [problem for problem in found if problem.startswith(line)], found
    assert len(found) == 1 or damage is move_tensor


@pytest.mark.parametrize("damage", [change_metadata, swap_link, name_other_input])
def test_a_changed_output_is_not_called_done(out: Path, damage: Callable[[Path], None]) -> None:
    damage(out)
    with pytest.raises(PlanError, match=r"is the output of this merge, but .*--overwrite makes it again"):
        merge_into(out)


def test_the_form_of_a_lock_does_not_matter(out: Path) -> None:
    path = out / "merge.lock.json"
    lock = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(lock.items())), indent=7))
    assert verify(out) == []


def test_hidden_files_do_not_count(out: Path) -> None:
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").touch()
    (out / ".gitattributes").touch()
    assert verify(out) == []


def test_links_of_the_hubs_cache_are_no_difference(out: Path, tmp_path: Path) -> None:
    """It keeps every file under the name of its content, and links to it in the folders of the commits."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "123", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(out.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert verify(snapshot) == []
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[0]).symlink_to(out / SHARDS[0])
    assert verify(snapshot) == [f"{SHARDS[0]} is a link to {out / SHARDS[0]}"]


def test_a_lock_of_another_format_is_refused(out: Path) -> None:
    change_lock(out, lambda lock: lock.update(format=2))
    with pytest.raises(FormatError, match=r"no merge.lock.json of format 3"):
        verify(out)


def test_changes_that_a_lock_cannot_show_are_listed(out: Path) -> None:
    verified = run("verify", str(out))
    assert verified.exit_code == 0
    assert "not covered: the inputs" in verified.stdout and "no signature" in verified.stdout
    assert len(json.loads(run("verify", str(out), "--json").stdout)["not_covered"]) == 3
    assert run("verify", str(out), "-q").stdout == f"{out}: good, all as its lock says\n"
    assert merge_into(out) == out


def test_a_lock_that_cannot_be_read_is_not_a_missing_one(tmp_path: Path) -> None:
    """The memory of a process is a regular file, and reading its first page fails as a disk does."""
    assert lock_of(tmp_path) == lock_of(tmp_path / "nowhere") == {}
    (tmp_path / "merge.lock.json").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"merge\.lock\.json"):
        lock_of(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "9" * 300, "a/../../b"])
def test_a_lock_that_names_files_elsewhere_is_damaged(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "m", {"w": torch.ones(2)}, {})
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "m")}], "parameters": {"weight": 1.0}}
    out = Path(merge(recipe, tmp_path / "out"))
    lock = lock_of(out)
    (out / "merge.lock.json").write_text(json.dumps({**lock, "files": {**lock["files"], name: "0"}}))
    with pytest.raises(FormatError, match="names no file of the folder"):
        verify(out)
