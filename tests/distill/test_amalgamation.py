"""Several teachers as one: features that teachers read in place of their own, and phases that train one part each."""

from __future__ import annotations

import pytest
import torch
from helpers_distill import SHAPE, some_images
from torch import Tensor, nn

from mergekit_lfm.distill.amalgam import Amalgam
from mergekit_lfm.distill.amalgamation import Amalgamation, first_on_scores, plan_phases, shared_sizes
from mergekit_lfm.distill.generation import Generation
from mergekit_lfm.distill.generators import build
from mergekit_lfm.distill.making import Making
from mergekit_lfm.distill.passes import Observer, class_count, frozen
from mergekit_lfm.distill.stack import Stack, features_at, find_cuts, replacing
from mergekit_lfm.distill.synthesise import synthesise
from mergekit_lfm.errors import PlanError

TERMS = {"one_hot": 1.0, "activation": 0.1, "balance": 5.0}


def net(width: int, classes: int, seed: int) -> nn.Sequential:
    """Layers of 8 x 8 and of 4 x 4, and a head of two linear layers."""
    return build(
        lambda: nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * width, 8), nn.ReLU(), nn.Linear(8, classes),
        ),
        seed,
    ).eval()  # fmt: skip


def test_scores_of_an_amalgam_stand_side_by_side() -> None:
    first, second, images = net(4, 3, 0), net(6, 2, 1), some_images(5)
    both = Amalgam([first, second]).eval()
    assert torch.equal(both(images), torch.cat([first(images), second(images)], 1)) and class_count(both) == 5
    seen = Observer(both, frozenset(["activation"])).see(images)
    assert seen.get("features").shape == (5, 16)


def test_a_teacher_that_reads_its_own_features_says_the_same_as_of_the_images() -> None:
    teacher, images = net(4, 3, 0), some_images(5)
    cuts = find_cuts(teacher, images)
    assert {size: channels for size, (_, channels) in cuts.items()} == {(8, 8): 4, (4, 4): 8}
    assert cuts[8, 8][0] is teacher[2] and cuts[4, 4][0] is teacher[5]
    for cut, _ in cuts.values():
        own = features_at(teacher, cut, images, {})
        with replacing({cut: own}):
            assert torch.equal(teacher(torch.zeros_like(images)), teacher(images))


def test_phases_follow_each_other_and_leave_rounds_to_the_student() -> None:
    phases = plan_phases(40, 2)
    assert [(phase.kind, phase.number) for phase in phases] == [
        ("group", 0), ("group", 1), ("joint", 0), ("block", 1), ("block", 0),
    ]  # fmt: skip
    assert [phase.start for phase in phases] == [0, *(phase.end for phase in phases[:-1])] == [0, 4, 8, 20, 24]
    assert phases[-1].end == first_on_scores(40) == 28


def test_each_phase_trains_its_part_alone() -> None:
    """Groups from small to large features, all of them, and the student's blocks from the image on; never a teacher."""
    both, student = Amalgam([net(4, 3, 0), net(6, 2, 1)]).eval(), net(3, 5, 2)
    sizes = shared_sizes(both, student, SHAPE)
    assert sizes == [(4, 4), (8, 8)]
    stack = build(lambda: Stack(SHAPE, sizes), 0)
    options = Generation(rounds=40, batch_size=6, stacked=True)
    with frozen([both]):
        observer = Observer(both, frozenset(TERMS))
        work = Amalgamation(observer, student, stack, TERMS, options, 0, Making())
        changed = list[set[str]]()
        for phase in work.phases:
            before = state(stack, student, both)
            line = work.round(phase.start, [torch.randn(6, 32)])
            changed.append(
                {name for name, x in state(stack, student, both).items() if not torch.equal(x, before[name])}
            )
            assert all(torch.isfinite(torch.tensor(x)) for x in line.values())
    first, second, whole, early, late = changed
    assert all(name.startswith("stack.groups.0") for name in first) and "stack.groups.0.0.0.weight" in first
    assert all(name.startswith("stack.groups.1") for name in second) and second
    assert {name.split(".")[1] for name in whole} == {"groups", "last"}
    assert early == {"student.0.weight", "student.0.bias", "student.1.weight", "student.1.bias"}
    assert late == {"student.4.weight", "student.4.bias"}


def state(stack: nn.Module, student: nn.Module, both: nn.Module) -> dict[str, Tensor]:
    modules = {"stack": stack, "student": student, "both": both}
    return {f"{name}.{own}": x.clone() for name, each in modules.items() for own, x in each.named_parameters()}


def test_models_without_layers_of_a_common_size_are_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(PlanError, match="no layers of the teachers and the student have outputs of the same height"):
        synthesise([net(4, 3, 0), net(6, 2, 1)], flat, "amalgamation", SHAPE)
