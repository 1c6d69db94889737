"""Options of mergekit's programs, which ours take as well: each sets one of ours, or a notice says why it need not.

OPTIONS are those of mergekit-yaml for `merge`, EXTRACTING those of mergekit-extract-lora. They are hidden from the
help. `docs/from-mergekit.md` has these tables for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from mergekit_lfm.commands.shell import Command, Group, Size

F = TypeVar("F", bound=Callable[..., Any])
_GIVEN = f"{__name__}.given"  # where a click context has the options of mergekit and their values


class _ShardSize(Size):
    """A size, which may also be 5B as in mergekit: five billion bytes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip()
        return super().convert(f"{text[:-1]}GB" if text[:-1].isdecimal() and text[-1] in "bB" else text, param, ctx)


@dataclass(frozen=True, slots=True)
class MergekitOption:
    """An option of mergekit's. type: of its value, None for a switch; many: it may be given several times.

    sets, to: the parameter of ours that it sets, and to what, None for its own value. here: the option of ours with
    the same effect. why: it needs nothing here; or, if it is `ignored`, what to do instead.
    """

    flag: str
    type: click.ParamType[Any] | None = None
    sets: str = ""
    to: object = None
    here: str = ""
    why: str = ""
    ignored: bool = False
    short: str = ""
    many: bool = False

    @property
    def notice(self) -> str:
        """One line about an option that sets nothing."""
        return f"{self.flag} {'has no effect' if self.ignored else 'needs nothing'} here: {self.why}"


def _ignore(flag: str, why: str, type: click.ParamType[Any] | None = None) -> MergekitOption:
    return MergekitOption(flag, type, why=why, ignored=True)


OPTIONS = (
    MergekitOption("--cuda", sets="device", to="cuda", here="--device cuda"),
    MergekitOption("--gpu-rich", sets="device", to="cuda", here="--device cuda"),
    MergekitOption("--out-shard-size", _ShardSize(), sets="max_shard_size", here="--max-shard-size"),
    MergekitOption("--random-seed", click.IntRange(0, 2**64 - 1), sets="seed", here="--seed"),
    MergekitOption("--num-threads", click.IntRange(min=1), sets="threads", here="--threads", short="-j"),
    MergekitOption("--no-write-model-card", sets="no_card", to=True, here="--no-card"),
    MergekitOption("--write-model-card", why="a model card is written unless --no-card is given"),
    MergekitOption("--copy-tokenizer", why="the tokenizer is always copied"),
    _ignore("--no-copy-tokenizer", "the tokenizer is always copied; remove its files from the output"),
    MergekitOption("--safe-serialization", why="the output is always safetensors"),
    _ignore("--no-safe-serialization", "the output is always safetensors"),
    MergekitOption("--lazy-unpickle", why="checkpoints are always read tensor by tensor"),
    MergekitOption("--low-cpu-memory", why="tensors are streamed; --memory limits the memory that they take"),
    MergekitOption("--read-to-gpu", why="with --device cuda blocks go straight to the GPU"),
    _ignore("--multi-gpu", "a merge runs on one device; choose it with --device"),
    MergekitOption("--async-write", why="threads write while others compute"),
    MergekitOption("--write-threads", click.INT, why="every thread writes its own results; --threads is their number"),
    MergekitOption("--clone-tensors", why="the output is written in place, without copies of its tensors"),
    MergekitOption("--trust-remote-code", why="a model's code never runs in a merge"),
    _ignore("--allow-crimes", "name the facts in which the models may differ: `allow: [model_type]` in the recipe"),
    _ignore("--unsafe-truncate-embeddings", "write `rows: crop` in the recipe"),
    _ignore("--transformers-cache", "models lie in the Hub's shared cache; HF_HUB_CACHE moves it", click.STRING),
    _ignore("--lora-merge-cache", "adapters are applied while their model is read", click.STRING),
    _ignore("--lora-merge-dtype", "adapters are applied in float32, or float64, and rounded once", click.STRING),
)
_ALIKE = (
    "--safe-serialization",
    "--no-safe-serialization",
    "--lazy-unpickle",
    "--low-cpu-memory",
    "--transformers-cache",
)
EXTRACTING = (
    MergekitOption("--max-rank", click.IntRange(min=1), sets="rank", here="--rank"),
    MergekitOption("--include-regex", click.STRING, sets="include", here="--include", short="-i", many=True),
    MergekitOption("--exclude-regex", click.STRING, sets="exclude", here="--exclude", short="-e", many=True),
    MergekitOption("--save-module", click.STRING, sets="save", here="--save", many=True),
    MergekitOption("--cuda", sets="device", to="cuda", here="--device cuda"),
    MergekitOption("--num-threads", click.IntRange(min=1), sets="threads", here="--threads", short="-j"),
    MergekitOption("--distribute-scale", why="both factors have the roots of the singular values"),
    _ignore("--no-distribute-scale", "both factors have the roots of the singular values"),
    _ignore("--sv-epsilon", "--energy keeps as many singular values as matter", click.FLOAT),
    _ignore("--skip-undecomposable", "exclude the names of the modules: --exclude norm"),
    _ignore("--random-seed", "the random numbers of a tensor depend on its name alone", click.INT),
    *(option for option in OPTIONS if option.flag in _ALIKE),
)
# Switches that name mergekit's default, which is also ours.
DEFAULTS = (
    *("--no-allow-crimes", "--no-unsafe-truncate-embeddings", "--no-trust-remote-code", "--no-quiet", "--no-cuda"),
    *("--no-low-cpu-memory", "--no-read-to-gpu", "--no-multi-gpu", "--no-lazy-unpickle", "--no-async-write"),
    "--no-clone-tensors",
)


# The programs of mergekit: what does the same here, or what to know.
PROGRAMS = {
    "mergekit-yaml": "`merge RECIPE OUT`, with the same recipe and options",
    "mergekit-multi": "`merge RECIPE OUT`, with the same recipe of several documents; their results lie in OUT.stages",
    "mergekit-pytorch": "`merge RECIPE OUT`: models may be single files; `tensors: common` is --tensor-intersection",
    "mergekit-moe": "not supported in this version",
    "mergekit-extract-lora": "`mergekit-lfm extract-lora FINETUNED --base BASE -o OUT`; the other options are the same",
    "mergekit-tokensurgeon": "not supported in this version",
    "mergekit-evolve": "not supported in this version",
    "mergekit-legacy": "write a recipe; `mergekit-lfm init MODEL ...` begins one",
    "mergekit-layershuffle": "write a recipe with `slices`",
    "bakllama": "write a recipe with `slices`",
}


class MergekitGroup(Group):
    """A group of commands that knows the programs of mergekit by their names."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; a usage error, with the way here, for a program of mergekit."""
        names = [name for name in (args[0], f"mergekit-{args[0]}") if name in PROGRAMS]
        if names and args[0] not in self.commands:
            raise click.UsageError(f"{names[0]} is a program of mergekit; here: {PROGRAMS[names[0]]}", ctx)
        return super().resolve_command(ctx, args)


def mergekit_options(options: Sequence[MergekitOption], defaults: Sequence[str]) -> Callable[[F], F]:
    """Add hidden options of mergekit's to a command."""
    return lambda command: _add_options(command, options, defaults)


def _add_options(command: F, options: Sequence[MergekitOption], defaults: Sequence[str]) -> F:
    for option in options:
        switch = option.type is None
        text = f"As {option.here}." if option.here else f"{option.why}."
        names = [name for name in (option.short, option.flag) if name]
        how: dict[str, Any] = {"is_flag": True} if switch else {"type": option.type, "multiple": option.many}
        command = click.option(*names, hidden=True, expose_value=False, callback=_note(option), help=text, **how)(
            command
        )
    for flag in defaults:
        command = click.option(flag, is_flag=True, hidden=True, expose_value=False, help="The default.")(command)
    return command


def _note(option: MergekitOption) -> Callable[[click.Context, click.Parameter, Any], None]:
    def note(ctx: click.Context, param: click.Parameter, value: Any) -> None:  # noqa: ARG001
        if value not in (None, False, ()):
            ctx.meta.setdefault(_GIVEN, []).append((option, value))

    return note


class MergekitCommand(Command):
    """A command that takes options of mergekit's."""

    def read_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options, and set ours as those of mergekit say."""
        rest = super().read_args(ctx, args)
        for option, value in ctx.meta.get(_GIVEN, ()):
            if not option.sets:
                continue
            wanted = value if option.to is None else option.to
            given = ctx.get_parameter_source(option.sets) is not ParameterSource.DEFAULT
            if given and ctx.params[option.sets] != wanted:
                ours = option.here.partition(" ")[0]
                raise click.UsageError(
                    f"found {option.flag} and {ours}, which say different things; give one of them", ctx
                )
            ctx.params[option.sets] = wanted
        return rest


def mergekit_notices(ctx: click.Context) -> Iterator[str]:
    """A line for each option of mergekit that has set nothing."""
    return (option.notice for option, _ in ctx.meta.get(_GIVEN, ()) if not option.sets)
