"""The statistics file as a file: facts there and back, entries by layer, and damage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers_stats import gram_of, write_fisher, write_grams
from safetensors.torch import load_file, save_file

from mergekit_lfm import open_checkpoint
from mergekit_lfm.artifacts.statistics import Layer, StatisticsInfo, open_statistics, read_statistics_info
from mergekit_lfm.errors import FormatError
from mergekit_lfm.store.identity import content_digest

GRAM = gram_of(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
LAYERS = [Layer("q.weight", "q.bias", 1, 3, "q", 20), Layer("k.weight", None, 1, 3, "q", 20)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"q.weight": torch.ones(2, 3), "q.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "mergekit_lfm" / "contents"


def test_facts_are_read_as_they_were_written() -> None:
    facts = StatisticsInfo(
        "cross",
        ("a", "b"),
        "data",
        {"task": "lm", "window": None},
        7,
        layers={layer.weight: layer for layer in LAYERS},
        norm=0.5,
        skipped={"lm_head": "tied"},
        versions={"torch": "2"},
    )
    assert read_statistics_info(facts.metadata(), "x") == facts


def test_layers_that_share_inputs_share_an_entry(model: Path) -> None:
    statistics = open_statistics(write_grams(model / "s", model, {"q": GRAM}, LAYERS))
    assert statistics.entry("k") == statistics.entry("q") == "gram/q"
    assert statistics.by_weight["k.weight"] == ("k", LAYERS[1])
    assert torch.equal(statistics.read("k"), GRAM.float())
    assert torch.equal(statistics.read("k"), load_file(model / "s")["gram/q"])
    with pytest.raises(KeyError):
        statistics.entry("v")


def test_fisher_is_found_by_the_tensor(model: Path) -> None:
    fisher = {"q.weight": torch.arange(6.0).view(2, 3)}
    statistics = open_statistics(write_fisher(model / "s", model, fisher))
    assert torch.equal(statistics.read("q.weight"), fisher["q.weight"])
    assert statistics.info.norm == pytest.approx(55**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lfm.kind": "patch"}, "is not a statistics file"),
        ({"lfm.format": "2"}, "another version"),
        ({"lfm.layers": "{"}, "damaged metadata"),
        ({"lfm.layers": json.dumps({"q": {"weight": "q.weight"}})}, "damaged metadata"),
        ({"lfm.models": "7"}, "damaged metadata"),
    ],
)
def test_files_that_are_none_are_refused(model: Path, changes: dict[str, str], message: str) -> None:
    path = write_grams(model / "s", model, {"q": GRAM}, LAYERS, **changes)
    with pytest.raises(FormatError, match=message):
        open_statistics(path)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such statistics file"):
            open_statistics(path)


# The model of statistics


def test_content_is_that_of_the_tensors_however_they_lie(tmp_path: Path, own_cache: Path) -> None:
    tensors = {"a": torch.randn(4, 2), "b": torch.arange(3), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "two.safetensors", {"other": "metadata"})
    torch.save(tensors, tmp_path / "three.bin")
    contents = {open_checkpoint(path).content for path in tmp_path.iterdir()}
    assert len(contents) == 1
    one = open_checkpoint(tmp_path / "one.safetensors")
    assert contents == {content_digest({one[name]: digest for name, digest in one.digests.items()})}
    assert len(list(own_cache.iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.full((2, 2), 1.5)},
        {"a": torch.ones(4)},
        {"a": torch.ones(2, 2, dtype=torch.bfloat16)},
        {"other": torch.ones(1)},
    ],
)
def test_another_content_has_another_digest(tmp_path: Path, own_cache: Path, change: dict[str, torch.Tensor]) -> None:
    tensors = {"a": torch.ones(2, 2), "b": torch.zeros(1)}
    save_file(tensors, tmp_path / "one.safetensors")
    save_file(tensors | change, tmp_path / "two.safetensors")
    one, two = (open_checkpoint(tmp_path / f"{name}.safetensors").content for name in ("one", "two"))
    assert one != two
    assert {path.read_text() for path in own_cache.iterdir()} == {one, two}


def test_the_content_is_read_once_and_again_when_the_file_changes(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    first = open_checkpoint(path)
    first_content = first.content
    again = open_checkpoint(path)
    assert again.content == first_content
    assert "digests" not in vars(again), "the data were read again"
    save_file({"a": torch.ones(3)}, path)
    assert open_checkpoint(path).content != first_content
    assert len(list(own_cache.iterdir())) == 2


def test_a_file_that_gets_its_old_time_back_has_another_content(tmp_path: Path, own_cache: Path) -> None:
    """The same inode, size and time of modification, as some tools leave them."""
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    status, before = path.stat(), open_checkpoint(path).content
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert open_checkpoint(path).content != before
    assert len(list(own_cache.iterdir())) == 2


def test_without_a_place_to_keep_it_the_content_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    expected = open_checkpoint(path).content
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_checkpoint(path).content == expected
