"""Published ways to distil without data, as rows: weights of terms, and options. `distill` carries one out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergekit_lfm.errors import PlanError, did_you_mean

Family = Literal["pixels", "generator", "wild"]

# Facts that a term is about, which a caller has to give; BatchNorm is in the teacher, or is not.
NEEDS: Mapping[str, str] = {"bn": "batch_norm", "records": "records", "clusters": "clusters", "proxy": "proxy"}
DESCRIBED: Mapping[str, str] = {
    "batch_norm": "a teacher with BatchNorm, or records of its layers, which take its place",
    "records": "records of the teacher's layers on its data, from a file of `mergekit-lfm stats gram`",
    "clusters": "clusters of the teacher's features on some of its data",
    "proxy": "images of another kind than the teacher's data",
    "wild": "images of any kind to choose from",
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A published way. family: images are optimised ("pixels"), generated, or chosen ("wild").

    terms: their weights. inversion, generation, learning: options of those names that differ from the defaults. rounds:
    how often images are made with the student of that time, between which it learns.
    """

    name: str
    source: str
    summary: str
    family: Family
    terms: Mapping[str, float] = field(default_factory=dict)
    inversion: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    learning: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1

    @property
    def needs(self) -> tuple[str, ...]:
        """The facts that it needs besides a teacher, by the names of `DESCRIBED`."""
        wild = ("wild",) if self.family == "wild" else ()
        return (*(NEEDS[name] for name in self.terms if name in NEEDS), *wild)

    @property
    def needs_student(self) -> bool:
        """Whether a student takes part in making the images, or in choosing among them."""
        return self.family != "pixels" or self.rounds > 1


PIXELS = (
    Preset(
        "lopes",
        "Lopes et al. 2017, arXiv 1710.07535",
        "images whose activations have the means and covariances recorded on the data",
        "pixels",
        {"records": 1.0, "one_hot": 0.1},
    ),
    Preset(
        "dream_distillation",
        "Bhardwaj et al. 2019, arXiv 1905.07072",
        "images whose features are points near the centres of clusters of real ones",
        "pixels",
        {"clusters": 1.0, "total_variation": 0.1},
    ),
    Preset(
        "zskd",
        "Nayak et al. 2019, arXiv 1905.08114",
        "images for soft targets, drawn by the similarity of classes in the last layer",
        "pixels",
        {"impressions": 1.0},
        inversion={"targets": "impressions"},
    ),
    Preset(
        "deepdream",
        "Mordvintsev et al. 2015, Inceptionism; the prior as in arXiv 1912.08795",
        "images of a class, smooth and small",
        "pixels",
        {"one_hot": 1.0, "total_variation": 1.0, "l2": 0.1},
    ),
    Preset(
        "deepinversion",
        "Yin et al. 2019, arXiv 1912.08795",
        "images of a class whose activations have BatchNorm's statistics",
        "pixels",
        {"one_hot": 1.0, "bn": 3.0, "total_variation": 0.1, "l2": 0.01},
    ),
    Preset(
        "adi",
        "Yin et al. 2019, arXiv 1912.08795 (adaptive)",
        "DeepInversion, with images on which the student of that time disagrees with the teacher",
        "pixels",
        {"one_hot": 1.0, "bn": 3.0, "competition": 1.0, "total_variation": 0.1, "l2": 0.01},
        rounds=4,
    ),
    Preset(
        "cake",
        "Braun et al. 2024, arXiv 2306.02090",
        "images of two classes drawn towards the border between them, with noise",
        "pixels",
        {"one_hot": 1.0, "boundary": 0.1, "total_variation": 0.1},
        inversion={"noise": 1e-3},
    ),
)

GENERATORS = (
    Preset(
        "dafl",
        "Chen et al. 2019, arXiv 1904.01186",
        "a generator of images that the teacher is sure of, of all classes, with large activations",
        "generator",
        {"one_hot": 1.0, "activation": 0.1, "balance": 5.0},
    ),
    Preset(
        "kegnet",
        "Yoo et al. 2019, Knowledge Extraction with No Observable Data, NeurIPS",
        "a generator of images of given classes, from which a decoder finds the latent numbers again",
        "generator",
        {"one_hot": 1.0, "decoder": 1.0, "spread": 1.0},
        generation={"conditional": True},
    ),
    Preset(
        "degan",
        "Addepalli et al. 2019, arXiv 1912.11960",
        "a generator of images that look like other data, and are of one class each, and of all",
        "generator",
        {"proxy": 1.0, "certainty": 0.5, "balance": 5.0},
    ),
    Preset(
        "rdskd",
        "Han et al. 2020, arXiv 2011.03749",
        "a generator of unlike images, of all classes; losses that rise count exponentially",
        "generator",
        {"one_hot": 1.0, "balance": 1.0, "diversity": 1.0},
        generation={"exponential": ("one_hot", "balance")},
    ),
    Preset(
        "zskt",
        "Micaelli and Storkey 2019, arXiv 1905.09768",
        "a generator of images on which student and teacher differ, by KL; without attention transfer",
        "generator",
        {"adversarial_kl": 1.0},
    ),
    Preset(
        "dfad",
        "Fang et al. 2019, arXiv 1912.11006",
        "a generator of images on which student and teacher differ, by the scores' absolute difference",
        "generator",
        {"adversarial_mae": 1.0},
        learning={"divergence": "mae"},
    ),
    Preset(
        "dfq",
        "Choi et al. 2020, arXiv 2005.04136",
        "BatchNorm's statistics, sure and balanced classes, and images on which student and teacher differ",
        "generator",
        {"bn": 1.0, "one_hot": 0.1, "balance": 1.0, "adversarial_kl": 1.0},
        learning={"memory": "replay"},
    ),
    Preset(
        "cmi",
        "Fang et al. 2021, arXiv 2105.08584",
        "batches from new generators, unlike each other and all earlier ones by a contrast of features",
        "generator",
        {"bn": 1.0, "one_hot": 0.5, "adversarial_kl": 0.5, "contrast": 0.5},
        generation={"outer": "fresh", "latents": "learned", "rounds": 24, "generator_steps": 50, "student_steps": 50},
    ),
    Preset(
        "fastdfkd",
        "Fang et al. 2022, arXiv 2112.06253",
        "batches in a few steps from a generator that Reptile makes quick to adapt",
        "generator",
        {"bn": 1.0, "one_hot": 0.5, "adversarial_kl": 0.5},
        generation={"outer": "reptile", "latents": "learned", "rounds": 120, "generator_steps": 5, "student_steps": 10},
    ),
    Preset(
        "retain",
        "Patel et al. 2023, arXiv 2302.14290",
        "DFAD's generator, and a student whose steps on new images must serve remembered ones as well",
        "generator",
        {"adversarial_mae": 1.0, "one_hot": 0.1, "balance": 1.0},
        learning={"divergence": "mae", "memory": "meta"},
    ),
    Preset(
        "robust",
        "Wang et al. 2023, arXiv 2303.11611",
        "DFQ's generator, and a student that learns, on attacked images, the teacher's answers to those before",
        "generator",
        {"bn": 1.0, "one_hot": 0.1, "balance": 1.0, "adversarial_kl": 1.0},
        learning={"memory": "replay", "attack": 0.1},
    ),
)

AMALGAMATION = (
    Preset(
        "amalgamation",
        "Ye et al. 2020, Group-Stack Dual-GAN, arXiv 2003.09088",
        "groups of a generator, then blocks of the student, trained against the last layers of several teachers",
        "generator",
        {"one_hot": 1.0, "activation": 0.1, "balance": 5.0},
        generation={"stacked": True, "generator_steps": 4, "student_steps": 10},
    ),
)

WILD = (
    Preset(
        "dfnd",
        "Chen et al. 2021, Learning Student Networks in the Wild, CVPR",
        "images of any kind that the teacher is surest of, and a matrix of how its labels may err",
        "wild",
        learning={"noise_matrix": True},
    ),
)

PRESETS: Mapping[str, Preset] = {row.name: row for row in (*PIXELS, *GENERATORS, *AMALGAMATION, *WILD)}


def check_needs(row: Preset, present: Mapping[str, bool], *, student: bool) -> None:
    """Raise PlanError with all that a preset needs and that is not there. present: by the names of `DESCRIBED`."""
    lacking = [DESCRIBED[name] for name in row.needs if not present[name]]
    if row.needs_student and not student:
        lacking.append("a student, which takes part in making the images")
    if lacking:
        raise PlanError(f"{row.name} needs {'; and '.join(lacking)}. Give it, or choose another preset")


def find_preset(name: str) -> Preset:
    """The row of this name. Raises PlanError for another."""
    if name not in PRESETS:
        raise PlanError(f"found the preset {name!r}; expected {', '.join(PRESETS)}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]
