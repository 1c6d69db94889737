"""Algorithms of meta-learning, as declarations: `algorithm: maml`. `meta` has the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mergekit_lfm.methods.method import Parameter
from mergekit_lfm.recipe.training import Optimizer

# "edits": a task is to change some answers and no other; "stream": tasks come one after the other.
Kind = Literal["gradient", "reptile", "metric", "edits", "stream"]
TASKS = ("classification", "embedding", "lm", "regression")  # for which there are episodes


@dataclass(frozen=True, slots=True)
class Algorithm:
    """An algorithm that makes an initialisation from episodes.

    kind: the code that does it. rate, clip: of the outer steps, by default; None for those of the tuning method.
    optimizer: of these. first_order: the slopes of inner steps are constants. head_only: these move the head alone.
    learns_rates: a rate for each number of the model is learned with it. scales: the model stays, but for factors and
    shifts of its channels, and the head. hard_tasks: half of a step's episodes are of the classes with the largest
    losses. learns_steps: the rule of the inner steps is learned, for as many as they are. named: classes have names,
    whose vectors are compared with. own_file: what is learned beside the model has a file. crosses: a task is judged by
    another one, too. whole: a step depends on all its tasks at once, or on the step before, so that it is not cut into
    parts. inner_steps, inner_rate: of adapting, by default. parameters: of the algorithm alone.
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
    learns_steps: bool = False
    named: bool = False
    own_file: bool = False
    crosses: bool = False
    whole: bool = False
    inner_steps: int = 5
    inner_rate: float = 0.1
    parameters: tuple[Parameter, ...] = ()

    @property
    def adapts(self) -> bool:
        """Whether there are inner steps."""
        return self.kind != "metric"


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
        Algorithm(
            "metasgd", "arXiv 1707.09835", "maml with a learned rate for each number", learns_rates=True, own_file=True
        ),
        Algorithm(
            "mtl",
            "arXiv 1812.02391",
            "factors and shifts of the channels of a trained model, which stays; inner steps move the head alone",
            tasks=("classification", "regression"),
            head_only=True,
            scales=True,
            hard_tasks=True,
            whole=True,
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
            own_file=True,
        ),
        Algorithm(
            "film",
            "arXiv 2307.04114",
            "classes by a learned comparison with the vectors of their names, which alone adapts; in recipes",
            tasks=("classification",),
            named=True,
            own_file=True,
        ),
        Algorithm(
            "meta_lstm",
            "Ravi and Larochelle 2017, ICLR, equations 2 to 5",
            "a learned network that makes the inner steps, number by number, from slopes and the loss",
            first_order=True,
            learns_steps=True,
            own_file=True,
            parameters=(Parameter("hidden", 20, kind="int", minimum=1, doc="numbers of the network's memory"),),
        ),
        Algorithm(
            "mgml",
            "Zhu and Li 2022, Neurocomputing",
            "the mean of groups, each led by fomaml through its own tasks, with an adaptive momentum",
            rate=1.0,
            clip=0.0,
            optimizer="sgd",
            first_order=True,
            whole=True,
            parameters=(
                Parameter("group_count", 2, kind="int", minimum=1, doc="groups of a step's tasks"),
                Parameter("group_rate", 0.1, above=0, doc="the rate of the steps that a group takes"),
            ),
        ),
        Algorithm(
            "continual",
            "arXiv 2003.05856",
            "fomaml on tasks as they come, met by fast weights that begin anew when the task has changed",
            kind="stream",
            first_order=True,
            whole=True,
            parameters=(
                Parameter("stay", 0.9, minimum=0, maximum=1, doc="how probably the task stays the same"),
                Parameter(
                    "threshold",
                    1.0,
                    above=0,
                    doc="the fall of the loss that tells a new task, with which fast weights begin anew",
                ),
                Parameter("smoothing", 1.0, above=0, doc="how soon a loss counts fully for the slow weights"),
            ),
        ),
        Algorithm(
            "editable",
            "arXiv 2004.00345",
            "a model that keeps its task, and few steps change some answers and no others",
            kind="edits",
            tasks=("classification", "lm"),
            parameters=(
                Parameter("edit_weight", 1.0, minimum=0, doc="the weight of answers that are to change"),
                Parameter("locality_weight", 1.0, minimum=0, doc="the weight of answers that are to stay"),
            ),
        ),
        Algorithm(
            "gram",
            "arXiv 2303.06571",
            "maml with a learned gate for slopes, judged by the next task too; for prompts",
            crosses=True,
            own_file=True,
            whole=True,
        ),
    )
}
