"""The documents' commands for the Hub run and print the documented lines, on the Hub of recipes/hub.yaml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers_commands import ROOT, start
from helpers_hub import REPO, prepare
from hub_server import HubServer

README, GUIDE = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/hub.md"))
COMMAND = "merge recipes/hub.yaml --push-to me/merged --private --verify"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone in which the documents' Hub is served, and the line that it printed entered."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("minilm", "digits", "llamas"))
    command = [sys.executable, str(ROOT / "tests/serve_hub.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("export ")
        for assignment in line.removeprefix("export ").split():
            monkeypatch.setenv(*assignment.split("=", 1))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        yield tmp_path
        server.terminate()


def shown(text: str, command: str) -> list[str]:
    """The lines that a document shows below a command."""
    (block,) = re.findall(rf"^    \$ {re.escape(command)}\n((?:    (?!\$).*\n)+)", text, re.MULTILINE)
    return [line.removeprefix("    ") for line in block.splitlines()]


def general(line: str) -> str:
    """A line without the port of a server and without times."""
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", re.sub(r"in \d+\.\d s", "in 0.0 s", line))


def test_the_walk_through_of_the_readme(folder: Path) -> None:
    process = start(folder, *COMMAND.split())
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(map(general, (out + err).splitlines())) == sorted(map(general, shown(README, COMMAND)))
    assert shown(README, "python tests/serve_hub.py &")[0].startswith("export HF_ENDPOINT=http://127.0.0.1:")
    assert (folder / "merged/hub/model.safetensors").exists()
    again = start(folder, *COMMAND.split()[:-1], "-q")
    assert again.communicate(timeout=120)[0] == f"merged/hub\n{os.environ['HF_ENDPOINT']}/me/merged\n"


def test_the_recipe_shown_is_the_one_in_recipes() -> None:
    text = (ROOT / "recipes/hub.yaml").read_text("utf-8")
    assert f"#   {COMMAND}\n" in text
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[-1]) == yaml.safe_load(text)


def test_the_example_in_python_runs(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(hub, tmp_path)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == f"{hub.url}/{REPO} {hub.head(REPO)}\n"
    assert hub.private(REPO)


def test_the_recipe_of_the_guide_is_planned(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lfm.plan.make import make_plan
    from mergekit_lfm.recipe.form import Push
    from mergekit_lfm.recipe.recipe import Recipe

    prepare(hub, tmp_path)
    hub.tag("org/b", "v1", hub.head("org/b"))
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    plan = make_plan(Recipe.parse(text))
    assert plan.labels == ("org/a", "org/b@v1") and plan.recipe.goal(None) == Push(repo=REPO, private=True)
