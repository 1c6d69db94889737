"""The options of commands that train a model: `tune` and `distill`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.options import F, together
from mergekit_lfm.recipe.training import OPTIMIZERS, SCHEDULES
from mergekit_lfm.runtime.tasks import TUNE_TASKS


def _read_terms(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:  # noqa: ARG001
    terms = dict[str, float]()
    for text in texts:
        name, _, number = text.partition("=")
        try:
            terms[name.strip()] = float(number)
        except ValueError:
            raise click.BadParameter(f"found {text!r}; expected a name and a number, as l2sp=0.01") from None
    return terms


def _read_dev(ctx: click.Context, parameter: click.Parameter, text: str | None) -> str | float | None:  # noqa: ARG001
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _read_groups(
    ctx: click.Context,  # noqa: ARG001
    parameter: click.Parameter,  # noqa: ARG001
    texts: tuple[str, ...],
) -> list[dict[str, str | float]]:
    groups = list[dict[str, str | float]]()
    for text in texts:
        match, *settings = text.split()
        pairs = [setting.partition("=") for setting in settings]
        try:
            groups.append({"match": match, **{name: float(number) for name, _, number in pairs}})
        except ValueError:
            expected = "a pattern, then learning_rate=NUMBER, weight_decay=NUMBER or both"
            raise click.BadParameter(f"found {text!r}; expected {expected}") from None
    return groups


# The data of a training, and the place of its result.
data_options = together(
    click.option(
        "--data",
        required=True,
        multiple=True,
        type=click.Path(path_type=Path),
        help="A data file: .jsonl, .txt or .npz; a folder of images; or package.module:function, which is called and "
        "returns such lines. Can be given several times.",
    ),
    click.option(
        "--task",
        required=True,
        type=click.Choice([*TUNE_TASKS]),
        help="The kind of model, and the loss; see above.",
    ),
    click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder or file to write."),
)
# The steps of a training.
step_options = together(
    click.option(
        "--window",
        type=click.IntRange(min=1),
        help="The most tokens of an example. [default: as many as the model takes; for texts of lm at most 512]",
    ),
    click.option("--steps", type=click.IntRange(min=1), default=200, help="Steps of the optimizer. [default: 200]"),
    click.option("--accumulate", type=click.IntRange(min=1), default=1, help="Cut each batch into this many parts."),
    click.option(
        "--learning-rate",
        type=click.FloatRange(0, min_open=True),
        help="[default: the method's, as `methods NAME` shows]",
    ),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        default="linear",
        help="How the learning rate falls after the warm-up. [default: linear]",
    ),
    click.option("--warmup", type=click.FloatRange(0, 1), default=0.0, help="Share of the steps with a rising rate."),
    click.option(
        "--weight-decay", type=click.FloatRange(0), default=0.0, help="Weight decay of matrices. [default: 0]"
    ),
    click.option(
        "--group",
        "groups",
        multiple=True,
        callback=_read_groups,
        metavar="TEXT",
        help='Parameters with settings of their own: "*.layers.0.* learning_rate=1e-5 weight_decay=0". Several times.',
    ),
    click.option("--clip", type=click.FloatRange(0), help="Largest norm of the gradient, 0 for any. [default: 1]"),
    click.option(
        "--optimizer",
        type=click.Choice(OPTIMIZERS),
        help="Make the steps by AdamW, or by plain descent. [default: adamw]",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, help="Decides all random numbers. [default: 0]"),
    options.device_option("Where the model runs", default=None),
    click.option("--threads", type=click.IntRange(min=1), help="The number of threads. [default: torch's choice]"),
    options.overwrite,
    options.output,
)
# The way of a training on examples.
training_options = together(
    click.option(
        "--dev",
        callback=_read_dev,
        metavar="FILE|SHARE",
        help="A data file, or a share of --data, as 0.1; the state with the least loss on it stays.",
    ),
    click.option("--stats", type=click.Path(path_type=Path), help="For mask: a file of `stats fisher`."),
    click.option(
        "--train",
        multiple=True,
        metavar="PATTERN",
        help="Train, of what the method trains, those parameters alone whose names match, as '*layers.0.*'. Can "
        "be given several times.",
    ),
    options.batch_size_option("a step"),
    click.option(
        "--evaluate-every", type=click.IntRange(min=1), help="Steps between two looks at --dev. [default: all]"
    ),
    click.option(
        "--patience", type=click.IntRange(min=1), help="Stop after this many looks at --dev without a better loss."
    ),
    click.option("--checkpointing", is_flag=True, help="Compute activations again to save memory."),
    click.option("--autocast", is_flag=True, help="Multiply matrices in bfloat16, which is faster on a GPU."),
    step_options,
)


def loss_option(names: Iterable[str], sentence: str) -> Callable[[F], F]:
    """The option `--loss`, of terms with these names."""
    return click.option(
        "--loss",
        multiple=True,
        callback=_read_terms,
        metavar="NAME=NUMBER",
        help=f"{sentence}: {', '.join(names)}. Can be given several times.",
    )
