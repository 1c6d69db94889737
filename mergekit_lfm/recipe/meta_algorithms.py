"""Algorithms of meta-learning, as declarations: `algorithm: maml`. `meta` has the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mergekit_lfm.recipe.training import Optimizer

Kind = Literal["gradient", "reptile", "metric"]
TASKS = ("classification", "embedding", "lm", "regression")  # for which there are episodes


@dataclass(frozen=True, slots=True)
class Algorithm:
    """An algorithm that makes an initialisation from episodes.

    kind: the code that does it. rate, clip: of the outer steps, by default; None for those of the tuning method.
    optimizer: of these. first_order: the slopes of inner steps are constants. head_only: these move the head alone.
    learns_rates: a rate for each number of the model is learned with it. scales: the model stays, but for factors and
    shifts of its channels, and the head. hard_tasks: half of a step's episodes are of the classes with the largest
    losses. inner_steps, inner_rate: of adapting, by default.
    """

    name: str
    source: str
    summary: str
    kind: Kind = "gradient"
    tasks: tuple[str, ...] = TASKS
    rate: float | None = None
    clip: float | None = None
    optimizer: Optimizer = "adamw"
    first_order: bool = False
    head_only: bool = False
    learns_rates: bool = False
    scales: bool = False
    hard_tasks: bool = False
    inner_steps: int = 5
    inner_rate: float = 0.1

    @property
    def adapts(self) -> bool:
        """Whether there are inner steps."""
        return self.kind != "metric"

    @property
    def has_beside(self) -> bool:
        """Whether something is learned that has a file of its own beside the model."""
        return self.learns_rates or self.name == "relation"


ALGORITHMS: Mapping[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("maml", "arXiv 1703.03400", "the loss after inner steps, derived through all of them"),
        Algorithm(
            "fomaml",
            "arXiv 1703.03400, 5.2",
            "the loss after inner steps, whose slopes are taken for constants; less memory",
            first_order=True,
        ),
        Algorithm(
            "anil",
            "arXiv 1909.09157",
            "maml whose inner steps move the head alone",
            tasks=("classification", "regression"),
            head_only=True,
        ),
        Algorithm("metasgd", "arXiv 1707.09835", "maml with a learned rate for each number", learns_rates=True),
        Algorithm(
            "mtl",
            "arXiv 1812.02391",
            "factors and shifts of the channels of a trained model, which stays; inner steps move the head alone",
            tasks=("classification", "regression"),
            head_only=True,
            scales=True,
            hard_tasks=True,
        ),
        Algorithm(
            "reptile",
            "arXiv 1803.02999",
            "a step towards the mean of the models that tasks lead to; task arithmetic over these",
            kind="reptile",
            rate=0.5,
            clip=0.0,
            optimizer="sgd",
            first_order=True,
        ),
        Algorithm(
            "proto",
            "arXiv 1703.05175",
            "classes by the nearest mean of their vectors; no inner steps",
            kind="metric",
            tasks=("classification",),
        ),
        Algorithm(
            "relation",
            "arXiv 1711.06025",
            "classes by a learned comparison of vectors; no inner steps",
            kind="metric",
            tasks=("classification",),
        ),
    )
}
