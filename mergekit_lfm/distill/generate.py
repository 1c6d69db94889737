"""`generate`: a generator makes images for a teacher and a student, and the student learns from them, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.amalgamation import Amalgamation, first_on_scores
from mergekit_lfm.distill.bank import Bank
from mergekit_lfm.distill.generation import Generation
from mergekit_lfm.distill.generators import Generator, Reader, build, renew
from mergekit_lfm.distill.image_terms import COMPARING, TERMS, check_finite, check_terms
from mergekit_lfm.distill.impressions import draw_classes
from mergekit_lfm.distill.learner import Learner, Learning
from mergekit_lfm.distill.making import Making
from mergekit_lfm.distill.passes import Moments, Observer, Pass, class_count, frozen, heads_of, scores_in_parts
from mergekit_lfm.distill.samples import Samples
from mergekit_lfm.distill.stack import Stack
from mergekit_lfm.errors import PlanError
from mergekit_lfm.train.examples import seed_of
from mergekit_lfm.train.loop import Tell

PROJECTED = 32  # numbers of the head by which CMI compares features


@dataclass(frozen=True)
class Generated:
    """The last images that a generator made, and a line for each round: the terms, and the student's loss."""

    samples: Samples
    record: tuple[Mapping[str, float], ...]


def generate(
    teacher: nn.Module,
    student: nn.Module,
    generator: Generator | Stack,
    terms: Mapping[str, float],
    *,
    options: Generation | None = None,
    learning: Learning | None = None,
    records: Mapping[str, Moments] | None = None,
    proxy: Tensor | None = None,
    seed: int = 0,
    tell: Tell | None = None,
    making: Making | None = None,
) -> Generated:
    """Train a generator so that the weighted sum of terms is small on its images, and a student on these, in turn.

    Both are trained in place; the teacher runs in evaluation mode and stays as it is. proxy: images of another kind,
    for the term of that name. making: what the rounds are part of, else they are all. One seed gives the same student,
    on the same machine with as many threads. Raises PlanError for unknown terms, terms without their facts, and losses
    that are not finite.
    """
    options, learning = options or Generation(), learning or Learning()
    check_terms(terms)
    if "proxy" in terms and proxy is None:
        raise PlanError("the term proxy needs images of another kind; give them, or leave it out")
    if options.latents == "learned" and learning.memory != "none":
        raise PlanError(
            f"found learned latents with the memory {learning.memory!r}; expected none, as the student learns from a "
            "bank of all images. Leave it out"
        )
    making = making or Making()
    work = _Work(teacher, student, generator, terms, options, learning, records, proxy, seed, making)
    with frozen([teacher]):
        for number in range(options.rounds):
            if making.is_done():
                work.learner.done += work.steps_of(number)
                continue
            line = work.round(number)
            making.add(line, **work.memory())
            if tell is not None:
                tell(number + 1, options.rounds, line)
        student.eval()
        images = work.bank.images if options.latents == "learned" else work.images("last", 0)
    return Generated(Samples(images, scores_in_parts(teacher, images, options.batch_size)), tuple(making.record))


class _Work:
    """The networks of one run, their optimizers, and the bank of images."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: Generator | Stack,
        terms: Mapping[str, float],
        options: Generation,
        learning: Learning,
        records: Mapping[str, Moments] | None,
        proxy: Tensor | None,
        seed: int,
        making: Making,
    ) -> None:
        self.teacher, self.student, self.generator = teacher, student, generator
        self.terms, self.options, self.proxy, self.seed, self.making = terms, options, proxy, seed, making
        self.device = next(teacher.parameters()).device
        width = sum(head.in_features for head in heads_of(teacher))
        self.classes = class_count(teacher)
        pixels, steps = (generator.low, generator.high), sum(map(self.steps_of, range(options.rounds)))
        self.learner = Learner(student, self.classes, learning, steps, seed, pixels)
        self.observer = Observer(teacher, frozenset(terms), student if set(COMPARING) & terms.keys() else None, records)
        self.features = Observer(teacher, frozenset(["contrast"]))  # of images, and nothing else
        self.bank = Bank(options.bank)
        self.before = dict[str, Tensor]()  # the values of exponential terms in the step before
        shape = generator.shape
        readers = {"decoder": generator.latent, "proxy": 1}
        self.readers = {
            name: build(partial(Reader, shape, outputs), seed_of(seed, name)).to(self.device)
            for name, outputs in readers.items()
            if name in terms
        }
        self.head = build(lambda: nn.Linear(width, PROJECTED), seed_of(seed, "head")).to(self.device)
        self.optimizer = self._optimizer([])
        self.amalgamation = None
        if isinstance(generator, Stack):
            self.amalgamation = Amalgamation(self.observer, student, generator, terms, options, seed, making)
        critics = [x for name, reader in self.readers.items() if name == "proxy" for x in reader.parameters()]
        self.critic = torch.optim.Adam(critics, lr=options.learning_rate) if critics else None
        self._join()

    def _join(self) -> None:
        """Be kept in the state of the making, and take what it remembers of earlier rounds."""
        self.learner.join(self.making)
        for name, module in {"generator": self.generator, "head": self.head, **self.readers}.items():
            self.making.hold(name, module, *([self.critic] if name == "proxy" and self.critic else []))
        memory = {name: x.to(self.device) for name, x in self.making.memory.items()}
        if "images" in memory:
            self.bank.add(memory.pop("images"), memory.pop("scores"))
        self.before = memory

    def memory(self) -> dict[str, Tensor]:
        """The tensors that later rounds need besides the networks: the bank, and the values of terms."""
        banked = {"images": self.bank.images, "scores": self.bank.scores} if len(self.bank) else {}
        return {**banked, **self.before}

    def _optimizer(self, latents: list[Tensor]) -> torch.optim.Optimizer:
        """Adam of all that is trained to make images."""
        decoder = [*self.readers["decoder"].parameters()] if "decoder" in self.readers else []
        head = [*self.head.parameters()] if "contrast" in self.terms else []
        groups: list[dict[str, Any]] = [{"params": [*self.generator.parameters(), *decoder, *head]}]
        groups += [{"params": latents, "lr": 5 * self.options.learning_rate}] if latents else []
        optimizer = torch.optim.Adam(groups, lr=self.options.learning_rate, betas=(0.5, 0.999))
        self.making.forget(*(x for group in groups for x in group["params"]))
        self.making.share(optimizer)
        return optimizer

    def draw(self, *facts: object) -> tuple[Tensor, Tensor]:
        """Latent numbers, with those for classes if the generator has some; and the classes."""
        own = seed_of(self.seed, *facts)
        size = (self.options.batch_size, self.generator.latent)
        latents = torch.randn(size, generator=torch.Generator().manual_seed(own))
        classes = draw_classes(size[0], self.classes, own)
        if self.generator.classes:
            latents = torch.cat([latents, nn.functional.one_hot(classes, self.classes).to(latents.dtype)], 1)
        return latents.to(self.device), classes.to(self.device)

    def images(self, *facts: object) -> Tensor:
        """Images of new latent numbers, without gradients."""
        with torch.no_grad():
            made: Tensor = self.generator(self.draw(*facts)[0])
        return made

    def steps_of(self, number: int) -> int:
        """The student's steps in a round."""
        stacked = isinstance(self.generator, Stack)
        return self.options.student_steps if not stacked or number >= first_on_scores(self.options.rounds) else 0

    def round(self, number: int) -> dict[str, float]:
        """A round; its line of the record."""
        line = self._make(number) if self.amalgamation is None else self._amalgamate(self.amalgamation, number)
        losses = [self._student_step(number, step) for step in range(self.steps_of(number))]
        return line | ({"student": sum(losses) / max(1, len(losses))} if losses or self.amalgamation is None else {})

    def _amalgamate(self, amalgamation: Amalgamation, number: int) -> dict[str, float]:
        """The steps of an amalgamation before the student learns from scores; the terms of the last one."""
        self.generator.train()
        first = first_on_scores(self.options.rounds)
        if number == first:
            amalgamation.end()
        if number >= first:
            return {}
        steps = range(self.options.generator_steps)
        return amalgamation.round(number, (self.draw("step", number, step)[0] for step in steps))

    def _make(self, number: int) -> dict[str, float]:
        """The generator's steps of a round; the terms of the last one."""
        learned, start = self.options.latents == "learned", dict[str, Tensor]()
        latents, classes = self.draw("round", number)
        if self.options.outer == "fresh":
            renew(self.generator, seed_of(self.seed, "generator", number))
        if self.options.outer == "reptile":
            start = {name: x.detach().clone() for name, x in self.generator.state_dict().items()}
        if learned or self.options.outer != "go_on":
            self.optimizer = self._optimizer([latents.requires_grad_()] if learned else [])
        self.generator.train()
        line = dict[str, float]()
        for step in range(self.options.generator_steps):
            if not learned:
                latents, classes = self.draw("step", number, step)
            line = self._generator_step(latents, classes, (number, step))
        if learned:
            with torch.no_grad():
                made = self.generator(latents)
            self.bank.add(made, scores_in_parts(self.teacher, made, len(made)))
            self.making.forget(latents)
        if start:
            move_towards(start, self.generator, self.options.outer_rate)
        return line

    def _generator_step(self, latents: Tensor, classes: Tensor, turn: tuple[int, int]) -> dict[str, float]:
        images = self.generator(latents)
        facts: dict[str, Any] = {"latents": latents[:, : self.generator.latent].detach()}
        if self.generator.classes or self.options.latents == "learned":
            facts["targets"] = classes
        if "decoder" in self.readers:
            facts["decoded"] = self.readers["decoder"](images)
        if "proxy" in self.readers:
            self._critic_step(images.detach(), turn)
            facts["judged"] = self.readers["proxy"](images).squeeze(-1)
        with frozen([self.student]):
            seen = self.observer.see(images, **facts)
            if "contrast" in self.terms:
                seen = self._with_views(seen, turn)
        values = {name: TERMS[name](seen) for name in self.terms}
        total = torch.stack([weight * self._counted(name, values[name]) for name, weight in self.terms.items()]).sum()
        check_finite(total, f"the generator's loss in round {turn[0] + 1}", self.options.learning_rate)
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in values.items()}

    def _counted(self, name: str, value: Tensor) -> Tensor:
        """A term's value as it counts in the sum."""
        if name not in self.options.exponential:
            return value
        last, self.before[name] = self.before.get(name, value.detach()), value.detach()
        return (value - last).exp()

    def _critic_step(self, made: Tensor, turn: tuple[int, int]) -> None:
        """Teach the critic to tell other data from generated images."""
        proxy, critic = self.proxy, self.readers["proxy"]
        assert proxy is not None and self.critic is not None
        chooser = torch.Generator().manual_seed(seed_of(self.seed, "proxy", *turn))
        chosen = torch.randint(len(proxy), (len(made),), generator=chooser)
        real = critic(proxy[chosen].to(self.device))
        loss = nn.functional.softplus(-real).mean() + nn.functional.softplus(critic(made)).mean()
        self.critic.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.critic.step()

    def _with_views(self, seen: Pass, turn: tuple[int, int]) -> Pass:
        """The pass with projected features: of the images, of copies moved by a pixel, and of images of the bank."""
        chooser = torch.Generator().manual_seed(seed_of(self.seed, "views", *turn))
        shifts = torch.randint(-1, 2, (2,), generator=chooser).tolist()
        copies = self.features.see(seen.images.roll(shifts, (-2, -1))).get("features")
        if len(self.bank):
            with torch.no_grad():
                others = self.features.see(self.bank.draw(len(seen.images), chooser)[0]).get("features")
        else:
            others = seen.get("features")[:0]
        return replace(seen, views=(self.head(seen.get("features")), self.head(copies), self.head(others)))

    def _student_step(self, number: int, step: int) -> float:
        """A step of the student: on images of the bank, or new ones, and remembered ones if it has a memory."""
        chooser = torch.Generator().manual_seed(seed_of(self.seed, "bank", number, step))
        if self.options.latents == "learned":
            return self.learner.step(self.bank.draw(self.learner.options.batch_size, chooser))
        images = self.images("student", number, step)
        new = images, scores_in_parts(self.teacher, images, len(images))
        if self.learner.options.memory == "none":
            return self.learner.step(new)
        remembered = self.bank.draw(len(images), chooser) if len(self.bank) else None
        if step == 0:
            self.bank.add(*new)
        return self.learner.step(new, remembered)


@torch.no_grad()
def move_towards(start: Mapping[str, Tensor], module: nn.Module, rate: float) -> None:
    """Reptile's outer step: the module's numbers become start + rate (its own - start), in place.

    That is task arithmetic of one model, with lambda = rate. Whole numbers, such as counts, stay as they are. Source:
    Nichol et al. 2018, arXiv 1803.02999, algorithm 1.
    """
    for name, x in module.state_dict().items():
        if x.is_floating_point():
            x.copy_(start[name] + rate * (x - start[name]))
