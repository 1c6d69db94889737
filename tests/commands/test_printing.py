"""Names from files are printed by every command with what acts in them escaped, and with secrets masked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers_commands import answer, refusal, run
from models import save_checkpoint

from mergekit_lfm.api.outcome import Finding, warn_of
from mergekit_lfm.commands.show.progress import Terminal
from mergekit_lfm.commands.show.terminal import table
from mergekit_lfm.store.hub.client import translate_errors

NAME = "w\x1b[2J\u202e\nwarning: all is lost"
ESCAPED = r"w\x1b[2J\u202e\nwarning: all is lost"
SECRET = "hf_" + "a" * 34


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with two models that have tensors of hostile names, and different ones."""
    monkeypatch.chdir(tmp_path)
    for model, more in (("a", {}), ("b", {f"{NAME}2": torch.ones(2)})):
        save_checkpoint(Path(model), {NAME: torch.ones(2), **more}, {})
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_tables_show_no_control_characters() -> None:
    shown = run("inspect", "a").stdout
    assert ESCAPED in shown and all(line.isprintable() for line in shown.split("\n"))
    assert answer(run("inspect", "a", "--json"))["tensors"][0]["name"] == NAME


def write_recipe(*models: str) -> None:
    listed = [{"model": model} for model in models]
    Path("r.json").write_text(json.dumps({"merge_method": "linear", "models": listed, "parameters": {"weight": 1}}))


@pytest.mark.usefixtures("folder")
def test_plans_and_messages_show_no_control_characters() -> None:
    write_recipe("a")
    assert f"\n{ESCAPED} " in run("plan", "r.json", "-v").stdout
    write_recipe("a", "b")
    message = refusal(run("plan", "r.json"))
    assert f"{ESCAPED}2" in message and all(line.isprintable() for line in message.split("\n"))
    assert "\nwarning" not in message


@pytest.mark.usefixtures("folder")
def test_verify_shows_no_control_characters() -> None:
    write_recipe("a")
    run("merge", "r.json", "out")
    lock = json.loads(Path("out/merge.lock.json").read_text())
    (entry,) = lock["tensors"].values()
    entry["xxh3"] = ["0" * 32]
    Path("out/merge.lock.json").write_text(json.dumps(lock))
    result = run("verify", "out")
    assert result.exit_code == 1 and ESCAPED in result.stdout and "\x1b" not in result.stdout


@pytest.mark.usefixtures("folder")
def test_a_secret_in_a_path_is_masked() -> None:
    for command in (("inspect", SECRET), ("plan", f"{SECRET}.yaml")):
        message = refusal(run(*command))
        assert SECRET not in message and "[a token of the Hub]" in message
    Path("a").rename(SECRET)
    assert "[a token of the Hub]: 1 file" in run("inspect", SECRET).stdout


def test_progress_shows_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(hidden=False).notice(f"reading {NAME}")
    assert capsys.readouterr().err == f"reading {ESCAPED}\n"


def test_findings_show_no_control_characters() -> None:
    with pytest.warns(Finding) as caught:
        assert warn_of([f"{NAME} {SECRET}"]) == (f"{ESCAPED} [a token of the Hub]",)
    assert str(caught[0].message) == f"{ESCAPED} [a token of the Hub]"


def test_logs_of_the_client_show_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import logging as client_logging

    client_logging.get_logger("huggingface_hub.x")
    handler = logging.StreamHandler()
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    try:
        with translate_errors("org/a"):
            logger.warning("wrote %s", f"{NAME} {SECRET}")
    finally:
        logger.removeHandler(handler)
    assert f"wrote {ESCAPED} [a token of the Hub]" in capsys.readouterr().err


def test_columns_are_as_wide_as_their_cells_are_printed() -> None:
    assert table([("a", "b"), ("\n", "x"), ("long", "y")]) == "a     b\n\\n    x\nlong  y"
