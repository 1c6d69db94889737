"""Making images by gradients: losses fall, seeds decide, and wrong requests are refused; samples as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_distill import CLASSES, SHAPE, small, some_images

from mergekit_lfm.distill.impressions import draw_classes
from mergekit_lfm.distill.invert import Facts, Inversion, invert
from mergekit_lfm.distill.presets import PRESETS
from mergekit_lfm.distill.samples import Samples, draw_grid, save_samples
from mergekit_lfm.distill.wild import choose_wild
from mergekit_lfm.errors import PlanError
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


def test_wrong_requests_are_refused() -> None:
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


def test_a_grid_has_a_class_in_turn(tmp_path: Path) -> None:
    from PIL import Image

    shades = torch.tensor([0.0, 0.0, 1.0, 1.0])
    samples = Samples(shades[:, None, None, None].expand(4, 1, 32, 32), torch.eye(2)[torch.tensor([0, 0, 1, 1])])
    save_samples(tmp_path / "made.npz", samples)
    with Image.open(tmp_path / "made.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (66, 66) and pixels[0, 0] == pixels[33, 0] == 0 and pixels[0, 33] == pixels[33, 33] == 255


def test_wild_images_are_those_that_the_teacher_is_surest_of() -> None:
    teacher, images = small(), some_images(50, 9)
    chosen = choose_wild(teacher, images, 5)
    sureness = teacher(images).detach().softmax(-1).amax(-1)
    assert torch.equal(chosen.images, images[sureness.argsort(descending=True)[:5]])
    with pytest.raises(PlanError, match="found 50 images"):
        choose_wild(teacher, images, 51)
