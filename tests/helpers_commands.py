"""Helpers for tests of the command line: commands in this process and in their own, and their answers."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mergekit_lfm.commands.app import main

ROOT = Path(__file__).parents[1]
# A command as it is installed, in which Ctrl-C works as in a terminal wherever the tests run.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from mergekit_lfm.commands.app import main
main(prog_name="mergekit-lfm")
"""


def run(*arguments: str, standard_input: str | bytes | None = None) -> Result:
    """Run `mergekit-lfm ARGUMENTS`; raises any exception that is not an ordinary end of a command."""
    return CliRunner(catch_exceptions=False).invoke(main, arguments, input=standard_input)


def answer(result: Result) -> Any:
    """The one JSON object on standard output; asserts that nothing else was printed."""
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refusal(result: Result) -> str:
    """The one message of a command that ended with exit code 2."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    return result.stderr


def start(folder: Path, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """`mergekit-lfm ARGUMENTS` as a process in `folder`."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


def on_a_terminal(folder: Path, *arguments: str) -> tuple[str, bytes]:
    """The result printed by `mergekit-lfm ARGUMENTS`, and the text shown on the terminal that is its stderr."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = start(folder, *arguments, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while more := os.read(ours, 4096):
            shown += more
    except OSError:  # Linux's way of saying that the other end is closed
        pass
    os.close(ours)
    return process.communicate(timeout=60)[0], shown


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
