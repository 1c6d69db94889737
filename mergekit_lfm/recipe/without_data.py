"""Ways to an initialisation from models without their data, as declarations. `meta` has the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TRAINED = ("steps", "learning_rate")  # and the seed
EPISODES = ("shots", "queries", "inner_steps", "inner_rate", "batch_size", "images", "image_steps", "image_rate")
FORM = ("size", "low", "high")


@dataclass(frozen=True, slots=True)
class WithoutData:
    """A way to an initialisation from models alone. reads: the keys that it reads; rate: of its steps by default.

    alike: the models have the same tensors as MODEL; else they are classifiers of the same images.
    """

    name: str
    source: str
    summary: str
    reads: tuple[str, ...] = ()
    rate: float = 1e-3
    alike: bool = False


WITHOUT_DATA: Mapping[str, WithoutData] = {
    row.name: row
    for row in (
        WithoutData("average", "Wortsman et al. 2022, arXiv 2203.05482", "the mean of the teachers", alike=True),
        WithoutData(
            "dro",
            "Wang et al. 2022, UAI",
            "a network from embeddings of tasks to weights, at the worst embeddings in a Wasserstein ball",
            (*TRAINED, "radius"),
            1e-2,
            alike=True,
        ),
        WithoutData(
            "purer",
            "arXiv 2303.11183",
            "MAML over images that the teachers' gradients make, and that become harder as it learns",
            (*TRAINED, *EPISODES, *FORM, "curriculum"),
        ),
        WithoutData(
            "bidf",
            "arXiv 2305.18413",
            "MAML over images and probabilities of teachers that can only be asked",
            (*TRAINED, *EPISODES, *FORM, "directions"),
        ),
    )
}
