"""The journal of an output: it vouches for synced data alone."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from models import save_checkpoint

from mergekit_lfm.output.journal import JOURNAL, Receipt
from mergekit_lfm.output.layout import lay_out
from mergekit_lfm.output.writer import Output
from mergekit_lfm.store.checkpoint import open_checkpoint


@pytest.mark.parametrize(("failures", "lines"), [(0, 3), (1, 1)])
def test_after_a_failed_sync_nothing_more_is_journalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, lines: int
) -> None:
    """The kernel reports lost data once, so that the next sync succeeds without them."""
    model = open_checkpoint(save_checkpoint(tmp_path / "m", {name: torch.ones(2) for name in "ab"}, {}))
    sync, left = os.fdatasync, [None] * failures

    def sync_or_fail(fd: int) -> None:
        if left:
            left.pop()
            raise OSError(errno.EIO, "lost")
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", sync_or_fail)
    with Output("digest", lay_out(model, list(model.values()), None), (), tmp_path / "out") as output:
        for name in model:
            with suppress(OSError):
                output.record(Receipt(name, 0, "0"), 8)
            with suppress(OSError):
                output.flush()
    assert (output.partial / JOURNAL).read_bytes().count(b"\n") == lines
