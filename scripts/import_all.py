#!/usr/bin/env python3
"""Import every module of the installed package and ask every command for its --help.

Run it where no extra is installed, as `scripts/check_install` does: a package that is imported and not declared in
pyproject.toml fails here. A module may lack a package that an extra brings; it is named.
"""

from __future__ import annotations

import contextlib
import io
import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points, requires
from re import match

import click

PACKAGE = "mergekit_lfm"


def of_extras() -> set[str]:
    """The packages that only extras bring, by the names that pip knows them under."""
    lines = requires(PACKAGE) or []
    names = {line: found[0].lower() for line in lines if (found := match(r"[\w.-]+", line))}
    extra = {name for line, name in names.items() if "extra ==" in line}
    return extra - {name for line, name in names.items() if "extra ==" not in line}


def import_modules() -> dict[str, str]:
    """Import all modules but `__main__`, which run; those without a package of an extra, with its name."""
    without, optional = dict[str, str](), of_extras()
    package = import_module(PACKAGE)
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if module.name.endswith(".__main__"):
            continue
        try:
            import_module(module.name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in optional:
                raise
            without[module.name] = missing
    for name in package.__all__:
        getattr(package, name)
    return without


def commands(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    """The words after the program's name that run the command, and those that run each command in it."""
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, *path, name)


def main() -> int:
    """Import, print help, and report how many of each there were."""
    without = import_modules()
    for name, package in without.items():
        print(f"{name} needs {package}")
    helps = 0
    programs = [point for point in entry_points(group="console_scripts") if point.value.startswith(f"{PACKAGE}.")]
    for program in programs:
        command = program.load()
        for path in commands(command):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                command.main([*path, "--help"], prog_name=program.name, standalone_mode=False)
            assert "Usage:" in printed.getvalue(), (program.name, *path)
            helps += 1
    print(
        f"imported {sum(name.startswith(PACKAGE) for name in sys.modules)} modules; {helps} commands print their help"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
