"""A student of digits without any: far better than noise, by a shortened run of benchmarks/data_free.py."""

from __future__ import annotations

from importlib import import_module

import pytest

from mergekit_lfm.distill.synthesise import synthesise

STEPS = 420  # a third of the benchmark's, whose students reach 95 % on each of three seeds


@pytest.mark.slow
def test_dfq_beats_noise() -> None:
    digits = import_module("benchmarks.data_free")
    data = digits.load()
    teacher = digits.teach(data, True, 0, epochs=15)
    noisy, student = digits.new_student(0), digits.new_student(0)
    digits.on_noise(teacher, noisy, 0, STEPS, False)  # as many steps
    synthesise(teacher, student, "dfq", digits.SHAPE, generation={"rounds": STEPS // 3})
    scores = [digits.judge(net, data) for net in (noisy, student)]
    assert scores[1] >= 90 and scores[1] >= scores[0] + 10, scores
