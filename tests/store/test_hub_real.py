"""The whole way against the real Hub, for owners of a write token: MERGEKIT_LFM_HUB_E2E=1 HF_TOKEN=... pytest.

Three private repositories are made in the token's account and deleted again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from helpers_commands import start
from helpers_faults import llama_tensors, near, save_model
from huggingface_hub import HfApi

pytestmark = pytest.mark.skipif(
    not os.environ.get("MERGEKIT_LFM_HUB_E2E"), reason="asks the real Hub: set MERGEKIT_LFM_HUB_E2E=1 and HF_TOKEN"
)


@pytest.fixture
def repos(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Three names of repositories, which are deleted at the end."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # for the commands, which are processes of their own
    account = HfApi().whoami()["name"]
    names = [f"{account}/mergekit-lfm-test-{uuid4().hex[:8]}-{part}" for part in ("a", "b", "merged")]
    try:
        yield names
    finally:
        for name in names:
            HfApi().delete_repo(name, missing_ok=True)


def ran(folder: Path, *command: str) -> str:
    """The output of a command that succeeds."""
    process = start(folder, *command)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert os.environ["HF_TOKEN"] not in said + errors
    return said


def test_pushed_named_in_a_recipe_merged_pushed_pulled_and_verified(repos: list[str], tmp_path: Path) -> None:
    base = llama_tensors(0)
    commits = []
    for name, tensors in zip(repos, (base, near(base, 1)), strict=False):
        save_model(tmp_path / "model", tensors, shards=2)
        commits.append(json.loads(ran(tmp_path, "push", "model", name, "--private", "--json"))["commit"])
    models = [{"model": f"{name}@{commit}"} for name, commit in zip(repos, commits, strict=False)]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    said = ran(tmp_path, "merge", "recipe.yaml", "out", "--push-to", repos[2], "--private", "--verify", "--json")
    pushed = json.loads(said)["pushed"]
    assert "model-00001-of-00002.safetensors" in pushed["files"]
    assert json.loads(ran(tmp_path, "verify", repos[2], "--json"))["good"]
    again = json.loads(ran(tmp_path, "push", "out", repos[2], "--json"))
    assert (again["files"], again["commit"]) == ([], pushed["commit"])
