"""The view that gives a vocabulary other ids, against indexing in memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from models import save_checkpoint

from mergekit_lfm.store.checkpoint import Checkpoint, open_checkpoint
from mergekit_lfm.views import reindexed
from mergekit_lfm.views.reindexed import Reindexed, Run, join_runs

ROWS, WIDTH = 50, 7


def save_models(tmp_path: Path, dtypes: Sequence[torch.dtype]) -> tuple[list[Checkpoint], list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(ROWS, WIDTH, generator=draw).to(dtype) for dtype in dtypes]
    for i, x in enumerate(tensors):
        save_checkpoint(tmp_path / str(i), {"w": x, "other": x[:3].clone()}, {})
    return [open_checkpoint(tmp_path / str(i)) for i in range(len(tensors))], tensors


@pytest.mark.parametrize("panel", [7, 40, 1 << 18])
@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.float32,) * 3, torch.float32),
        ((torch.bfloat16, torch.float32, torch.float16), torch.float32),
        ((torch.float16, torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.bfloat16,) * 3, torch.bfloat16),
    ],
)
def test_random_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    panel: int,
    dtypes: Sequence[torch.dtype],
    widest: torch.dtype,
) -> None:
    monkeypatch.setattr(reindexed, "PANEL", panel)
    models, tensors = save_models(tmp_path, dtypes)
    draw = random.Random(3)
    rows: list[tuple[tuple[int, int], ...]] = [((0, n),) for n in range(20)]
    rows += [tuple((donor, draw.randrange(ROWS)) for donor in range(draw.randrange(4))) for _ in range(40)]
    rows += [((1, n), (2, n + 5)) for n in range(8)]
    view = Reindexed(models[0], models[1:], {"w": ["w"] * 3}, join_runs(rows), padding=5)
    made = view.read("w").view(-1, WIDTH)
    assert (
        made.dtype == widest and made.shape == (73, WIDTH) and torch.equal(view.read("other"), models[0].read("other"))
    )
    exact = [
        sum((tensors[d][n].double() for d, n in row), torch.zeros(WIDTH).double()) / max(1, len(row)) for row in rows
    ]
    nearest = {torch.float32: 1e-7, torch.bfloat16: 2**-8}[widest]
    for new, row, wanted in zip(made, rows, exact, strict=False):
        close = torch.allclose(new.double(), wanted, rtol=nearest, atol=1e-12)
        assert torch.equal(new.double(), wanted) if len(row) < 2 else close
    mean = made[:68].double().mean(0)
    assert torch.allclose(made[68:].double(), mean.expand(5, -1), rtol=nearest, atol=1e-9)


def test_ids_that_follow_each_other_are_one_run() -> None:
    rows = [((0, 4),), ((0, 5),), ((0, 7),), (), (), ((1, 0), (0, 3)), ((1, 1), (0, 4)), ((1, 2),)]
    assert join_runs(rows) == (
        Run(0, 2, ((0, 4),)),
        Run(2, 1, ((0, 7),)),
        Run(3, 2, ()),
        Run(5, 2, ((1, 0), (0, 3))),
        Run(7, 1, ((1, 2),)),
    )


def test_a_cut_needs_no_copy(tmp_path: Path) -> None:
    """The first rows are read where they lie."""
    (model,), (tensor,) = save_models(tmp_path, [torch.float32])
    view = Reindexed(model, [], {"w": ["w"]}, [Run(0, 30, ((0, 0),))])
    assert view.maker("w") is None and view.location("w") == model.location("w")
    assert torch.equal(view.read("w").view(30, WIDTH), tensor[:30])
