"""The public names of a package with their signatures and docstrings, read from the source without running it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

WIDTH = 100  # the longest signature on one line
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Public:
    """A public name: its definition, and the lines that code and prose about it need."""

    name: str
    kind: Literal["function", "class", "value"]
    code: str
    doc: str
    members: tuple[tuple[str, str, str], ...] = ()  # of a class: heading, code, docstring

    @property
    def heading(self) -> str:
        return f"class `{self.name}`" if self.kind == "class" else f"`{self.name}`"

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring up to its first full stop, on one line."""
        paragraph = " ".join(self.doc.partition("\n\n")[0].split())
        sentence, stop, _ = paragraph.partition(". ")
        return (sentence + stop.rstrip()).replace("|", r"\|") or f"`{self.code}`"

    def texts(self) -> Iterator[str]:
        """The paragraphs of its section."""
        yield from section(f"### {self.heading}", self.code, self.doc)
        for heading, code, doc in self.members:
            yield from section(f"#### `{self.name}.{heading}`", code, doc)


def section(heading: str, code: str, doc: str) -> Iterator[str]:
    """Heading, code in a fence, and prose."""
    yield heading
    yield f"```python\n{code}\n```"
    if doc:
        yield doc


def public_names(root: Path, package: str) -> list[Public]:
    """Every name of the package's `__all__`, in its order. Raises LookupError if a definition is not found."""
    tree = parse(root, package)
    (listed,) = [v for name, v in assignments(tree) if name == "__all__"]
    return [read(root, package, name) for name in ast.literal_eval(listed)]


@cache
def parse(root: Path, module: str) -> ast.Module:
    """The source of a module or of a package's `__init__`."""
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The names that a module's top level gives a value to, with the value."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def find(root: Path, module: str, name: str) -> tuple[str, Function | ast.ClassDef | ast.expr]:
    """The definition of a name, and the module that has it; imports are followed within the package."""
    tree = parse(root, module)
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return module, node
    for target, value in assignments(tree):
        if target == name:
            return module, value
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    for home, alias in ((node.module or "", alias) for node in imports for alias in node.names):
        if (alias.asname or alias.name) == name and home.split(".")[0] == module.split(".")[0]:
            return find(root, home, alias.name)
    raise LookupError(f"{module} neither defines nor imports {name} from its own package")


def read(root: Path, module: str, name: str) -> Public:
    """A public name, from its definition."""
    home, node = find(root, module, name)
    if isinstance(node, Function):
        return Public(name, "function", signature(node, name), docstring(node))
    if isinstance(node, ast.ClassDef):
        return read_class(root, home, node, name)
    return Public(name, "value", f"{name} = {source(node)}", "")


def read_class(root: Path, module: str, node: ast.ClassDef, name: str) -> Public:
    """A class: fields stand in its code; public methods, those of its bases in the package too, are members."""
    members = dict[str, tuple[str, str, str]]()
    fields = dict[str, str]()
    for part in lineage(root, module, node):
        own = [f for f in part.body if isinstance(f, Function) and not f.name.startswith("_")]
        inner = {
            field.target.id: f"    {source(field)}"
            for field in part.body
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and not field.target.id.startswith("_")
        }
        fields = inner | fields
        for method in own:
            members.setdefault(method.name, (method.name, signature(method, method.name), docstring(method)))
    bases = f"({', '.join(map(source, node.bases))})" if node.bases else ""
    code = f"class {name}{bases}" + ("".join([":", *(f"\n{line}" for line in fields.values())]) if fields else "")
    return Public(name, "class", code, docstring(node), tuple(members.values()))


def lineage(root: Path, module: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """A class, and the classes of the package that it is made from."""
    yield node
    for base in node.bases:
        origin = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(origin, ast.Name):
            try:
                home, definition = find(root, module, origin.id)
            except LookupError:
                continue  # a class of another package
            if isinstance(definition, ast.ClassDef):
                yield from lineage(root, home, definition)


def source(node: ast.AST) -> str:
    """The source of an expression, with the quotes of this project."""
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def docstring(node: Function | ast.ClassDef) -> str:
    """The docstring without its indentation; outside of code, the signs that Markdown reads as markup are escaped."""
    parts = re.split(r"(`[^`]*`)", ast.get_docstring(node) or "")
    return "".join(part if i % 2 else re.sub(r"[<*]|__", r"\\\g<0>", part) for i, part in enumerate(parts))


def signature(function: Function, name: str) -> str:
    """How the function is called: on one line if it is short, else with a line for each parameter."""
    decorators = {source(decorator).rpartition(".")[2] for decorator in function.decorator_list}
    result = f" -> {source(function.returns)}" if function.returns else ""
    if decorators & {"property", "cached_property"}:
        return f"{name}{result.replace(' -> ', ': ')}"
    parameters = list(parameters_of(function.args))
    if decorators.isdisjoint({"staticmethod"}) and parameters and parameters[0] in ("self", "cls"):
        del parameters[0]
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def parameters_of(arguments: ast.arguments) -> Iterator[str]:
    """The parameters as they are written, with the marks `/` and `*` between them."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    for i, (argument, default) in enumerate(zip(positional, [*missing, *arguments.defaults], strict=True), 1):
        yield parameter(argument, default)
        if i == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg:
        yield f"*{source(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield parameter(argument, default)
    if arguments.kwarg:
        yield f"**{source(arguments.kwarg)}"


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    """One parameter with its annotation and default."""
    if default is None:
        return source(argument)
    equals = " = " if argument.annotation else "="
    return f"{source(argument)}{equals}{source(default)}"
