"""The contract of all presets without data: finite images and a student, the same bytes if each step is interrupted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_distill import SHAPE, facts_about, small

from mergekit_lfm.distill.image_terms import TERMS
from mergekit_lfm.distill.making import Making
from mergekit_lfm.distill.synthesise import Given, Synthesis, synthesise
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.recipe.synthesise_presets import DESCRIBED, PRESETS, find_preset


class Interrupted(Making):
    """A making that is interrupted after each step."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, "request", Pauses(every_s=0, saving_share=math.inf))

    def add(self, line: Mapping[str, float], **memory: torch.Tensor) -> None:
        super().add(line, **memory)
        raise KeyboardInterrupt


def run_with_interruptions(name: str, place: Path) -> tuple[Synthesis, torch.Tensor, int]:
    """The same as `run` by many runs, of one step each; and how many were interrupted."""
    for count in range(100):
        try:
            return *run(name, making=Interrupted(place)), count
        except KeyboardInterrupt:
            continue
    raise AssertionError("it does not end")


def run(name: str, *, norm: bool = True, seed: int = 0, making: Making | None = None) -> tuple[Synthesis, torch.Tensor]:
    """A short run of a preset, and the numbers of its student."""
    teacher, student = small(0, norm), small(1)
    before = [x.clone() for x in teacher.state_dict().values()]
    row = replace(PRESETS[name], rounds=min(2, PRESETS[name].rounds))
    settings: dict[str, Any] = {"count": 13, "student_steps": 4}
    if row.family == "pixels":
        settings["inversion"] = {"steps": 2}
    if row.family == "generator":
        rounds = 10 if name == "amalgamation" else 2  # three of the ten are on scores
        settings = {"generation": {"rounds": rounds, "generator_steps": 2, "student_steps": 2, "batch_size": 12}}
    given, learning = facts_about(teacher), {"batch_size": 8}
    how: dict[str, Any] = {"given": given, "seed": seed, "learning": learning, "making": making}
    made = synthesise(teacher, student, row, SHAPE, **how, **settings)
    assert len(made.samples.images) == 13 or row.family == "generator"
    assert all(torch.equal(x, y) for x, y in zip(before, teacher.state_dict().values(), strict=True))
    assert all(x.requires_grad for x in (*teacher.parameters(), *student.parameters()))
    return made, torch.cat([x.flatten().float() for x in student.state_dict().values()])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_the_same_finite_results_if_it_is_interrupted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    (first, student), untouched = run(name), torch.rand(1)
    torch.manual_seed(2)
    second, again, interruptions = run_with_interruptions(name, tmp_path)
    torch.manual_seed(1)
    assert torch.equal(untouched, torch.rand(1))  # torch's own random numbers have no part in it
    assert torch.equal(first.samples.images, second.samples.images) and torch.equal(student, again)
    assert first.record == second.record and first.losses == second.losses
    images = first.samples.images
    assert images.shape[1:] == SHAPE and float(images.min()) >= 0 and float(images.max()) <= 1
    assert bool(student.isfinite().all()) and len(first.losses) in (2, 3, 4) and interruptions >= 2
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
    once = replace(PRESETS["adi"], name="own", terms={"one_hot": 1.0, "adversarial_kl": 1.0}, rounds=1)
    with pytest.raises(PlanError, match="own has adversarial_kl and one round; expected two"):
        synthesise(small(), small(1), once, SHAPE)
    twice = replace(once, rounds=2)  # any comparing term waits for the second round
    options: dict[str, Any] = {"count": 4, "student_steps": 2, "inversion": {"steps": 1}}
    assert [*map(len, synthesise(small(), small(1), twice, SHAPE, **options).record)] == [1, 2]
    with pytest.raises(PlanError, match=r"count is 7; expected at least 8, as adi makes images in 4 rounds"):
        synthesise(small(), small(1), "adi", SHAPE, count=7)


def test_arguments_that_a_family_does_not_read_are_refused() -> None:
    given = facts_about(small())
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("dfq", {"count": 4, "inversion": {"steps": 1}}, "dfq does not read count, inversion; leave that out"),
        ("deepinversion", {"generation": {"rounds": 1}}, "deepinversion does not read generation"),
        ("dfnd", {"inversion": {"stps": 1}}, "dfnd does not read inversion"),
        ("deepinversion", {"inversion": {"stps": 1}}, "did you mean steps"),
        ("dfnd", {"learning": {"batchsize": 1}}, "did you mean batch_size"),
        ("deepinversion", {"learning": {"memory": "replay"}}, "found the memory 'replay'"),
        ("cmi", {"learning": {"memory": "replay"}}, "learned latents with the memory"),
    ]
    for name, arguments, words in cases:
        with pytest.raises(PlanError, match=words):
            synthesise(small(), small(1), name, SHAPE, given=given, **arguments)
    with pytest.raises(PlanError, match="does not read student_steps without a student"):
        synthesise(small(), None, "deepinversion", SHAPE, student_steps=3)
    with pytest.raises(PlanError, match="did you mean rounds"):
        synthesise(small(), small(1), "dfq", SHAPE, generation={"round": 3})
