"""The contract of every view, over one of each kind: bytes, places, costs, and the checkpoints below it."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from helpers_views import CASES, open_case, peak_nbytes, pending
from models import files_of

import mergekit_lfm.views
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.tensors import ITEMSIZE
from mergekit_lfm.views.base import View


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, View]:
    return open_case(request.param, tmp_path / "model")


def test_every_view_is_a_case_and_has_no_heirs(tmp_path: Path) -> None:
    for module in iter_modules(mergekit_lfm.views.__path__):
        import_module(f"mergekit_lfm.views.{module.name}")
    heirs = {kind for kind in View.__subclasses__() if kind.__module__.startswith("mergekit_lfm.")}
    opened = [open_case(name, tmp_path / str(i)) for i, name in enumerate(CASES)]
    assert {type(view) for _, view in opened} | {type(pending(opened[0][0]))} == heirs
    assert all(getattr(kind, "__final__", False) and not kind.__subclasses__() for kind in heirs)


def test_any_range_read_in_any_thread_is_part_of_the_whole(case: tuple[Checkpoint, View]) -> None:
    _, view = case
    with ThreadPoolExecutor(2) as pool:
        for name, spec in view.items():
            whole = view.read(name)
            assert (spec.name, whole.numel() * ITEMSIZE[spec.dtype]) == (name, spec.nbytes)
            step = max(1, spec.numel // 7)
            parts = pool.map(lambda i, name=name, n=step: view.read(name, i, i + n), range(0, spec.numel, step))
            assert torch.equal(torch.cat([whole[:0], *parts]).view(torch.uint8), whole.view(torch.uint8))


def test_a_pickled_view_reads_the_same(case: tuple[Checkpoint, View]) -> None:
    _, view = case
    copy = pickle.loads(pickle.dumps(view))
    assert copy == view and copy.identity == view.identity and copy.resident == view.resident
    assert copy.digests == view.digests


def test_a_location_has_the_bytes(case: tuple[Checkpoint, View]) -> None:
    _, view = case
    for name, spec in view.items():
        place = view.location(name)
        if place is not None:
            assert os.pread(place[0], spec.nbytes, place[1]) == view.read(name).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", CASES)
def test_the_cost_is_a_bound(tmp_path: Path, name: str) -> None:
    """Reading takes no more, and at least a tenth of it."""
    stored, first = open_case(name, tmp_path / "model")
    for tensor in (tensor for tensor in first if first.maker(tensor) is not None):
        view = CASES[name][1](stored)  # which holds no panel yet
        buffer, cost = memoryview(bytearray(ITEMSIZE[view[tensor].dtype])), view.cost(tensor)
        peak = peak_nbytes(partial(view.read_into, tensor, 0, buffer))
        assert peak <= cost.scratch + 5000, (tensor, peak, cost)  # besides, some indices and the like
        assert cost.scratch <= 10 * peak + 30_000, (tensor, peak, cost)


def test_the_checkpoints_below_stay_as_they_are(case: tuple[Checkpoint, View]) -> None:
    stored, view = case
    folder = stored.path
    before, specs, identity = files_of(folder), dict(stored), stored.identity
    assert view.identity[0].keys() == {"view"} and view.digest != stored.digest
    assert any(view.identity[i : i + len(identity)] == identity for i in range(len(view.identity))) or not view.inners
    _ = view.digests
    assert files_of(folder) == before and dict(stored) == specs and stored.identity == identity


def test_all_files_of_the_layout_hold_all_tensors(case: tuple[Checkpoint, View]) -> None:
    _, view = case
    names = [name for part in view.layout for name in part.dtypes]
    assert sorted(names) == sorted(view) or not names
