"""Examples from a function of the user's own, `package.module:function`: calling it runs the user's code.

It returns an iterable of mappings, each as a line of a .jsonl file has it, and is called once. Its module is imported
as if Python ran in the working directory.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from mergekit_lfm.errors import PlanError, reason

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_function(text: str) -> bool:
    """Whether a text names a function, and not a file."""
    return FUNCTION.fullmatch(text) is not None and not Path(text).exists()


def write_examples(name: str, folder: Path) -> Path:
    """Call the function, and write its examples as a .jsonl file into the folder.

    Raises PlanError without such a function, and for examples that are not mappings of what JSON has.
    """
    examples = _find(name)()
    if not isinstance(examples, Iterable) or isinstance(examples, str | Mapping):
        raise PlanError(f"{name} returns a {type(examples).__name__}; expected an iterable of mappings. Return a list")
    file = folder / f"{name.replace(':', '.')}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number, example in enumerate(examples):
            try:
                if not isinstance(example, Mapping):
                    raise TypeError(f"a {type(example).__name__} is not a mapping")
                lines.write(json.dumps(dict(example), allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                expected = 'a mapping as on a line of .jsonl, such as {"text": ...}'
                raise PlanError(f"{name}: example {number}: {error}; expected {expected}") from None
    return file


def _find(name: str) -> Callable[[], object]:
    module, _, function = name.partition(":")
    with _here_first():
        try:
            found: object = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise PlanError(
                f"{name} cannot be imported ({reason(error)}); expected a function in a module of the working "
                "directory, or in one that is installed. Correct the name, or give a file"
            ) from error
    if not callable(found):
        raise PlanError(f"{name} is a {type(found).__name__}; expected a function. Correct the name")
    return found


@contextmanager
def _here_first() -> Iterator[None]:
    """The working directory is the first place where modules are looked for."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
