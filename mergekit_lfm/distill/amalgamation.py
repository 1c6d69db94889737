"""A dual generator for several teachers: groups that make images, and the student's blocks against the same teachers.

The discriminators are the teachers' own last layers, which stay as they are: they read features of the generator, or of
the student, in place of their own. Source: Ye et al. 2020, arXiv 2003.09088.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mergekit_lfm.distill.amalgam import teachers_of
from mergekit_lfm.distill.generation import Generation
from mergekit_lfm.distill.generators import WIDTH, build
from mergekit_lfm.distill.image_terms import check_finite, weigh
from mergekit_lfm.distill.making import Making
from mergekit_lfm.distill.passes import Observer, Pass, heads_of
from mergekit_lfm.distill.stack import Filter, Size, Stack, features_at, find_cuts, replacing
from mergekit_lfm.errors import PlanError
from mergekit_lfm.train.examples import seed_of

GROUPS, JOINT, BLOCKS = 0.2, 0.3, 0.2  # shares of the rounds; the rest are the student's, on all scores
Cut = tuple[nn.Module, int]  # a module, and the channels of its outputs


class Phase(NamedTuple):
    """Rounds from `start` to before `end`, in which one part is trained: a group, all of them, or a block.

    number: that of the size that the features of the part have.
    """

    kind: str
    number: int
    start: int
    end: int


def plan_phases(rounds: int, sizes: int) -> list[Phase]:
    """The phases of so many rounds. sizes: of groups besides that of images, and of blocks besides the head."""
    shares = [("group", i, GROUPS / sizes) for i in range(sizes)] + [("joint", 0, JOINT)]
    shares += [("block", i, BLOCKS / sizes) for i in reversed(range(sizes))]
    phases, end, sum_ = list[Phase](), 0, 0.0
    for kind, number, share in shares:
        start, sum_ = end, sum_ + share
        end = round(rounds * sum_)
        phases.append(Phase(kind, number, start, end))
    return [*phases[:-1], phases[-1]._replace(end=first_on_scores(rounds))]


def first_on_scores(rounds: int) -> int:
    """The first round in which the student learns from all scores."""
    return round(rounds * (GROUPS + JOINT + BLOCKS))


def shared_sizes(teacher: nn.Module, student: nn.Module, shape: tuple[int, int, int]) -> list[Size]:
    """The sizes of layers that the teachers and the student have in common, smallest first. PlanError for none."""
    images = torch.zeros(2, *shape, device=next(teacher.parameters()).device)
    common = set.intersection(*({*find_cuts(model, images)} for model in (*teachers_of(teacher), student)))
    if not common:
        raise PlanError(
            "no layers of the teachers and the student have outputs of the same height and width; expected "
            "convolutions of some common size. Give others, or choose another preset"
        )
    return sorted(common)


class Amalgamation:
    """The rounds before the student learns from scores: of groups, of all groups, and of the student's blocks."""

    def __init__(
        self,
        observer: Observer,
        student: nn.Module,
        stack: Stack,
        terms: Mapping[str, float],
        options: Generation,
        seed: int,
        making: Making,
    ) -> None:
        self.observer, self.student, self.stack, self.terms = observer, student, stack, terms
        self.options, self.seed, self.making = options, seed, making
        self.phases = plan_phases(options.rounds, len(stack.sizes))
        device = next(observer.teacher.parameters()).device
        self.dummy = torch.zeros(options.batch_size, *stack.shape, device=device)
        student.eval()
        teachers = [find_cuts(each, self.dummy) for each in teachers_of(observer.teacher)]
        self.theirs = [[each[size] for each in teachers] for size in stack.sizes]
        self.mine = [find_cuts(student, self.dummy)[size] for size in stack.sizes]
        self.filters = build(self._make_filters, seed_of(seed, "filters")).to(device)
        self.blocks = self._find_blocks()
        making.hold("filters", self.filters)
        self._phase: Phase | None = None

    def _make_filters(self) -> nn.ModuleDict:
        """From the generator and from the student to each teacher, and from the generator to the student."""
        found = dict[str, nn.Module]()
        for i, (cuts, (_, mine)) in enumerate(zip(self.theirs, self.mine, strict=True)):
            found[f"generated-{i}"] = nn.ModuleList(Filter(WIDTH, channels) for _, channels in cuts)
            found[f"learned-{i}"] = nn.ModuleList(Filter(mine, channels) for _, channels in cuts)
            found[f"given-{i}"] = Filter(WIDTH, mine)
        return nn.ModuleDict(found)

    def _find_blocks(self) -> list[list[nn.Parameter]]:
        """The student's parameters behind the cut of the next larger size, up to that of each size."""
        trained = [x for x in self.student.parameters() if x.requires_grad]
        used = list[set[int]]()
        for cut, _ in self.mine:
            made = features_at(self.student, cut, self.dummy, {})
            slopes = torch.autograd.grad(made.sum(), trained, allow_unused=True)
            used.append({i for i, slope in enumerate(slopes) if slope is not None})
        before = [*used[1:], set[int]()]
        return [[trained[i] for i in sorted(own - less)] for own, less in zip(used, before, strict=True)]

    def end(self) -> None:
        """The student's parameters have no moments when it begins to learn from scores."""
        self.making.forget(*self.student.parameters())

    def round(self, number: int, draw: Iterable[Tensor]) -> dict[str, float]:
        """A round; its line of the record. draw: latent numbers, for each step."""
        phase = next(each for each in self.phases if number < each.end)
        if phase != self._phase:
            self._begin(phase, fresh=number == phase.start)
        line = dict[str, float]()
        for step, latents in enumerate(draw):
            with torch.random.fork_rng([]):
                torch.manual_seed(seed_of(self.seed, "amalgamation", number, step))  # for dropout
                loss, line = self._loss(phase, latents)
            check_finite(loss, f"the loss of {phase.kind} in round {number + 1}", self.options.learning_rate)
            slopes = torch.autograd.grad(loss, self.trained, allow_unused=True)
            for x, slope in zip(self.trained, slopes, strict=True):
                x.grad = slope
            self.optimizer.step()
            self.optimizer.zero_grad()
        return line

    def _begin(self, phase: Phase, *, fresh: bool) -> None:
        """The parameters of a phase, and their optimizer; a run that goes on keeps the moments."""
        self._phase = phase
        if phase.kind == "block":
            own = [*self._filters("learned", phase.number), *self._filters("given", phase.number + 1)]
            self.trained = [*self.blocks[phase.number], *own]
        else:
            every = range(len(self.stack.sizes)) if phase.kind == "joint" else [phase.number]
            part = self.stack if phase.kind == "joint" else self.stack.groups[phase.number]
            self.trained = [*part.parameters(), *(x for i in every for x in self._filters("generated", i))]
        if fresh:
            self.making.forget(*self.trained)
        self.optimizer = torch.optim.Adam(self.trained, lr=self.options.learning_rate, betas=(0.5, 0.999))
        self.making.share(self.optimizer)

    def _filters(self, kind: str, number: int) -> list[nn.Parameter]:
        name = f"{kind}-{number}"
        return [*self.filters[name].parameters()] if name in self.filters else []

    def _loss(self, phase: Phase, latents: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of a phase, and its terms."""
        if phase.kind == "block":
            loss = self._loss_of_block(phase.number, latents)
            return loss, {"block": float(loss.detach())}
        if phase.kind == "group":
            total, values = weigh(self.terms, self._see("generated", phase.number, self._last(latents, phase.number)))
        else:
            features = self.stack.features(latents)
            seen = self.observer.see(self.stack.draw(features))
            total, values = weigh(self.terms, seen)
            others = [self._see("generated", i, x).scores for i, x in enumerate(features)]
            values["groups"] = torch.stack([_apart(x, seen.scores) for x in others]).mean()  # equation 11
            total = total + values["groups"]
        return total, {name: float(value.detach()) for name, value in values.items()}

    def _last(self, latents: Tensor, number: int) -> Tensor:
        return self.stack.features(latents, number + 1)[-1]

    def _see(self, kind: str, number: int, features: Tensor) -> Pass:
        """The pass of the teachers that read these features in place of their own of that size: equations 4 and 12."""
        filters = [*self.filters[f"{kind}-{number}"].children()]
        with replacing({cut: own(features) for (cut, _), own in zip(self.theirs[number], filters, strict=True)}):
            return self.observer.see(self.dummy)

    def _loss_of_block(self, number: int, latents: Tensor) -> Tensor:
        """How far the teachers' answers to the student's features are from those to the images: equations 13 to 16.

        The block reads the student's own features of the images, and those that the generator has of that size.
        """
        with torch.no_grad():
            features = self.stack.features(latents)
            images = self.stack.draw(features)
            wanted = self.observer.see(images).scores
        given: list[dict[nn.Module, Tensor]] = [{}]
        if number + 1 < len(self.mine):
            given.append({self.mine[number + 1][0]: self.filters[f"given-{number + 1}"](features[number + 1])})
        self.student.train()
        made = [features_at(self.student, self.mine[number][0], images, each) for each in given]
        self.student.eval()
        scores = [self._see("learned", number, each).scores for each in made]
        return torch.stack([_apart(mine, theirs) for x in scores for mine, theirs in self._pairs(x, wanted)]).sum()

    def _pairs(self, *scores: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The scores of each teacher's classes, for all of these."""
        sizes = [head.out_features for head in heads_of(self.observer.teacher)]
        return zip(*(torch.split(x, sizes, -1) for x in scores), strict=True)


def _apart(scores: Tensor, wanted: Tensor) -> Tensor:
    """The mean cross-entropy of the wanted predictions by others."""
    return nn.functional.cross_entropy(scores, wanted.detach().softmax(-1))
