"""Read YAML strictly: repeated keys, deep nesting and aliases that explode are errors with their line."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import yaml

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.files import DEEPEST

try:
    from yaml import CSafeLoader as SafeLoader  # libyaml's, five times as fast
except ImportError:
    from yaml import SafeLoader  # type: ignore[assignment]

LONGEST_NUMBER = 100  # characters; Python takes hours for 1:1:1:... and refuses to print long ones
MOST_VALUES = 1_000_000  # with aliases written out, unless the text is long itself


class _Loader(SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            problem = f"found a number of {len(node.value):,} characters; quote it if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:  # a date such as 2024-13-45
            problem = (
                f"found {node.value!r:.60}, not a valid {node.tag.rpartition(':')[2]} ({error}); quote it if it is text"
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def read_yaml(text: str, label: str) -> object:
    """The one document in `text`. Raises PlanError with line and column for bad syntax and for a repeated key."""
    documents = read_documents(text, label)
    if len(documents) > 1:
        raise PlanError(f"{label}: found {len(documents)} documents, expected one YAML document")
    return documents[0]


def read_documents(text: str, label: str) -> list[object]:
    """The documents in `text` that are not empty, at least one. Raises PlanError as `read_yaml` does."""
    try:
        loader, documents = _Loader(text), []
        while loader.check_node():
            node = loader.get_node()
            if node is None or _is_empty(node):
                continue
            _Check(text, label).measure(node)
            documents.append(loader.construct_document(node))
        if not documents:
            raise PlanError(f"{label}: it is empty, expected one YAML document")
        return documents
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" {_place(mark, text)}:" if mark else ""
        raise PlanError(f"{label}:{at} {error.context or ''} {error.problem}; expected one YAML document") from error
    except (yaml.YAMLError, UnicodeEncodeError) as error:  # libyaml's for lone surrogates
        raise PlanError(f"{label}: not YAML: {error}") from error
    except RecursionError:  # without libyaml, which stops at 1,000 levels by itself
        raise PlanError(f"{label}: {TOO_DEEP}") from None


def _is_empty(node: yaml.Node) -> bool:
    return node.tag.endswith(":null") and not node.value


def find_steps(data: object, path: str) -> tuple[tuple[Any, ...], str]:
    """The keys and indices that lead to a place such as `slices[0].parameters.t`, and the rest that is not there."""
    steps: list[Any] = []
    while path:
        if isinstance(data, Mapping):
            path = path.removeprefix(".")
            keys = [key for key in data if path == str(key) or path.startswith((f"{key}.", f"{key}["))]
            step = max(keys, key=lambda key: len(str(key)), default=None)
            length = len(str(step))
        else:
            number = re.match(r"\[(\d+)\]", path)
            step = int(number[1]) if number and isinstance(data, list) and int(number[1]) < len(data) else None
            length = len(number[0]) if number else 0
        if step is None:
            break
        steps.append(step)
        data, path = data[step], path[length:]  # type: ignore[index]
    return tuple(steps), path


def line_finder(text: str, document: int = 0) -> Callable[[str], int | None]:
    """A function that finds the line, from 1, on which a place of a YAML document starts; the text is read once.

    document: the index among those of `read_documents`. A place that is not written there has the line of the nearest
    one around it; None if even its first key is not.
    """
    data = read_documents(text, "the recipe")[document]
    root: yaml.Node = [node for node in yaml.compose_all(text, SafeLoader) if not _is_empty(node)][document]
    return lambda path: _find_line(root, find_steps(data, path)[0])


def _find_line(node: yaml.Node, steps: Iterable[Any]) -> int | None:
    """The line of a place, given by the steps to it from a node."""
    line = None
    for step in steps:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == str(step)]
        elif isinstance(node, yaml.SequenceNode):
            pairs = [(node.value[step], node.value[step])]
        else:
            pairs = []
        if not pairs:  # the key comes from a mapping merged with <<
            break
        ((key, node),) = pairs
        line = key.start_mark.line + 1
    return line


def _place(mark: yaml.Mark, text: str) -> str:
    """The line and column of a mark. libyaml's mark of the end lies a line below it."""
    ends = text.count("\n")
    line, column = (mark.line, mark.column) if mark.line <= ends else (ends, len(text.rpartition("\n")[2]))
    return f"line {line + 1}, column {column + 1}"


TOO_DEEP = f"lists and mappings lie in one another over more than {DEEPEST} levels; flatten them"


class _Check:
    """The check of a document's lists and mappings, with its aliases written out."""

    def __init__(self, text: str, label: str) -> None:
        self.label = label
        self.most = max(MOST_VALUES, 2 * len(text))  # a value without an alias takes a character at least
        self.known: dict[int, tuple[int, int] | None] = {}  # None: lists and mappings around the one at hand

    def measure(self, node: yaml.Node, depth: int = 1) -> tuple[int, int]:
        """The levels and the values of a node. Raises PlanError for too many, and for a repeated key."""
        if not isinstance(node, yaml.CollectionNode):
            return 0, 1
        if id(node) not in self.known:
            self.known[id(node)] = None
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                _refuse_repeated_keys(node, self.label)
                parts = [part for pair in node.value for part in pair]
            inner = [part for part in parts if isinstance(part, yaml.CollectionNode)]
            below = [self.measure(part, depth + 1) for part in inner] if depth <= DEEPEST else [(DEEPEST, 1)]
            levels, values = 1 + max((n for n, _ in below), default=0), 1 + len(parts) + sum(n for _, n in below)
            if levels > DEEPEST:
                self._refuse(node, TOO_DEEP)
            if values > self.most:
                self._refuse(node, f"aliases make over {self.most:,} values of it; write out those that you need")
            self.known[id(node)] = levels, values
        measured = self.known[id(node)]
        if measured is None:
            self._refuse(node, "an alias names a list or mapping that it lies in; write out its values")
        return measured

    def _refuse(self, node: yaml.Node, problem: str) -> NoReturn:
        raise PlanError(f"{self.label}: line {node.start_mark.line + 1}: {problem}")


def _refuse_repeated_keys(node: yaml.MappingNode, label: str) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        name = (key.tag, str(key.value))
        if name in first:
            raise PlanError(
                f"{label}: line {line}: {key.value} repeats the key of line {first[name]}; keep one of them"
            )
        first[name] = line
