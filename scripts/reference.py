#!/usr/bin/env python3
"""Write docs/cli.md, docs/api.md and docs/architectures.md.

They are made from the commands' --help, from the docstrings and signatures of the public names, and from the table of
tests/arch/architectures.py.

python scripts/reference.py           # exit code 1 and the names of the pages if one is not up to date
python scripts/reference.py --write   # bring them up to date

The public names are those of the package's `__all__`. Their source is read and not run, so that no torch is needed.
"""

from __future__ import annotations

import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import click

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "arch"))
from architectures import ARCHITECTURES
from public_names import Public, public_names

from mergekit_lfm.arch.experts import layouts

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


ARCHITECTURES_TEXT = """\
No table says which architectures can be merged: tensors are matched by their names and shapes, so that a model merges
whatever it is. Each line of the table is a test, which takes two tiny random models of the class and checks that

- a merge has the names, shapes and order of its inputs, and the values of the formula in float64;
- transformers loads the result without a missing or unexpected tensor, and it runs as a model whose tensors the formula
  made;
- a stack of all layers and the later ones once more has the tensors of its sources, byte by byte, and a config with
  which transformers loads and runs it.

A model without a class in transformers is merged by its tensors' names, and not loaded.

`slices` stacks the layers of the whole model. An encoder and a decoder, or a language model and what sees, have a stack
each: name them in `modules`, each with its `slices`. To add a line, see `tests/arch/architectures.py`."""

EXPERTS_TEXT = """\
transformers 5 holds the experts of a layer in two tensors, and saves each expert's matrices by their own names, as most
models on the Hub have them. Some tools write the two tensors, as [experts, out, in] or [experts, in, out]. Models in
different layouts are merged in that of the base, and the plan says so. The layouts that are known, less the beginnings
of the names:"""


def architectures_page() -> str:
    """docs/architectures.md: a table of the tested architectures, and one of the layouts of experts."""
    rows = [f"| {name} | `{line.kind}` | {_stacks(line.stack)} |" for name, line in ARCHITECTURES.items()]
    layers = [f"| `{line.gate_up}`, `{line.down}` | {', '.join(f'`{x}`' for x in line.apart)} |" for line in layouts()]
    parts = ["# Architectures", NOTE.format("tables")]
    parts += [ARCHITECTURES_TEXT, "\n".join(["| architecture | class | stacks |", "|---|---|---|", *rows])]
    parts += ["## Mixtures of experts", EXPERTS_TEXT]
    parts += ["\n".join(["| all experts together | one expert `e` |", "|---|---|", *layers])]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _stacks(stack: Mapping[str, int]) -> str:
    """The keys of a recipe that stack the modules."""
    modules = ", ".join(f"`{module}`" for module in stack if module)
    return f"`modules`: {modules}" if modules else "`slices`" if stack else "-"


def anchor(name: Public) -> str:
    """The anchor that GitHub gives to the heading of a name."""
    return name.heading.replace("`", "").lower().replace(" ", "-")


PAGES = {"docs/cli.md": cli_page, "docs/api.md": api_page, "docs/architectures.md": architectures_page}


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
