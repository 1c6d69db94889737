"""Read one YAML document strictly: a repeated key is an error, and errors have their line and column."""

from typing import Any

import yaml

from mergekit_lfm.errors import PlanError


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:  # a date such as 2024-13-45
            problem = (
                f"found {node.value!r:.60}, not a valid {node.tag.rpartition(':')[2]} ({error}); quote it if it is text"
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def read_yaml(text: str, label: str) -> object:
    """The one document in `text`. Raises PlanError with line and column for bad syntax and for a repeated key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise PlanError(f"{label}: it is empty, expected one YAML document")
        _refuse_repeated_keys(node, label, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise PlanError(f"{label}:{at} {error.context or ''} {error.problem}; expected one YAML document") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{label}: not YAML: {error}") from error


def _refuse_repeated_keys(node: yaml.Node, label: str, seen: set[int]) -> None:
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, label, seen)
        return
    first: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = (key.tag, str(key.value))
        if name in first:
            raise PlanError(
                f"{label}: line {line}: {key.value} repeats the key of line {first[name]}; keep one of them"
            )
        first[name] = line
        _refuse_repeated_keys(value, label, seen)
