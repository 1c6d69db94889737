"""One student of two teachers without data: digits 0 to 4 and 5 to 9 of scikit-learn, each teacher with five classes.

    python benchmarks/amalgamation.py                    # three seeds: 20 minutes on one core
    python benchmarks/amalgamation.py --presets amalgamation dafl --seeds 0

A number is the student's accuracy in percent on 450 images of all ten digits, the mean over seeds ± the standard
deviation. The student learns the scores of both teachers side by side: of its training images, of uniform noise, of
images that a preset makes for both teachers at once, or of those of two generators, one for each teacher, in one pool.
Networks and steps are those of `data_free.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from data_free import SHAPE, STEPS, Data, Net, fit, judge, load, new_student, on_noise, table
from torch import Tensor, nn

from mergekit_lfm.distill.amalgam import Amalgam
from mergekit_lfm.distill.generate import generate
from mergekit_lfm.distill.generation import Generation
from mergekit_lfm.distill.generators import Generator, build
from mergekit_lfm.distill.learner import Learner, Learning, learn
from mergekit_lfm.distill.passes import scores_in_parts
from mergekit_lfm.distill.synthesise import synthesise
from mergekit_lfm.recipe.synthesise_presets import PRESETS

HALVES = (range(5), range(5, 10))
POOLED = 2048  # images of each generator
JOINT, APART = ("amalgamation", "dafl", "dfq"), ("dafl", "dfq")


class Half(nn.Module):
    """A net of `data_free.py` with five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net((16, 32), 64, True)
        self.net.layers[-1] = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """The scores [n, 5]."""
        out: Tensor = self.net(x)
        return out


def teach(data: Data, digits: range, seed: int, epochs: int = 30) -> Half:
    """A teacher of these digits alone."""
    images, labels = data.train
    own = (labels >= digits.start) & (labels < digits.stop)
    return fit(build(Half, seed), (images[own], labels[own] - digits.start), seed, epochs)


def study(teacher: nn.Module, student: Net, images: Tensor, seed: int) -> None:
    """Train a student on the teachers' scores of images."""
    learn(Learner(student, 10, Learning(), STEPS, seed), (images, scores_in_parts(teacher, images, 256)), STEPS)


def pool(teachers: Sequence[nn.Module], name: str, seed: int) -> Tensor:
    """Images of a generator for each teacher, each trained by a preset, `dfq` beside a student of its own."""
    row, made = PRESETS[name], list[Tensor]()
    for number, teacher in enumerate(teachers):
        generator = build(lambda: Generator(SHAPE), seed)
        own, options = build(Half, 100 + seed), Generation(**row.generation, student_steps=1 if name == "dfq" else 0)
        generate(teacher, own, generator, row.terms, options=options, learning=Learning(**row.learning), seed=seed)
        latents = torch.Generator().manual_seed(1000 * seed + number)
        with torch.no_grad():
            drawn = torch.randn(POOLED, generator.latent, generator=latents)
            made += [generator(part) for part in torch.split(drawn, 128)]
    return torch.cat(made)


def measure(data: Data, seed: int, joint: Sequence[str], apart: Sequence[str]) -> dict[str, float]:
    """The accuracies of one seed, by name."""
    teachers = [teach(data, digits, seed) for digits in HALVES]
    both, found = Amalgam(teachers).eval(), dict[str, float]()

    def note(name: str, student: nn.Module, began: float) -> None:
        found[name] = judge(student, data)
        print(f"# {name} {seed} {found[name]:.1f} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    note("both teachers side by side", both, time.monotonic())
    student, began = new_student(seed), time.monotonic()
    study(both, student, data.train[0], seed)
    note("KD on the data", student, began)
    student, began = new_student(seed), time.monotonic()
    on_noise(both, student, seed, STEPS, False)  # type: ignore[arg-type]
    note("KD on noise", student, began)
    for name in joint:
        student, began = new_student(seed), time.monotonic()
        synthesise(teachers, student, name, SHAPE, seed=seed)
        note(f"`{name}`", student, began)
    for name in apart:
        student, began = new_student(seed), time.monotonic()
        study(both, student, pool(teachers, name, seed), seed)
        note(f"`{name}`, a pool of two", student, began)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=[*JOINT], choices=[*PRESETS], help="for both teachers at once")
    parser.add_argument("--pools", nargs="*", default=[*APART], choices=[*APART], help="for a generator each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[default: 0 1 2]")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load()
    scores: list[Mapping[str, float]] = [measure(data, seed, chosen.presets, chosen.pools) for seed in chosen.seeds]
    print(table({"all ten digits": scores}))


if __name__ == "__main__":
    main()
