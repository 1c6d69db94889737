"""Making images by gradients: losses fall, seeds decide, and wrong requests are refused; samples as files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_distill import CLASSES, SHAPE, small, some_images

from mergekit_lfm.distill.impressions import draw_classes
from mergekit_lfm.distill.invert import Facts, Inversion, invert
from mergekit_lfm.distill.samples import Samples, draw_grid, save_samples
from mergekit_lfm.distill.wild import choose_wild
from mergekit_lfm.errors import PlanError
from mergekit_lfm.recipe.synthesise_presets import PRESETS
from mergekit_lfm.runtime.data import read_data

TERMS = PRESETS["deepinversion"].terms


def test_images_have_a_small_loss_and_their_seeds_bytes() -> None:
    teacher, course = small(), list[dict[str, float]]()

    def hear(_: int, __: int, values: Mapping[str, Any]) -> None:
        course.append(dict(values))

    options = Inversion(steps=60, batch_size=32)
    made = invert(teacher, TERMS, SHAPE, 40, options=options, seed=3, tell=hear)
    losses = [sum(TERMS[name] * value for name, value in line.items()) for line in course[:60]]
    assert len(course) == 120  # two batches
    assert losses[-1] < 0.7 * losses[0] and course[59]["one_hot"] < 0.7 * course[0]["one_hot"]
    assert torch.equal(made.images, invert(teacher, TERMS, SHAPE, 40, options=options, seed=3).images)
    assert not torch.equal(made.images, invert(teacher, TERMS, SHAPE, 40, options=options, seed=4).images)
    assert draw_classes(40, CLASSES, 3).bincount().tolist() == [10] * CLASSES  # each class as often
    torch.testing.assert_close(made.scores, teacher(made.images).detach())


def test_langevin_noise_and_jitter_change_the_images() -> None:
    teacher = small()
    plain = invert(teacher, TERMS, SHAPE, 4, options=Inversion(steps=3)).images
    for options in (Inversion(steps=3, noise=1e-3), Inversion(steps=3, jitter=2)):
        assert not torch.equal(plain, invert(teacher, TERMS, SHAPE, 4, options=options).images)


def test_the_noise_has_the_size_of_langevins() -> None:
    """sqrt(2 eps) in the first step, where nothing else moves the pixels; eps falls to a ten-thousandth."""
    wide: dict[str, Any] = {"low": -100.0, "high": 100.0, "batch_size": 64}
    plain, noisy = (
        invert(small(), {"l2": 0.0}, SHAPE, 64, options=Inversion(steps=1, noise=noise, **wide)).images
        for noise in (0.0, 0.02)
    )
    assert float((noisy - plain).std()) == pytest.approx(0.2, rel=0.05)


def test_targets_go_to_the_batches_of_their_images() -> None:
    teacher, targets = small(), torch.tensor([1, 2, 3, 1, 3, 3, 2])
    options = Inversion(steps=60, batch_size=4)
    made = invert(teacher, {"one_hot": 1.0}, SHAPE, 7, options=options, facts=Facts(targets=targets))
    assert (made.labels == targets).sum() >= 6
    for facts, words in (
        (Facts(targets=targets[:4]), "found 4 targets for 7 images"),
        (Facts(groups=7), "all in one batch"),
    ):
        with pytest.raises(PlanError, match=words):
            invert(teacher, {"one_hot": 1.0}, SHAPE, 7, options=options, facts=facts)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(PlanError, match="targets is 'impresions'; expected classes or impressions"):
        Inversion(targets="impresions")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="steps is 0; expected at least 1; high is 0"):
        Inversion(steps=0, high=0.0)
    for terms, words in (({"records": 1.0}, "needs records"), ({"clusters": 1.0}, "needs clusters")):
        with pytest.raises(PlanError, match=words):
            invert(small(), terms, SHAPE, 4, facts=Facts())


def test_samples_are_files_that_commands_read(tmp_path: Path) -> None:
    images = some_images(10)
    scores = 5 * torch.eye(CLASSES)[torch.arange(10) % CLASSES]
    paths = save_samples(tmp_path / "made.npz", Samples(images, scores))
    assert [path.name for path in paths] == ["made.npz", "made.png"]
    (batch,) = read_data(paths[0], "classification")
    assert batch.labels is not None and batch.labels.tolist() == [i % CLASSES for i in range(10)]
    torch.testing.assert_close(batch.kwargs["pixel_values"], images)
    with pytest.raises(PlanError, match=r"expected \.npz"):
        save_samples(tmp_path / "made.npy", Samples(images, scores))
    with pytest.raises(PlanError, match="2 channels"):
        draw_grid(Samples(torch.zeros(1, 2, 4, 4), scores[:1]))
    deep = Samples(torch.zeros(10, 4, 8, 8), scores)  # of four channels, as of satellites
    assert [path.name for path in save_samples(tmp_path / "deep.npz", deep)] == ["deep.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep.npz", "made.npz", "made.png"]


def test_a_grid_has_a_column_for_each_class(tmp_path: Path) -> None:
    from PIL import Image

    labels = torch.tensor([0, 0, 0, 5, 5, 9])
    shades = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    samples = Samples(shades[:, None, None, None].expand(6, 1, 32, 32), torch.eye(10)[labels])
    save_samples(tmp_path / "made.npz", samples)
    with Image.open(tmp_path / "made.png") as image:
        table = np.asarray(image)
    assert table.shape == (99, 99)
    assert table[::33, ::33].tolist() == [[0, 153, 255], [51, 204, 255], [102, 255, 255]]  # white for an empty place
    many = draw_grid(Samples(some_images(60), torch.eye(60)))
    with Image.open(io.BytesIO(many)) as image:
        assert image.size == (20 * 33, 3 * 33)


def test_wild_images_are_those_that_the_teacher_is_surest_of() -> None:
    teacher, images = small(), some_images(50, 9)
    chosen = choose_wild(teacher, images, 5)
    sureness = teacher(images).detach().softmax(-1).amax(-1)
    assert torch.equal(chosen.images, images[sureness.argsort(descending=True)[:5]])
    with pytest.raises(PlanError, match="found 50 images"):
        choose_wild(teacher, images, 51)
