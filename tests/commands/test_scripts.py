"""Commands in scripts: logs, reports, errors as JSON, pipes whose reader has gone, and answers that are no."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from helpers_commands import PROGRAM, ROOT, answer, refusal, run
from models import save_checkpoint
from safetensors.torch import save_file

from mergekit_lfm.api import recipes as api
from mergekit_lfm.commands.app import main
from mergekit_lfm.commands.show.progress import Terminal
from mergekit_lfm.machine.resources import peak_memory
from mergekit_lfm.version import __version__

DOCUMENT = (ROOT / "docs/scripting.md").read_text("utf-8")
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "
SECRET = "hf_" + "a" * 34
NOTHING = {"place": None, "found": None, "expected": None, "cure": None}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: models a and b with a tensor to merge and one to copy, and recipe.yaml, their average."""
    for name, value, more in (("a", 1.0, {}), ("b", 3.0, {"rotary_emb.inv_freq": torch.ones(2)})):
        tensors = {"w": torch.full((3, 4), value), "ids": torch.arange(5), **more}
        save_checkpoint(tmp_path / name, tensors, {"model_type": "llama"})
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_lines(path: Path) -> list[str]:
    """The lines of a log without their times; asserts that each has one."""
    lines = path.read_text().splitlines()
    assert all(re.match(TIME, line) for line in lines)
    return [re.sub(TIME, "", line) for line in lines]


def error_of(*arguments: str, code: int = 2) -> dict[str, Any]:
    """The error of a command with --json; asserts that people get its message, too."""
    result = run(*arguments, "--json")
    assert result.exit_code == code and result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["exit"] == code and found["error"]["message"] in result.stderr
    error: dict[str, Any] = found["error"]
    return error


# ------------------------------------------------------------------ JSON


@pytest.mark.usefixtures("folder")
def test_json_of_a_merge_tells_all_of_it() -> None:
    found = answer(run("merge", "recipe.yaml", "out", "--json"))
    lock = json.loads(Path("out/merge.lock.json").read_text())
    assert found["methods"] == {"linear": 1, "copy": 1} and found["tensors"] == 2
    (dropped,) = found["dropped"]
    assert (dropped["model"], dropped["tensor"]) == ("b", "rotary_emb.inv_freq")
    assert (found["bytes_read"], found["bytes_written"]) == (2 * 88, 88)
    assert (found["digest"], found["output_digest"]) == (lock["plan"], lock["digest"])
    assert (found["command"], found["exit"], found["already_there"]) == ("merge", 0, False)
    assert found["versions"] == {"mergekit_lfm": __version__, "torch": version("torch")} == lock["versions"]
    assert 10**7 < found["peak_memory"] <= peak_memory()
    again = answer(run("merge", "recipe.yaml", "out", "--json"))
    assert again["already_there"] is True and again["output_digest"] == lock["digest"]


@pytest.mark.usefixtures("folder")
def test_files_left_behind_have_their_reason() -> None:
    write("a/tokenizer_config.json", json.dumps({"token": SECRET}))
    result = run("merge", "recipe.yaml", "out", "--json")
    reason = "line 1 holds a token of the Hub"
    assert json.loads(result.stdout)["left_behind"] == [
        {"model": "a", "file": "tokenizer_config.json", "reason": reason}
    ]
    assert result.stderr == f"warning: a: tokenizer_config.json was left behind: {reason}\n"


@pytest.mark.usefixtures("folder")
def test_json_of_verify_has_the_outcome() -> None:
    merged = answer(run("merge", "recipe.yaml", "out", "--json"))
    found = answer(run("verify", "out", "--json"))
    assert {name: found[name] for name in ("out", "digest", "output_digest")} == {
        name: merged[name] for name in ("out", "digest", "output_digest")
    }
    assert (found["good"], found["exit"]) == (True, 0)
    assert found["bytes_read"] == Path("out/model.safetensors").stat().st_size
    Path("out/config.json").write_text("{}")
    result = run("verify", "out", "--json")
    assert (result.exit_code, json.loads(result.stdout)["exit"]) == (1, 1)


def write(path: str, data: str | bytes) -> None:
    Path(path).write_bytes(data if isinstance(data, bytes) else data.encode())


EXPECTED_ERRORS: dict[str, tuple[Callable[[], object], dict[str, object]]] = {
    "recipe": (
        lambda: write("recipe.yaml", LINEAR.replace("weight: 1", "weight: x")),
        {
            "kind": "PlanError",
            "message": "recipe.yaml: parameters.weight: found 'x', expected a number",
            "place": "recipe.yaml: parameters.weight",
            "found": "'x'",
            "expected": "a number",
            "cure": None,
        },
    ),
    "damaged": (
        lambda: write("b/model.safetensors", b"\x02"),
        {
            "kind": "FormatError",
            "place": "{here}/b/model.safetensors",
            "found": "1 bytes are too few for a safetensors file",
            "cure": "fetch or write it again",
        },
    ),
    "pointer": (
        lambda: write("b/model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        {
            "place": "{here}/b/model.safetensors",
            "found": "this is a git-lfs pointer, not the weights",
            "cure": "run `git lfs pull` in its repository",
        },
    ),
    "differs": (
        lambda: save_file({"w": torch.ones(4, 4), "ids": torch.arange(5)}, "b/model.safetensors"),
        {
            "kind": "PlanError",
            "place": None,
            "found": "w is [4, 4] in b, [3, 4] in a",
            "cure": "To merge only what all models share and keep the rest of a, add `tensors: common` to the recipe; "
            "to choose for some tensors, `keep: {{w: base}}`, or `drop`, or one of the models",
        },
    ),
    "disagrees": (
        lambda: write("b/config.json", '{"model_type": "mistral"}'),
        {
            "kind": "PlanError",
            "found": "model_type is mistral in b, llama in a",
            "cure": "If they should be merged all the same, add `allow: [model_type]` to the recipe",
        },
    ),
    "fact": (
        lambda: write("recipe.yaml", LINEAR + "allow: [model_typ]\n"),
        {
            "kind": "PlanError",
            "place": "recipe.yaml: allow",
            "found": "'model_typ'",
            "cure": "did you mean model_type?",
        },
    ),
    "keeper": (
        lambda: write("recipe.yaml", LINEAR + "keep: {w: c}\n"),
        {"place": "recipe.yaml: keep.w", "found": "'c'", "expected": "base, drop or one of the models"},
    ),
    "exists": (
        lambda: save_checkpoint(Path("out"), {"w": torch.ones(1)}, {}),
        {"kind": "PlanError", "place": "{here}/out", "cure": "choose another output, or use --overwrite"},
    ),
    "missing": (
        lambda: Path("recipe.yaml").unlink(),
        {"kind": "PlanError", "place": "recipe.yaml", "found": "No such file or directory"},
    ),
    "several": (
        lambda: write("recipe.yaml", LINEAR.replace("weight: 1", "weight: x, wait: 1")),
        {**NOTHING, "kind": "PlanError", "place": "recipe.yaml"},
    ),
}


@pytest.mark.parametrize("case", EXPECTED_ERRORS)
def test_an_error_is_one_object_with_its_parts(case: str, folder: Path) -> None:
    cause, parts = EXPECTED_ERRORS[case]
    cause()
    error = error_of("merge", "recipe.yaml", "out")
    assert error.keys() == {"kind", "message", *NOTHING}
    wanted = {name: text.format(here=folder) if isinstance(text, str) else text for name, text in parts.items()}
    assert {name: error[name] for name in parts} == wanted


@pytest.mark.usefixtures("folder")
def test_errors_of_the_system_and_of_usage_are_objects_too() -> None:
    error = error_of("patch", "show", "x.st")
    assert (error["kind"], error["found"]) == ("FileNotFoundError", "no such patch file: x.st")
    assert error_of("merge", "recipe.yaml", "--private")["kind"] == "UsageError"
    error = error_of("merge", "recipe.yaml", "--memory", "much")
    assert error["kind"] == "BadParameter" and "'much'" in error["message"]
    assert error_of("stats", "gram")["kind"] == "MissingParameter"


def test_an_interruption_is_an_object(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_recipe", interrupt)
    error = error_of("merge", "recipe.yaml", "out", "--report", "r.json", code=130)
    message = "interrupted: nothing was written; run the same command again to go on"
    assert error == {"kind": "Interrupted", "message": message, **NOTHING}
    assert json.loads((folder / "r.json").read_text())["exit"] == 130


@pytest.mark.usefixtures("folder")
def test_no_secret_is_in_an_error() -> None:
    error = error_of("plan", f"{SECRET}.yaml")
    assert SECRET not in json.dumps(error) and error["place"] == "[a token of the Hub].yaml"


# ------------------------------------------------------------------ reports


@pytest.mark.usefixtures("folder")
def test_a_report_is_the_object_of_json_and_replaces_the_last_one() -> None:
    shown = answer(run("merge", "recipe.yaml", "out", "--json", "--report", "new/r.json"))
    assert json.loads(Path("new/r.json").read_text()) == shown
    write("recipe.yaml", "merge_method: liner")
    error = error_of("merge", "recipe.yaml", "out", "--report", "new/r.json")
    assert json.loads(Path("new/r.json").read_text())["error"] == error
    assert [path.name for path in Path("new").iterdir()] == ["r.json"]


@pytest.mark.usefixtures("folder")
def test_a_defect_is_reported_and_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(api, "run_recipe", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run("merge", "recipe.yaml", "out", "--report", "r.json", "--log", "x.log")
    found = json.loads(Path("r.json").read_text())
    assert (found["exit"], found["error"]["kind"], found["error"]["message"]) == (
        1,
        "RuntimeError",
        "RuntimeError: a defect",
    )
    assert log_lines(Path("x.log"))[-2:] == ["error: RuntimeError: a defect", "merge ends with exit code 1"]


@pytest.mark.usefixtures("folder")
def test_wrong_usage_is_reported() -> None:
    result = run("merge", "recipe.yaml", "--private", "--report", "r.json")
    assert result.exit_code == 2 and result.stderr.startswith("Usage: ")
    assert json.loads(Path("r.json").read_text())["error"]["kind"] == "UsageError"


# ------------------------------------------------------------------ logs


@pytest.mark.usefixtures("folder")
def test_a_log_has_the_words_of_every_run() -> None:
    save_file({"w": torch.full((3, 4), torch.nan), "ids": torch.arange(5)}, "b/model.safetensors")
    assert run("merge", "recipe.yaml", "out", "--nan", "warn", "-q", "--log", "logs/x.log").exit_code == 0
    write("recipe.yaml", LINEAR.replace("b}", SECRET + "}"))
    refusal(run("merge", "recipe.yaml", "out", "--log", "logs/x.log"))
    lines = log_lines(Path("logs/x.log"))
    assert lines[:2] == ["merge begins", "warning: w of b holds NaN or infinity"]
    assert re.fullmatch(r"wrote 2 tensors, 88 B, in [\d.]+ s", lines[2])
    assert lines[3:6] == ["out", "merge ends with exit code 0", "merge begins"]
    assert lines[6].startswith("error: recipe.yaml: models[1].model: found '[a token of the Hub]'")
    assert lines[7:] == ["merge ends with exit code 2"]


@pytest.mark.usefixtures("folder")
def test_a_log_that_can_no_longer_be_written_ends_the_run_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, progress: Terminal, **__: object) -> None:
        Path("x.log").mkdir()  # as if the disk were full
        progress.notice("downloading")

    monkeypatch.setattr(api, "run_recipe", fill)
    message = refusal(run("merge", "recipe.yaml", "out", "-q", "--log", "x.log", "--report", "r.json"))
    assert message == "error: x.log: Is a directory\n"
    assert json.loads(Path("r.json").read_text())["error"]["place"] == "x.log"


@pytest.mark.parametrize("option", ["--log", "--report"])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("recipe.yaml", "lies in recipe.yaml"),
        ("out/x", "lies in out"),
        ("out.partial/x", "lies in out"),
        ("a/x", "lies in {here}/a"),
        ("a", "is a folder"),
        ("other.txt", "is not a {kind} of this program"),
        ("other.txt/x", "is a file, expected a folder"),
    ],
)
def test_a_place_that_must_not_be_written_is_refused(option: str, file: str, reason: str, folder: Path) -> None:
    write("other.txt", "mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = refusal(run("merge", "recipe.yaml", "out", option, file))
    assert reason.format(here=folder, kind=option.removeprefix("--")) in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# ------------------------------------------------------------------ pipes


def without_a_reader(folder: Path, *arguments: str, stderr: bool = False) -> tuple[int, bytes]:
    """The exit code and the stderr of a command whose stdout, or also stderr, goes to a pipe that nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=theirs,
        stderr=theirs if stderr else subprocess.PIPE,
        check=False,
    )
    os.close(theirs)
    return done.returncode, done.stderr or b""


@pytest.mark.parametrize(
    "arguments", [["methods"], ["methods", "--help"], ["--help"], ["plan", "recipe.yaml", "--json"]]
)
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments: list[str], folder: Path) -> None:
    assert without_a_reader(folder, *arguments) == (141, b"")


def test_a_merge_without_any_reader_is_finished(folder: Path) -> None:
    assert without_a_reader(folder, "merge", "recipe.yaml", "out", "-v", "--report", "r.json", stderr=True)[0] == 141
    assert json.loads((folder / "r.json").read_text())["exit"] == 0
    assert run("verify", "out").exit_code == 0


# ------------------------------------------------------------------ the document


def fields_of(section: str) -> set[str]:
    """The names in the first column of the tables in a part of the document."""
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([a-z_.]+)`", row)}


@pytest.mark.usefixtures("folder")
def test_the_document_has_every_field() -> None:
    of_run, rest = DOCUMENT.split("## The object")[1].split("With an error, further:")
    of_error, of_merge = rest.split("With a result of `merge`:")
    merged = answer(run("merge", "recipe.yaml", "out", "--json"))
    assert merged.keys() == fields_of(of_run) | fields_of(of_merge)
    assert {f"error.{name}" for name in ("kind", "message", *NOTHING)} == fields_of(of_error)
    commands = re.findall(r"`([a-z -]+)`", DOCUMENT.split(" has the same options")[0])
    assert set(commands) == {name for name, command in walk(main) if any(p.name == "report" for p in command.params)}


def walk(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands by their names; those of `stats`, which have the same options, as one."""
    for name, command in group.commands.items():
        if name == "stats" and isinstance(command, click.Group):
            yield name, command.commands["gram"]
        elif isinstance(command, click.Group):
            yield from walk(command, f"{name} ")
        else:
            yield prefix + name, command


@pytest.mark.parametrize("method", [pytest.param("linear", marks=pytest.mark.slow), "liner"])
def test_the_script_of_the_document_runs(method: str, folder: Path) -> None:
    text = DOCUMENT.split("    #!/bin/sh\n")[1].split("\n\n")[0].replace("/srv/models", str(folder))
    write("nightly.yaml", LINEAR.replace("linear", method))
    write("mergekit-lfm", f"#!{sys.executable}\n{PROGRAM}")
    Path("mergekit-lfm").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["/bin/sh", "-c", text], env=environment, capture_output=True, text=True, check=True)
    report = json.loads(Path("logs/merge.json").read_text())
    if method == "liner":
        assert "unknown method 'liner'" in report["error"]["message"]
        assert done.stdout == report["error"]["message"] + "\n" and report["exit"] == 2
        return
    assert done.stderr == "" and done.stdout.startswith("out/nightly\n") and report["exit"] == 0
    assert json.loads(Path("logs/verify.json").read_text())["good"] is True
    assert [line for line in log_lines(Path("logs/merge.log")) if " ends " in line] == [
        "merge ends with exit code 0",
        "verify ends with exit code 0",
    ]
