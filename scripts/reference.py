#!/usr/bin/env python3
"""Write docs/cli.md from the commands' --help, and docs/api.md from the docstrings and signatures of the public names.

python scripts/reference.py           # exit code 1 and the names of the pages if one is not up to date
python scripts/reference.py --write   # bring them up to date

The public names are those of the package's `__all__`. Their source is read and not run, so that no torch is needed.
"""

from __future__ import annotations

import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

sys.path.append(str(Path(__file__).parent))
from public_names import Public, public_names

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80  # of the help, as click prints it on a wide terminal
UPDATE = "python scripts/reference.py --write"
NOTE = f"<!-- Made by `{UPDATE}`; edit the {{}} in place of this page. -->\n"


def entry_points() -> dict[str, click.Command]:
    """The commands that pip installs, by their names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = {name: target.partition(":") for name, target in project["scripts"].items()}
    return {name: getattr(import_module(module), attribute) for name, (module, _, attribute) in targets.items()}


def walk(context: click.Context) -> Iterator[click.Context]:
    """The command of this context, and all commands in it if it is a group."""
    yield context
    if isinstance(context.command, click.Group):
        for name, command in context.command.commands.items():
            yield from walk(click.Context(command, info_name=name, parent=context))


def cli_page() -> str:
    """docs/cli.md: a table of all commands, and the help of each."""
    installed = entry_points()
    groups = {name: command for name, command in installed.items() if isinstance(command, click.Group)}
    contexts = [
        context
        for name, group in groups.items()
        for context in walk(click.Context(group, info_name=name, terminal_width=WIDTH))
    ]
    paths = {id(context.command): context.command_path for context in contexts}
    table = [
        f"| [`{c.command_path}`](#{c.command_path.replace(' ', '-')}) | {c.command.get_short_help_str(WIDTH * 2)} |"
        for c in contexts
    ]
    short = [
        f"`{name}` alone is the same as `{paths[id(command)]}`."
        for name, command in installed.items()
        if name not in groups and id(command) in paths
    ]
    helps = [f"## {c.command_path}\n\n```text\n{c.command.get_help(c).rstrip()}\n```" for c in contexts]
    opening = ["# Commands", NOTE.format("help of the commands") + "\nEach command prints this text with `--help`."]
    return "\n\n".join([*opening, *short, "\n".join(["| command | |", "|---|---|", *table]), *helps]) + "\n"


def api_page() -> str:
    """docs/api.md: a table of all public names, then functions, classes and other names in full."""
    names = public_names(ROOT, "mergekit_lfm")
    groups = {
        "Functions": [name for name in names if name.kind == "function"],
        "Classes": [name for name in names if name.kind == "class"],
        "Other names": [name for name in names if name.kind == "value"],
    }
    parts = ["# Python", NOTE.format("docstrings")]
    parts += ["Import these names from `mergekit_lfm`; everything else in the package may move."]
    for title, members in groups.items():
        if members:
            rows = [f"| [`{name.name}`](#{anchor(name)}) | {name.summary} |" for name in members]
            parts += [f"## {title}", "\n".join(["| name | |", "|---|---|", *rows])]
            parts += [text for name in members for text in name.texts()]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def anchor(name: Public) -> str:
    """The anchor that GitHub gives to the heading of a name."""
    return name.heading.replace("`", "").lower().replace(" ", "-")


PAGES = {"docs/cli.md": cli_page, "docs/api.md": api_page}


def main() -> int:
    """Compare the pages with what the code gives, or write them."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the pages that are not up to date")
    write = parser.parse_args().write
    old = []
    for page, make in PAGES.items():
        path, text = ROOT / page, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            old.append(page)
            if write:
                path.write_text(text, encoding="utf-8")
    for page in old:
        print(f"wrote {page}" if write else f"{page} is not up to date; update it: {UPDATE}")
    return 1 if old and not write else 0


if __name__ == "__main__":
    sys.exit(main())
