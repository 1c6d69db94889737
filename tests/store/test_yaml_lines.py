"""The lines of a YAML document on which its places start."""

from __future__ import annotations

import pytest

from mergekit_lfm.store.yaml import find_steps, line_finder

TEXT = """\
# a comment
defaults: &defaults
  t: 0.5
parameters:
  <<: *defaults
  "weight": [1,
    2, 3]
modules:
  vision.tower:
    models:
    - model: a
    - {model: b}
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("defaults", 2),
        ("defaults.t", 3),
        ("parameters.weight", 6),
        ("parameters.weight[1]", 7),
        ("parameters.t", 4),  # merged: only the mapping around it is written there
        ("modules.vision.tower.models[1].model", 12),
        ("modules.vision.tower.models[7].model", 10),
        ("nowhere", None),
    ],
)
def test_a_place_has_the_line_on_which_it_starts(path: str, line: int | None) -> None:
    assert line_finder(TEXT)(path) == line


def test_the_steps_of_a_path_end_where_the_data_do() -> None:
    data = {"a.b": [{"a": 1}], "a": {"b": 2}}
    assert find_steps(data, "a.b[0].a") == (("a.b", 0, "a"), "")
    assert find_steps(data, "a.c") == (("a",), "c")
    assert find_steps(data, "a.b[0].x.y") == (("a.b", 0), "x.y")
