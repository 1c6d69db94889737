"""DRO: a network from embeddings of tasks to the numbers of models, robust to how the tasks are distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_lfm.errors import PlanError
from mergekit_lfm.meta.episodes import EpisodeSource
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.train.examples import Batch, seed_of
from mergekit_lfm.train.loop import History, Tell, fit
from mergekit_lfm.train.losses import Terms

WIDTH, HIDDEN = 8, 32  # numbers of an embedding, and of the hidden layer
ASCENT_STEPS = 5  # towards the worst tasks in the ball
MOVE = "move"


class Fusion(nn.Module):
    """From embeddings of tasks [n, width] to the numbers of models [n, numbers], in units of how models differ.

    tasks: the embeddings of the teachers' tasks, learned with it; of length 1, so that no ball is small beside them.
    """

    def __init__(self, teachers: int, numbers: int, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(teachers, width))
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, numbers))

    @property
    def tasks(self) -> Tensor:
        """The embeddings of the teachers' tasks, [teachers, width]."""
        return nn.functional.normalize(self.embeddings, dim=-1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The numbers of the models of tasks."""
        made: Tensor = self.layers(embeddings)
        return made


@dataclass(frozen=True, eq=False)
class Moves(EpisodeSource):
    """First moves of embeddings, [teachers, width] of each number: at random, so that an ascent has where to begin."""

    teachers: int
    width: int = WIDTH

    @property
    def digest(self) -> str:
        """A digest of all that decides the moves."""
        return f"moves {self.teachers} {self.width} {self.seed}"

    def batch(self, numbers: Sequence[int], draw: int = 0) -> dict[str, Tensor]:  # noqa: ARG002
        """The moves of these numbers."""
        drawn = [torch.Generator().manual_seed(seed_of(self.seed, MOVE, number)) for number in numbers]
        return {MOVE: torch.stack([torch.randn(self.teachers, self.width, generator=each) for each in drawn])}


def into_ball(moves: Tensor, radius: float) -> Tensor:
    """Moves [n, width] of n embeddings, shortened alike until the root of their mean square is the radius at most.

    The moved embeddings are then within that 2-Wasserstein distance of the others, as of equal weights each.
    """
    size = moves.square().sum(-1).mean().sqrt()
    return moves * (radius / size.clamp(min=radius)) if radius else torch.zeros_like(moves)


def worst_moves(loss: Callable[[Tensor], Tensor], first: Tensor, radius: float, steps: int = ASCENT_STEPS) -> Tensor:
    """Moves [n, width] in the ball that make the loss large: steps up its slope, of a radius each, and back into it.

    loss: of moves. first: where to begin. Source: Sinha et al. 2018, arXiv 1710.10571, algorithm 1, with the ball
    itself in place of a price for moves.
    """
    moves = into_ball(first, radius)
    for _ in range(steps):
        slope = torch.func.grad(loss)(moves)
        moves = into_ball(moves + radius * slope / slope.square().sum(-1).mean().sqrt().clamp(min=1e-12), radius)
    return moves.detach()


@dataclass(frozen=True, eq=False)
class RobustFit:
    """The loss of a fusion: the mean squared distance to the teachers, at the worst embeddings in a Wasserstein ball.

    targets: the numbers of the teachers [n, numbers]. Source: Wang et al. 2022 (UAI), whose network learns from such
    embeddings.
    """

    targets: Tensor
    radius: float

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """The loss of a step."""
        assert isinstance(model, Fusion)
        fixed = {name: x.detach() for name, x in model.layers.named_parameters()}
        centre = model.tasks.detach()

        def at(moves: Tensor) -> Tensor:
            made: Tensor = torch.func.functional_call(model.layers, fixed, (centre + moves,))
            return (made - self.targets).square().mean()

        total = torch.zeros((), device=self.targets.device)
        for first in batch[MOVE]:
            moves = worst_moves(at, first, self.radius)
            total = total + (model(model.tasks + moves) - self.targets).square().mean()
        return Terms(total, len(batch[MOVE]))


@torch.no_grad()
def nominal(model: Fusion) -> Tensor:
    """The numbers of the model of the mean embedding, [numbers]."""
    made: Tensor = model(model.tasks.mean(0, keepdim=True))[0]
    return made


def fuse(
    flat: Tensor,
    radius: float,
    options: Options,
    *,
    place: Path | None = None,
    request: str = "",
    tell: Tell | None = None,
) -> tuple[Tensor, History]:
    """The initialisation from the numbers of teachers [teachers, numbers]: those of the mean embedding.

    place, request, tell: as of `fit`. Raises PlanError for teachers that are the same.
    """
    centre = flat.mean(0)
    unit = (flat - centre).square().mean().sqrt()
    if not unit > 0:
        raise PlanError("the teachers have the same numbers; expected models of different tasks. Give others")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed_of(options.seed, "fusion"))
        fusion = Fusion(*flat.shape).to(flat.device)
    loss, moves = RobustFit((flat - centre) / unit, radius), Moves(len(flat), seed=options.seed)
    history = fit(fusion, moves, loss, options, place=place, request=request, tell=tell)
    return centre + unit * nominal(fusion), history
