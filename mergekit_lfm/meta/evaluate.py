"""How good an initialisation is: its score on episodes after adapting, over one grid of rates and steps for all.

The cell of the grid is chosen on some episodes and its score is that on others, so that a start with more luck in one
cell has no advantage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lfm.meta.adapt import Parameters
from mergekit_lfm.meta.episodes import EpisodeSource
from mergekit_lfm.meta.losses import Inner, MetaLoss, over_tasks
from mergekit_lfm.train.examples import Batch

TASKS_AT_ONCE = 25


@dataclass(frozen=True, slots=True)
class Score:
    """The score of an initialisation. steps, rate: the cell of the grid; rate: None for learned ones.

    mean: over episodes; interval: half the width of the 95 % confidence interval of it.
    """

    steps: int
    rate: float | None
    mean: float
    interval: float


@torch.no_grad()
def score_cells(
    loss: MetaLoss,
    start: Parameters,
    episodes: EpisodeSource,
    numbers: Sequence[int],
    cells: Sequence[Inner],
    at_once: int = TASKS_AT_ONCE,
) -> dict[Inner, Tensor]:
    """The scores of episodes of these numbers in each cell, [episodes]. A rate is run on to its largest steps once.

    at_once: how many tasks are in memory.
    """
    found: dict[Inner, list[Tensor]] = {cell: [] for cell in cells}
    device = next(iter(start.values())).device
    for first in range(0, len(numbers), at_once):
        drawn = episodes.batch(numbers[first : first + at_once])
        batch = {name: x.to(device) for name, x in drawn.items()}
        for rate in dict.fromkeys(cell.rate for cell in cells):
            counts = sorted({cell.steps for cell in cells if cell.rate == rate})

            def one(support: Batch, query: Batch, rate: float | None = rate, counts: Sequence[int] = counts) -> Tensor:
                parameters, done, scores = start, 0, list[Tensor]()
                for count in counts:
                    parameters = loss.adapted(parameters, support, Inner(count - done, rate))
                    scores.append(loss.score(parameters, support, query))
                    done = count
                return torch.stack(scores)

            for count, column in zip(counts, over_tasks(one, batch).T, strict=True):
                found[Inner(count, rate)].append(column.cpu())
    return {cell: torch.cat(parts) for cell, parts in found.items()}


def evaluate(
    loss: MetaLoss,
    start: Parameters,
    episodes: EpisodeSource,
    cells: Sequence[Inner],
    count: int,
    at_once: int = TASKS_AT_ONCE,
) -> Score:
    """The score of a start on `count` episodes, in the cell that is best on as many others; those that diverge lose."""
    sign = 1 if loss.objective.counts_right else -1

    def worth(scores: Tensor) -> float:
        mean = float(scores.double().mean())
        return sign * mean if math.isfinite(mean) else -math.inf

    if len(cells) > 1:
        tried = score_cells(loss, start, episodes, range(count, 2 * count), cells, at_once)
        cells = [max(tried, key=lambda cell: worth(tried[cell]))]
    (cell,) = cells
    return summarise(cell, score_cells(loss, start, episodes, range(count), cells, at_once)[cell])


def summarise(cell: Inner, scores: Tensor) -> Score:
    """The mean of scores, [episodes], and its 95 % confidence interval."""
    values = scores.double()
    spread = float(values.std()) if len(values) > 1 else math.nan
    return Score(cell.steps, cell.rate, float(values.mean()), 1.96 * spread / math.sqrt(len(values)))
