"""Patterns of an adapter's config against PEFT's own choice among them."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from mergekit_lfm.artifacts.patterns import Patterns

names = st.lists(st.sampled_from(["q", "xq", "layers", "1", "11", "q_1", ""]), min_size=1, max_size=4).map(".".join)
parts = st.sampled_from(["q", "xq", "layers", "1", "q_1", ".", r"\.", r"\d", "^", "$", ".*", "(a|q)", "-"])
patterns = st.lists(parts, min_size=1, max_size=5).map("".join)


@given(st.lists(patterns | names.filter(bool), max_size=6, unique=True), names)
def test_the_choice_is_that_of_peft(given: list[str], module: str) -> None:
    try:
        expected = get_pattern_key(given, module)
    except re.error:
        return
    own = Patterns({pattern: pattern for pattern in given})
    assert own.value(module, module) == expected
    matching = {pattern for pattern in given if re.match(rf"(.*\.)?({pattern})$", module)}
    assert {*own.idle([module])} == {*given} - matching


def test_a_pattern_that_is_none_is_an_error() -> None:
    with pytest.raises(re.error):
        Patterns({"*": 1})


def test_a_pattern_for_each_module_takes_linear_time() -> None:
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(4000)]
    own, started = Patterns({f"layers.{i}.self_attn.q_proj": i for i in range(4000)}), time.process_time()
    assert [own.value(module, None) for module in modules] == [*range(4000)]
    assert own.idle(modules) == []
    assert time.process_time() - started < 2  # sixteen million regular expressions would take longer
