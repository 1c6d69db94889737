"""MAML's own example: a start from which ten steps learn a new sinusoid, where joint training learns their mean."""

from __future__ import annotations

import pytest
from meta_sinusoids import compare


@pytest.mark.slow
def test_a_few_steps_from_a_learned_start_fit_a_new_sinusoid() -> None:
    """A twelfth of the benchmark's steps."""
    found = compare(0, 400)
    for name, steps, share in (("maml", 10, 0.7), ("fomaml", 10, 0.9), ("reptile", 32, 0.7)):
        assert found[name][steps] < share * found["joint"][steps], (name, found)
    assert found["random"][10] > found["joint"][10]
