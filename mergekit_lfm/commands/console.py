"""Where the words of a command go: to the terminal or the pipe, as JSON, into its log and into its report.

A command says each thing once, to its console. One run ends with one call: `conclude` with a result, `fail` with an
error; both have the same form as JSON on standard output and in the report.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import click

from mergekit_lfm.commands.show.progress import Terminal
from mergekit_lfm.commands.show.terminal import answer, tell
from mergekit_lfm.errors import PARTS, FormatError, PlanError, reason
from mergekit_lfm.machine.resources import peak_memory
from mergekit_lfm.machine.secrets import mask_secrets
from mergekit_lfm.machine.text import printable, printable_line, printable_message
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.files import name_file, read_json
from mergekit_lfm.store.places import check_file, partial_of
from mergekit_lfm.version import versions

ANSWER_IS_NO = 1
BAD_INPUT = 2  # or a bad environment; also what click exits with on bad usage
BROKEN_PIPE = 141  # 128 and SIGPIPE, as shells have it
CRASH = 1  # Python's own for a traceback
LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
ENTRIES = ("command", "exit", "versions")  # of a report, by which it is known
ANOTHER = "choose another file"


@dataclass
class Console:
    """The words of one run of a command. The options of the same names choose where they go.

    whole: whether JSON also tells of the run: exit code, time, memory, versions.
    """

    command: str
    as_json: bool = False
    quiet: bool = False
    log: Path | None = None
    report: Path | None = None
    whole: bool = False
    started: float = field(default_factory=time.monotonic)
    ended: bool = False
    first_line: str = ""

    @classmethod
    def of(cls, ctx: click.Context) -> Self:
        """The console of a command. Takes its options from the parameters, which the command's function then lacks."""
        names = ("as_json", "quiet", "log", "report")
        options = {name: ctx.params.pop(name) for name in names if name in ctx.params}
        return cls(name_of(ctx), **options, whole="report" in options)

    @property
    def hidden(self) -> bool:
        """True if progress is not shown on a terminal, and text for people not at all."""
        return self.quiet or self.as_json

    @property
    def wants_data(self) -> bool:
        """True if the result's data go anywhere: as JSON, or into the report."""
        return self.as_json or self.report is not None

    @cached_property
    def progress(self) -> Terminal:
        """The display of a workflow's progress."""
        return Terminal(hidden=self.hidden, quiet=self.quiet, log=self._note)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record an end that no other method has recorded: wrong usage, which click reports, or a defect."""
        if error is None or self.ended:
            return
        message, code = reason(error), CRASH
        if isinstance(error, click.UsageError):
            message, code = error.format_message(), BAD_INPUT
        failure = self._failure(error, message, code, {})
        self._close(failure, code, [f"error: {message}"])
        if self.as_json:
            answer(json.dumps(failure))

    def begin(self, paths: Iterable[Path]) -> None:
        """Check where the log and the report go, and remove the report of an earlier run.

        paths: those that the command reads or writes. Raises PlanError if one of the two must not be written there.
        """
        log, report = self.log, self.report
        self.log = self.report = None  # a refusal is written to neither
        for file in (log, report):
            if file is not None:
                _check_apart(file, paths)
                check_file(file, (), overwrite=True)
        if log is not None:
            _check_log(log)
        if report is not None:
            _check_report(report)
            report.unlink(missing_ok=True)
        self.log, self.report = log, report
        self.first_line = _stamp(f"{self.command} begins")  # the log is made with the next line, after all checks

    def keep_apart(self, paths: Iterable[Path]) -> None:
        """Raise PlanError if the log or the report lies in one of these paths, which the command reads or writes."""
        log, report, listed = self.log, self.report, list(paths)
        self.log = self.report = None
        for file in (log, report):
            if file is not None:
                _check_apart(file, listed)
        self.log, self.report = log, report

    def say(self, text: object) -> None:
        """Print text for people on standard error, unless it is hidden."""
        if not self.hidden:
            tell(text)
        self._note(text)

    def warn(self, warnings: Iterable[str]) -> None:
        """Print warnings on standard error."""
        for warning in warnings:
            line = f"warning: {printable_line(warning)}"
            tell(line)
            self._note(line)

    def conclude(
        self,
        data: Mapping[str, Any],
        text: Callable[[], str] | None = None,
        *,
        path: object = None,
        code: int = 0,
        why: Sequence[str] = (),
    ) -> NoReturn:
        """End with a result.

        data: for JSON and the report, if it `wants_data`. text: makes the text for people, which is the result
        if there is no path, and else is printed beside it on standard error. path: the path of the result. why: lines
        that say why the answer is no, printed unless the result is JSON.
        """
        facts = {**self._facts(code), **data} if self.whole else dict(data)
        wanted = self.log is not None or not (self.as_json or (self.quiet and path is not None))
        shown = printable(text()) if text is not None and wanted else ""
        self._close(facts, code, [*([shown] if shown else []), *why, *([] if path is None else [path])])
        if self.as_json:
            heard = answer(json.dumps(facts))
        elif path is None:
            heard = answer(shown)
        else:
            if shown and not self.quiet:
                tell(shown)
            for line in why:
                tell(line)
            heard = answer(path)
        raise click.exceptions.Exit(code if heard else BROKEN_PIPE)

    def fail(self, error: BaseException, message: str, code: int, parts: Mapping[str, str]) -> NoReturn:
        """End with an error. message: in full. parts: those that are known by name, as in a `Refusal`."""
        line = message if isinstance(error, KeyboardInterrupt) else f"error: {message}"
        tell(printable_message(line))
        failure = self._failure(error, message, code, parts)
        try:
            self._close(failure, code, [printable_message(line)])
        except OSError as another:  # of the log or the report
            tell(f"error: {another}")
        if self.as_json:
            answer(json.dumps(failure))
        raise click.exceptions.Exit(code)

    def _failure(self, error: BaseException, message: str, code: int, parts: Mapping[str, str]) -> dict[str, Any]:
        """An error for JSON."""
        known = {name: mask_secrets(parts[name]) if name in parts else None for name in PARTS}
        kind = "Interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        return {"error": {"kind": kind, "message": mask_secrets(message), **known}, **self._facts(code)}

    def _facts(self, code: int) -> dict[str, Any]:
        """The facts about the run itself."""
        return {
            "command": self.command,
            "exit": code,
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_memory": peak_memory(),
            "versions": versions("torch"),
        }

    def _close(self, facts: Mapping[str, Any], code: int, lines: Iterable[object]) -> None:
        """Write the last lines of the log, and the report."""
        self.ended = True
        for line in (*lines, f"{self.command} ends with exit code {code}"):
            self._note(line)
        report, self.report = self.report, None
        if report is not None:
            replace_file(report, (json.dumps(facts, indent=2) + "\n").encode())

    def _note(self, text: object) -> None:
        """Append the lines of a text to the log, each with the time."""
        if self.log is None:
            return
        log, self.log = self.log, None  # if it fails, the error is not written to it again
        lines, self.first_line = self.first_line + _stamp(text), ""
        with name_file(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                file.write(lines.encode())
        self.log = log


def name_of(ctx: click.Context) -> str:
    """The name of a command, the same for both programs: "merge", "stats gram"."""
    parent = "" if ctx.parent is None or ctx.parent.parent is None else f"{name_of(ctx.parent)} "
    return f"{parent}{ctx.command.name}"


def _stamp(text: object) -> str:
    """The lines of a text, each after the time."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return "".join(f"{now} {line}\n" for line in printable(text).splitlines())


def _check_apart(file: Path, paths: Iterable[Path]) -> None:
    """Raise PlanError if the file is one of the paths, or lies in one or in its OUT.partial."""
    place = file.resolve()
    for path in paths:
        home = path.resolve()
        if place.is_relative_to(home) or place.is_relative_to(partial_of(home)):
            sentence = "{place} lies in {path}, which this command reads or writes; {cure}"
            raise PlanError(sentence, place=file, path=path, cure=ANOTHER)


def _check_log(log: Path) -> None:
    """Raise PlanError if something else than a log is there, or if it cannot be written."""
    if not log.exists():
        return
    with log.open("rb") as file:
        start = file.readline(100)
    if start and not LOG_LINE.match(start):
        raise PlanError("{place} exists and is not a log of this program; {cure}", place=log, cure=ANOTHER)
    if not os.access(log, os.W_OK):
        raise PlanError("{place} cannot be written; {cure}", place=log, cure=ANOTHER)


def _check_report(report: Path) -> None:
    """Raise PlanError if something else than a report is there."""
    if not report.exists():
        return
    try:
        found = read_json(report)
    except FormatError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= {*ENTRIES}:
        raise PlanError("{place} exists and is not a report of this program; {cure}", place=report, cure=ANOTHER)
