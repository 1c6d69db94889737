"""Downloads and pushes report the bytes that they have moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers_commands import wait_for
from helpers_hub import REPO, prepare
from hub_server import HubServer

from mergekit_lfm import merge, open_checkpoint, push
from mergekit_lfm.machine.progress import Silence
from mergekit_lfm.output import push as pushing
from mergekit_lfm.store.hub import snapshots
from mergekit_lfm.store.hub.arrivals import count_arrivals


@dataclass
class Record(Silence):
    """Keeps the steps that are measured in bytes: the size of each, and the sum of its reports."""

    steps: dict[str, list[int]] = field(default_factory=dict)

    @contextmanager
    def by_bytes(self, nbytes: int, doing: str, *, bar: bool = True) -> Iterator[Callable[[int], None]]:
        step = self.steps.setdefault(doing, [nbytes, 0, int(bar)])

        def advance(more: int) -> None:
            step[1] += more

        yield advance


@pytest.fixture(params=["lfs", "xet"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub with models org/a and org/b; the working directory has a recipe that averages them."""
    found: HubServer = request.getfixturevalue("hub" if request.param == "lfs" else "xet_hub")
    (tmp_path / "here").mkdir()
    prepare(found, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return found


def test_a_download_reports_the_bytes_that_arrive(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()
    monkeypatch.setattr(snapshots, "TAKES_LONG", 0)
    model = open_checkpoint("org/a")
    nbytes = len(server.files("org/a")["model.safetensors"])
    model.fetch(record)
    ((doing, (expected, arrived, bar)),) = record.steps.items()
    assert doing == f"downloading org/a@{server.head('org/a')}"
    assert expected == nbytes <= arrived < nbytes + 4096 * 4  # whole blocks of the disk
    assert not bar


def test_a_push_reports_each_large_file(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    merge("recipe.yaml", "out")
    weights = Path("out/model.safetensors").read_bytes()
    monkeypatch.setattr(pushing, "IN_GIT", len(weights) - 1)
    record = Record()
    push("out", REPO, progress=record)
    assert record.steps == {f"pushing to {REPO}": [len(weights), len(weights), 0]}
    assert server.files(REPO)["model.safetensors"] == weights
    assert len(server.history(REPO)) == 2  # the first is that of the empty repository


def test_arrivals_are_counted_while_they_come(tmp_path: Path) -> None:
    counts: list[int] = []
    (tmp_path / "old").write_bytes(bytes(8192))
    with count_arrivals(tmp_path, counts.append, every_s=0.001):
        (tmp_path / "x.incomplete").write_bytes(bytes(8192))
        wait_for(lambda: sum(counts) >= 8192)
        (tmp_path / "x.incomplete").rename(tmp_path / "x")
    assert sum(counts) == 8192
