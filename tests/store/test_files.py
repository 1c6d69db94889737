"""Small files from strangers: pipes, devices, endless and deep ones are refused with one message, and nothing hangs."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
import yaml
from safetensors.numpy import save_file

from mergekit_lfm import open_checkpoint
from mergekit_lfm.api.edit import _read_options
from mergekit_lfm.artifacts.facts import read_facts_file
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.output.card import front_matter
from mergekit_lfm.output.lock import lock_of
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.runtime.data import read_documents
from mergekit_lfm.store import files
from mergekit_lfm.store.files import parse_json, read_bytes, read_json, read_text
from mergekit_lfm.store.folder import read_config
from mergekit_lfm.store.sidecars import sidecars_of
from mergekit_lfm.store.yaml import _Loader, read_yaml


def model(folder: Path) -> Path:
    """A folder with one tensor in a sharded model."""
    folder.mkdir()
    save_file({"x": np.ones(2, "float32")}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    return folder


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": bind,
    "a folder": os.mkdir,
}


@pytest.mark.parametrize(("kind", "make"), ODD.items(), ids=ODD)
def test_only_regular_files_are_read(
    tmp_path: Path, kind: str, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path("x.json"))
    with pytest.raises(FormatError, match=rf"x\.json is {kind}, expected a regular file"):
        read_json(Path("x.json"))


READERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors.index.json": open_checkpoint,
    "model.safetensors": lambda folder: open_checkpoint(folder / "model.safetensors"),
    "model.bin": lambda folder: open_checkpoint(folder / "model.bin"),
    "config.json": read_config,
    "modules.json": lambda folder: sidecars_of(open_checkpoint(folder)),
    "facts.yaml": lambda folder: read_facts_file(folder / "facts.yaml"),
    "recipe.yaml": lambda folder: Recipe.load(folder / "recipe.yaml"),
    "options.yaml": lambda folder: _read_options("rome", None, folder / "options.yaml", {}),
    "text.txt": lambda folder: read_documents(folder / "text.txt"),
}


@pytest.mark.parametrize(("name", "read"), READERS.items(), ids=READERS)
def test_every_reader_refuses_a_pipe(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    folder = model(tmp_path / "a")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(FormatError, match=rf"{name} is (a pipe|not a regular file)"):
        read(folder)


def test_a_card_and_a_lock_that_are_pipes_are_no_card_and_no_lock(tmp_path: Path) -> None:
    for name in ("README.md", "merge.lock.json"):
        os.mkfifo(tmp_path / name)
    assert front_matter(tmp_path / "README.md") == {} == lock_of(tmp_path)


def test_a_large_file_is_refused_where_a_small_one_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(files.SMALL + 1)  # a hole: takes no disk
    with pytest.raises(FormatError, match="has over 100,000,000 bytes"):
        read_config(tmp_path)
    os.truncate(path, 11)
    assert read_bytes(path, most=11) == bytes(11)
    with pytest.raises(FormatError, match="has over 10 bytes"):
        read_bytes(path, most=10)


def test_text_is_read_as_open_reads_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("a\r\nb\rc\nü".encode())
    assert read_text(tmp_path / "x") == (tmp_path / "x").read_text(encoding="utf-8")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_json_is_refused(opening: str) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    assert parse_json(opening * 100 + "1" + closing * 100, "x")
    for depth in (101, 900, 100_000):
        with pytest.raises(FormatError, match="over more than 100 levels"):
            parse_json(opening * depth + "1" + closing * depth, "x")


@pytest.mark.parametrize("text", ["", "{", b"\xff", "9" * 5000, "[NaN"])
def test_text_other_than_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(FormatError, match="x: not JSON"):
        parse_json(text, "x")


def test_an_index_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(FormatError, match="its weight_map names no tensor"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["\0", "\ud800", "a" * 300, "", "/etc/passwd", "../a", 1, None])
def test_an_index_with_names_that_no_file_has_is_refused(tmp_path: Path, name: object) -> None:
    folder = model(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(FormatError, match="not a file of that folder"):
        open_checkpoint(folder)


@pytest.mark.skipif(not hasattr(yaml, "CSafeLoader"), reason="PyYAML lacks libyaml here")
def test_libyaml_reads_as_pyyaml_does() -> None:
    """100,000 lines take two seconds with libyaml, ten without."""
    assert issubclass(_Loader, yaml.CSafeLoader)
    entry = "- {{prompt: 'The capital of {{}} {0} is', subject: Land {0}, target_new: 1e3, x: [0x1f, ~, 2024-01-01]}}\n"
    text = "facts:\n" + "".join(entry.format(number) for number in range(100))
    assert read_yaml(text, "x") == yaml.safe_load(text)


CHAIN = "- &a0 [1]\n" + "".join(f"- &a{n + 1} [*a{n}]\n" for n in range(500))
LAUGHS = "- &a0 [1]\n" + "".join(f"- &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(30))
MERGES = "- &a0 {x: 1}\n" + "".join(f"- &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 101 + "]" * 101, "over more than 100 levels"),
        ("[" * 100_000, "line 1"),
        ("- " * 101 + "x", "over more than 100 levels"),
        ("- " * 100_000, "line 1"),
        ("a: " + "{a: " * 101 + "}" * 101, "over more than 100 levels"),
        ("? " * 5_000, "line 1"),
        (CHAIN, "line 101: lists and mappings lie in one another over more than 100 levels"),
        (LAUGHS, "aliases make over 1,000,000 values"),
        (MERGES, "aliases make over 1,000,000 values"),
        ("a: 1" + ":1" * 1_000_000, "line 1, column 4:  found a number of 2,000,001 characters"),
        ("a: \ud800", "not YAML"),
        ("&a [1, *a]", "line 1: an alias names a list or mapping that it lies in"),
        ("&a {b: {c: *a}}", "line 1: an alias names a list or mapping that it lies in"),
    ],
)
def test_yaml_that_explodes_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_yaml(text, "x")


def test_yaml_within_the_bounds_is_read() -> None:
    assert read_yaml("[" * 100 + "]" * 100, "x")
    assert read_yaml("- &a {x: 1}\n- {<<: *a, y: *a}\n- *a", "x") == [{"x": 1}, {"x": 1, "y": {"x": 1}}, {"x": 1}]
    with pytest.raises(PlanError, match="line 3: x repeats the key of line 2"):
        read_yaml("a:\n  x: 1\n  x: 2\nb: 3", "x")


def test_yaml_is_read_without_libyaml_too() -> None:
    """The same bounds hold in an installation without libyaml."""
    code = (
        "import yaml; del yaml.CSafeLoader\n"
        "from mergekit_lfm.store.yaml import PlanError, read_yaml\n"
        "assert read_yaml('a: [1]', 'x') == {'a': [1]}\n"
        "for text in ('[' * 900 + ']' * 900, '[' * 101 + ']' * 101, 'a: 1\\na: 2'):\n"
        "    try:\n        read_yaml(text, 'x')\n"
        "    except PlanError:\n        continue\n"
        "    raise SystemExit(text)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_recipe_with_names_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(PlanError, match=r"models\[0\].model: found 'aaa.*cannot be looked up: File name too long"):
        Recipe.parse({"merge_method": "linear", "models": [{"model": "a" * 300, "parameters": {"weight": 1}}]})


@pytest.mark.parametrize("nbytes", [0, 1, files.PART - 1, files.PART, 2 * files.PART + 3])
def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path, nbytes: int) -> None:
    data = os.urandom(nbytes)
    (tmp_path / "x").write_bytes(data)
    assert files.digest_file(tmp_path / "x") == xxhash.xxh3_128_hexdigest(data)


@pytest.mark.parametrize("read", [files.digest_file, read_bytes, read_text, read_json])
def test_a_failure_of_the_disk_names_the_file(read: Callable[[Path], object]) -> None:
    """The memory of a process is a regular file, and reading its first page fails as a disk does."""
    with pytest.raises(OSError, match="/proc/self/mem") as raised:
        read(Path("/proc/self/mem"))
    assert raised.value.errno == errno.EIO
