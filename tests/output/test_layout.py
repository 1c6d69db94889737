"""Output shards: filled in order, each up to the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import save_checkpoint

from mergekit_lfm.output.layout import lay_out
from mergekit_lfm.store.checkpoint import open_checkpoint


@pytest.mark.parametrize(("limit", "counts"), [(7, [1] * 5), (8, [1] * 5), (15, [1] * 5), (16, [2, 2, 1]), (40, [5])])
def test_a_shard_takes_as_many_tensors_as_fit(tmp_path: Path, limit: int, counts: list[int]) -> None:
    """Tensors of 8 bytes: a limit is reached, not just approached."""
    model = open_checkpoint(save_checkpoint(tmp_path / "m", {f"x{i}": torch.ones(2) for i in range(5)}, {}))
    assert [len(shard.tensors) for shard in lay_out(model, list(model.values()), limit)] == counts
