"""The contract of all presets without data: two steps give finite images and a student, the same bytes twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers_distill import SHAPE, facts_about, small

from mergekit_lfm.distill.image_terms import TERMS
from mergekit_lfm.distill.presets import DESCRIBED, PRESETS, find_preset
from mergekit_lfm.distill.synthesise import Given, Synthesis, synthesise
from mergekit_lfm.errors import PlanError


def run(name: str, *, norm: bool = True, seed: int = 0) -> tuple[Synthesis, torch.Tensor]:
    """A short run of a preset, and the numbers of its student."""
    teacher, student = small(0, norm), small(1)
    before = [x.clone() for x in teacher.state_dict().values()]
    made = synthesise(
        teacher,
        student,
        replace(PRESETS[name], rounds=min(2, PRESETS[name].rounds)),
        SHAPE,
        given=facts_about(teacher),
        count=12,
        student_steps=4,
        seed=seed,
        inversion={"steps": 2},
        generation={"rounds": 2, "generator_steps": 2, "student_steps": 2, "batch_size": 12},
        learning={"batch_size": 8},
    )
    assert all(torch.equal(x, y) for x, y in zip(before, teacher.state_dict().values(), strict=True))
    assert all(x.requires_grad for x in (*teacher.parameters(), *student.parameters()))
    return made, torch.cat([x.flatten().float() for x in student.state_dict().values()])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_the_same_finite_results_twice(name: str) -> None:
    torch.manual_seed(1)
    (first, student), untouched = run(name), torch.rand(1)
    torch.manual_seed(2)
    second, again = run(name)
    torch.manual_seed(1)
    assert torch.equal(untouched, torch.rand(1))  # torch's own random numbers have no part in it
    assert torch.equal(first.samples.images, second.samples.images) and torch.equal(student, again)
    assert first.record == second.record and first.losses == second.losses
    images = first.samples.images
    assert images.shape[1:] == SHAPE and float(images.min()) >= 0 and float(images.max()) <= 1
    assert bool(student.isfinite().all()) and len(first.losses) in (2, 4)
    assert not torch.equal(student, torch.cat([x.flatten().float() for x in small(1).state_dict().values()]))


def test_records_take_the_place_of_batch_norm() -> None:
    made, _ = run("deepinversion", norm=False)
    assert "records" in made.record[0] and "bn" not in made.record[0]


def test_rows_name_terms_that_exist_and_say_their_needs() -> None:
    for row in PRESETS.values():
        assert set(row.terms) <= set(TERMS) and set(row.needs) <= set(DESCRIBED)
        assert row.source and row.summary
        if row.needs:
            with pytest.raises(PlanError, match=f"{row.name} needs"):
                synthesise(small(norm=False), small(1), row, SHAPE, given=Given())
    with pytest.raises(PlanError, match="a student, which takes part"):
        synthesise(small(), None, "dfq", SHAPE)
    with pytest.raises(PlanError, match="did you mean kegnet"):
        find_preset("kegnett")
    with pytest.raises(PlanError, match="did you mean rounds"):
        synthesise(small(), small(1), "dfq", SHAPE, generation={"round": 3})
