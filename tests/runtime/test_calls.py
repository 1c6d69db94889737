"""Examples of a function are those of a file with the same lines, and belong to the request."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_commands import answer, refusal, run
from helpers_tune import tiny  # noqa: F401

from mergekit_lfm.store.checkpoint import open_checkpoint

MODULE = """
import json
from pathlib import Path

def lines():
    for line in Path("llama.jsonl").read_text().splitlines():
        yield json.loads(line)

def numbers():
    return [1, 2]

def sets():
    return [{"text": {1, 2}}]

def none():
    pass

constant = 3
"""


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811
    shutil.copytree(tiny / "llama", tmp_path / "llama")
    shutil.copy(tiny / "llama.jsonl", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "some.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mine", "mine.some"):
        sys.modules.pop(name, None)


def tune(data: str, out: str) -> list[str]:
    return ["tune", "llama", "--data", data, "--task", "lm", "--steps", "3", "--threads", "1", "-o", out]


@pytest.mark.usefixtures("here")
def test_a_function_gives_the_examples_of_a_file() -> None:
    path = list(sys.path)
    first, second = (
        answer(run(*tune(data, out), "--json")) for data, out in (("llama.jsonl", "a"), ("mine.some:lines", "b"))
    )
    assert first["loss"] == second["loss"] and open_checkpoint("a").content == open_checkpoint("b").content
    assert answer(run(*tune("mine.some:lines", "b"), "--json"))["already_there"] and sys.path == path
    assert '"mine.some:lines"' in Path("b/tune.json").read_text()  # and no folder of this machine
    assert "/" not in Path("b/tune.json").read_text()
    lines = Path("llama.jsonl").read_text().splitlines(keepends=True)
    Path("llama.jsonl").write_text("".join(lines[:-1]))
    assert "b exists" in refusal(run(*tune("mine.some:lines", "b")))  # the examples are others


@pytest.mark.usefixtures("here")
def test_a_function_that_gives_no_examples_is_named() -> None:
    for data, message in (
        ("mine.nowhere:lines", "cannot be imported (ModuleNotFoundError: No module named 'mine.nowhere')"),
        ("mine.some:nothing", "cannot be imported"),
        ("mine.some:constant", "mine.some:constant is a int; expected a function"),
        ("mine.some:none", "returns a NoneType; expected an iterable of mappings"),
        ("mine.some:numbers", "example 0: a int is not a mapping"),
        ("mine.some:sets", "example 0: Object of type set is not JSON serializable"),
    ):
        assert message in refusal(run(*tune(data, "x")))
    assert not Path("x").exists() and not Path("x.training").exists()


@pytest.mark.usefixtures("here")
def test_a_recipe_runs_no_code() -> None:
    Path("r.yaml").write_text("job: tune\nmodel: llama\ndata: mine.some:lines\ntask: lm\nsteps: 3\n")
    assert "expected a file: a recipe runs no code" in refusal(run("merge", "r.yaml", "x"))
    assert "mine.some" not in sys.modules
