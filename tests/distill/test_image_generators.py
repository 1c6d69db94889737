"""Generators and students: the outer step against the engine, memory's gradient against finite differences, attacks."""

from __future__ import annotations

import pytest
import torch
from helpers_distill import CLASSES, SHAPE, Small, small, some_images
from torch import nn

from mergekit_lfm import merge_state_dicts
from mergekit_lfm.distill.bank import Bank
from mergekit_lfm.distill.divergences import kd_divergence
from mergekit_lfm.distill.generate import generate, move_towards
from mergekit_lfm.distill.generation import Generation
from mergekit_lfm.distill.generators import Generator, build
from mergekit_lfm.distill.learner import Learner, Learning, NoiseMatrix, learn
from mergekit_lfm.errors import PlanError
from mergekit_lfm.train.examples import seed_of


def test_reptiles_outer_step_is_the_engines_task_arithmetic() -> None:
    start, adapted = (build(lambda: Generator(SHAPE), seed) for seed in (0, 1))
    before = {name: x.clone() for name, x in start.state_dict().items()}
    base, tuned = dict(start.named_parameters()), {name: x.detach().clone() for name, x in adapted.named_parameters()}
    wanted = merge_state_dicts([tuned], "task_arithmetic", base=base, weight=1.0, lambda_=0.3)
    move_towards(before, adapted, 0.3)
    for name, x in adapted.named_parameters():
        torch.testing.assert_close(x.detach(), wanted[name], rtol=0, atol=1e-6)


def test_a_meta_step_has_the_gradient_of_the_loss_after_a_step() -> None:
    images, remembered = some_images(6, 1).double(), some_images(6, 2).double()
    scores = torch.randn(2, 6, CLASSES, generator=torch.Generator().manual_seed(3)).double()
    student = small(4, norm=False, smooth=True).double()
    options = Learning(memory="meta", inner_rate=0.1, temperature=1.0)
    learner = Learner(student, CLASSES, options, 10, 0)

    def loss() -> torch.Tensor:
        return learner._loss((images, scores[0]), (remembered, scores[1]))

    head = student.head.bias
    (slope,) = torch.autograd.grad(loss(), [head])
    for i in range(CLASSES):
        with torch.no_grad():
            head[i] += 1e-5
            above = float(loss_value(loss))
            head[i] -= 2e-5
            below = float(loss_value(loss))
            head[i] += 1e-5
        assert (above - below) / 2e-5 == pytest.approx(float(slope[i]), rel=1e-5)


def loss_value(loss: object) -> torch.Tensor:
    with torch.enable_grad():
        return loss().detach()  # type: ignore[operator,no-any-return]


def test_an_attack_stays_near_and_goes_far() -> None:
    student, images = small(2), some_images(8)
    scores = student(images).detach()
    learner = Learner(student, CLASSES, Learning(attack=0.1), 10, 0)
    attacked = learner._attacked((images, scores))
    assert float((attacked - images).abs().max()) <= 0.1 + 1e-6
    student.eval()
    noisy = images + 0.1 * (some_images(8, 5) - 0.5).sign()
    far = [float(kd_divergence(student(x), scores).detach()) for x in (attacked, noisy)]
    assert far[0] > 2 * far[1]
    within = Learner(student, CLASSES, Learning(attack=0.1), 10, 0, pixels=(0.0, 1.0))._attacked((images, scores))
    assert float(within.min()) >= 0 and float(within.max()) <= 1 < float(attacked.max())


def test_a_noise_matrix_has_rows_of_sum_one() -> None:
    matrix = NoiseMatrix(3)().detach()
    torch.testing.assert_close(matrix, torch.full((3, 3), 0.025) + (0.95 - 0.025) * torch.eye(3))


def test_a_student_reads_new_images_once_and_in_an_order_of_its_own_for_each_time_round() -> None:
    student, calls = small(1), list[torch.Tensor]()
    student.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    learner = Learner(student, CLASSES, Learning(batch_size=4, noise_matrix=True), 6, 3)
    images = torch.arange(8.0)[:, None, None, None].expand(8, *SHAPE) / 8
    learn(learner, (images, torch.zeros(8, CLASSES)), 6)
    orders = [
        torch.randperm(8, generator=torch.Generator().manual_seed(seed_of(3, "order", done))) for done in (0, 2, 4)
    ]
    assert len(calls) == 6
    assert [round(8 * float(x)) for each in calls for x in each[:, 0, 0, 0]] == torch.cat(orders).tolist()


def test_contrast_reads_features_of_copies_alone() -> None:
    student, passes = small(1), list[int]()
    student.register_forward_pre_hook(lambda *_: passes.append(1))
    options = Generation(rounds=2, generator_steps=3, student_steps=2, batch_size=8, latents="learned")
    terms = {"bn": 1.0, "adversarial_kl": 1.0, "contrast": 1.0}
    generate(small(), student, build(lambda: Generator(SHAPE), 2), terms, options=options)
    assert len(passes) == 2 * (3 + 2)  # no pass for copies, or for the bank's images


def test_a_bank_keeps_the_last_images() -> None:
    bank = Bank(5)
    for i in range(4):
        bank.add(torch.full((2, *SHAPE), float(i)), torch.zeros(2, CLASSES))
    assert len(bank) == 5 and bank.images[:, 0, 0, 0].tolist() == [1, 2, 2, 3, 3]


def test_a_student_comes_near_its_teacher() -> None:
    teacher, student = small(), small(1)
    generator = build(lambda: Generator(SHAPE), 2)
    options = Generation(rounds=20, student_steps=3, batch_size=32)
    made = generate(teacher, student, generator, {"bn": 1.0, "balance": 1.0}, options=options)
    assert made.record[-1]["student"] < 0.5 * made.record[0]["student"]
    assert made.record[-1]["bn"] < made.record[0]["bn"]


def test_wrong_generations_are_refused() -> None:
    with pytest.raises(PlanError, match="rounds is 0; expected at least 1; outer is 'mean'"):
        Generation(rounds=0, outer="mean")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"temperature is 0; .* memory is 'all'"):
        Learning(temperature=0, memory="all")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="needs images of another kind"):
        generate(small(), small(1), Generator(SHAPE), {"proxy": 1.0})
    with pytest.raises(PlanError, match="learned latents with the memory 'replay'; expected none"):
        options, replay = Generation(latents="learned"), Learning(memory="replay")
        generate(small(), small(1), Generator(SHAPE), {"bn": 1.0}, options=options, learning=replay)
    with pytest.raises(PlanError, match="no linear layer"):
        generate(nn.Conv2d(1, 2, 3), Small(), Generator(SHAPE), {"balance": 1.0})
