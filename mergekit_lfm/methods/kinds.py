"""Methods other than merges: how to align, edit, collect statistics, and tune. A name, a source, parameters.

Each is declared beside its code, in the room above that runs it; `recipe.registry` finds them. The functions' types are
those of their rooms, which say what goes in and out (`Aligner`, `Editor`, `Collector`, `Tuner`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from mergekit_lfm.methods.method import Method, Parameter, Value

F = TypeVar("F", bound=Callable[..., Any])
Options = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class AlignMethod(Generic[F]):
    """A way to align a model to another. statistics: whether it reads cross moments of both on the same data.

    idle: parameters without effect when it does. starts: its result depends on an initial transform. widths: it maps
    units of one width onto another. rotates: it mixes the units of groups that may be rotated.
    """

    name: str
    source: str
    summary: str
    find: F
    parameters: tuple[Parameter, ...] = ()
    statistics: Literal["no", "optional", "required"] = "no"
    idle: tuple[str, ...] = ()
    starts: bool = True
    widths: bool = False
    rotates: bool = False


@dataclass(frozen=True, slots=True)
class EditMethod(Generic[F]):
    """A way to edit facts. band: its default layers, as shares of the depth, first and last.

    several: it edits several layers at once.
    """

    name: str
    source: str
    summary: str
    solve: F
    band: tuple[float, float]
    several: bool = True
    parameters: tuple[Parameter, ...] = ()


def _as_they_are(_: str, options: Options) -> Options:
    return options


@dataclass(frozen=True, slots=True)
class StatisticMethod(Generic[F]):
    """A kind of statistic. summary: what it collects, in the words of MODEL. doc: what for, and how.

    examples: options of its command that make sense together. models: of how many models on the same data it is.
    settle(task, options): the options with an effect on a task, or PlanError; they go into the file. outline: the
    entries of a file, as far as they are known before the model runs; None for a statistic that no stage collects.
    """

    name: str
    source: str
    summary: str
    doc: str
    examples: tuple[str, ...]
    start: F
    parameters: tuple[Parameter, ...] = ()
    models: Literal[1, 2] = 1
    settle: Callable[[str, Options], Options] = field(default=_as_they_are)
    outline: Callable[..., Any] | None = None


Makes = Literal["checkpoint", "patch", "adapter", "attachment", "prompt", "mixture", "template"]


@dataclass(frozen=True, slots=True)
class TuneMethod(Generic[F]):
    """A way to tune a model. makes: the model, the tensors that changed, PEFT's adapter, an attached module, a prompt.

    "mixture": of several prompts; "template": around texts. rate: its learning rate by default. needs: a file of
    statistics that it needs. files: the parameter that names files with commas, which it reads; one whose default is ""
    may name none. tasks: whether examples have the number of their data file, `task_ids`, and those of the development
    set the next one. loads: the task for which the model is loaded, where the method makes a classifier of it.
    """

    name: str
    source: str
    summary: str
    makes: Makes
    prepare: F
    rate: float
    parameters: tuple[Parameter, ...] = ()
    needs: Literal["fisher"] | None = None
    files: str | None = None
    tasks: bool = False
    loads: Literal["masked_lm"] | None = None


AnyMethod = Method | AlignMethod[Any] | EditMethod[Any] | StatisticMethod[Any] | TuneMethod[Any]
