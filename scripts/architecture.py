#!/usr/bin/env python3
"""Check the map of the rooms in docs/architecture.md against the code, and the code against the map.

python scripts/architecture.py            # exit code 1 if the page is out of date, or an import breaks a rule
python scripts/architecture.py --write    # the tables of the page, anew

The floors are those of the contract in pyproject.toml. Every import counts: at the top of a module, inside a function,
and for types only. The last column of the list of long modules is written by hand, and kept.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mergekit_lfm"
PAGE = ROOT / "docs" / "architecture.md"
FACE = ("__init__", "__main__")  # the package's own files, which belong to no room
LONG = 300  # lines, from which on a module has to say the one idea that it holds

Graph = Mapping[str, set[str]]


def modules_of(root: Path) -> dict[str, ast.Module]:
    """The modules of the package by their dotted names less the package's: "store.tensors", "store" for its face."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def lines_of(root: Path, name: str) -> int:
    """The number of lines of a module."""
    path = root / PACKAGE / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8").count("\n")


def room_of(module: str) -> str:
    """The room in which a module is: its folder, or the module itself at the top of the package."""
    return module.partition(".")[0]


def imports_of(module: str, tree: ast.Module, names: Iterable[str]) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise SystemExit(f"{PACKAGE}.{module}, line {node.lineno}: write the import with its full name")
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        else:
            continue
        for target in dotted:
            if target == PACKAGE:
                yield "__init__"
            elif target.startswith(f"{PACKAGE}."):
                inside = target.removeprefix(f"{PACKAGE}.")
                yield next((name for name in (inside, inside.rpartition(".")[0]) if name in names), "__init__")


def graph_of(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """For every module that is in a room, the modules that it imports."""
    inside = {name: tree for name, tree in modules.items() if name not in FACE}
    return {name: set(imports_of(name, tree, modules)) - {name} for name, tree in inside.items()}


def rooms_of(graph: Graph) -> dict[str, set[str]]:
    """For every room, the other rooms that its modules import."""
    rooms: dict[str, set[str]] = {room_of(name): set() for name in graph}
    for name, targets in graph.items():
        rooms[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
    return rooms


def floors_of(root: Path) -> dict[str, int]:
    """The floor of every room, 0 for the lowest, from the contract in pyproject.toml."""
    tool = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    (layers,) = (c["layers"] for c in tool["importlinter"]["contracts"] if c["id"] == "rooms")
    return {room.strip(): floor for floor, row in enumerate(reversed(layers)) for room in row.split("|")}


def circle_of(graph: Graph) -> list[str]:
    """The names along one circle of a graph, the first one again at the end; empty without a circle."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if circle := visit(target, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def faults_of(graph: Graph, floors: Mapping[str, int]) -> list[str]:
    """Every import that does not go to a lower floor, and one circle of each kind."""
    faults = [f"{room}: no floor in pyproject.toml" for room in sorted(rooms_of(graph).keys() - floors.keys())]
    if faults:
        return faults
    for name, targets in graph.items():
        for target in sorted(targets):
            here, there = room_of(name), room_of(target)
            if there != here and floors.get(there, len(floors)) >= floors[here]:
                faults.append(f"{name} imports {target}, which is not on a lower floor")
    if circle := circle_of(rooms_of(graph)):
        faults.append(f"the rooms form a circle: {' -> '.join(circle)}")
    for room in sorted(rooms_of(graph)):
        inside = {name: {t for t in targets if room_of(t) == room} for name, targets in graph.items()}
        if circle := circle_of({name: targets for name, targets in inside.items() if room_of(name) == room}):
            faults.append(f"the modules of {room} form a circle: {' -> '.join(circle)}")
    return faults


def opening(tree: ast.Module) -> str:
    """The first paragraph of a module's docstring, on one line."""
    paragraph = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", r"\|")


def first_sentence(tree: ast.Module) -> str:
    """The first sentence of a module's docstring."""
    return re.split(r"(?<=[.!]) (?=[A-Z`])", opening(tree))[0]


def table_of_rooms(root: Path, modules: Mapping[str, ast.Module], floors: Mapping[str, int]) -> str:
    """The rooms from the top of the house down: purpose, modules, lines to the nearest hundred, imports."""
    graph = graph_of(modules)
    rooms = rooms_of(graph)
    rows = ["| floor | room | purpose | modules | lines | imports |", "|--:|---|---|--:|--:|---|"]
    for room in sorted(rooms, key=lambda room: (-floors[room], room)):
        inside = [name for name in graph if room_of(name) == room]
        lines = sum(lines_of(root, name) for name in inside)
        imports = ", ".join(sorted(rooms[room], key=lambda other: (-floors[other], other))) or "-"
        purpose = first_sentence(modules[room])
        rows.append(
            f"| {floors[room]} | `{room}` | {purpose} | {len(inside)} | {max(round(lines, -2), 100)} | {imports} |"
        )
    return "\n".join(rows)


def table_of_long_modules(root: Path, modules: Mapping[str, ast.Module], ideas: Mapping[str, str]) -> str:
    """The modules of more than 300 lines: the opening of the docstring, and the idea that stands in the page."""
    rows = ["| module | its docstring | the one idea |", "|---|---|---|"]
    for name, tree in modules.items():
        if lines_of(root, name) > LONG:
            rows.append(f"| `{name}` | {first_sentence(tree)} | {ideas.get(name, '')} |")
    return "\n".join(rows)


def ideas_in(page: str) -> dict[str, str]:
    """The ideas of long modules that a page has, by module."""
    block = page.partition(marker("long modules"))[2].partition(marker("end"))[0]
    return dict(re.findall(r"^\| `([\w.]+)` \| .* \| ([^|]+) \|$", block, re.MULTILINE))


def marker(name: str) -> str:
    """The comment that opens a table in the page; "end" closes each."""
    return f"<!-- scripts/architecture.py: {name} -->"


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table `name` replaced."""
    before, opened, rest = page.partition(marker(name))
    _, closed, after = rest.partition(marker("end"))
    if not (opened and closed):
        raise SystemExit(f"{PAGE.name}: no {marker(name)} with {marker('end')} behind it")
    return f"{before}{opened}\n\n{table}\n\n{closed}{after}"


def page_of(root: Path, page: str) -> str:
    """The page as it has to be for the code as it is."""
    modules, floors = modules_of(root), floors_of(root)
    page = with_table(page, "rooms", table_of_rooms(root, modules, floors))
    return with_table(page, "long modules", table_of_long_modules(root, modules, ideas_in(page)))


def main() -> int:
    """Print every fault; with --write, write the page before."""
    modules = modules_of(ROOT)
    faults = faults_of(graph_of(modules), floors_of(ROOT))
    page = PAGE.read_text(encoding="utf-8")
    if not any("no floor" in fault for fault in faults):
        current = page_of(ROOT, page)
        if "--write" in sys.argv[1:]:
            PAGE.write_text(current, encoding="utf-8")
        elif current != page:
            faults.append("docs/architecture.md is out of date: run python scripts/architecture.py --write")
        long = [name for name in modules if lines_of(ROOT, name) > LONG]
        faults += [
            f"{name}: write its one idea into docs/architecture.md" for name in long if name not in ideas_in(page)
        ]
    print("\n".join(faults) or "the map and the code agree")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
