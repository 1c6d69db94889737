"""`mergekit-lfm`, the group of all commands."""

from __future__ import annotations

import click

from mergekit_lfm.commands import options
from mergekit_lfm.commands.align import align
from mergekit_lfm.commands.average import average
from mergekit_lfm.commands.barrier import barrier
from mergekit_lfm.commands.curves import curves
from mergekit_lfm.commands.distill import distill
from mergekit_lfm.commands.edit import edit
from mergekit_lfm.commands.eval import evaluate
from mergekit_lfm.commands.export import export
from mergekit_lfm.commands.extract_lora import extract_lora
from mergekit_lfm.commands.generate import generate
from mergekit_lfm.commands.head import head
from mergekit_lfm.commands.init import init
from mergekit_lfm.commands.inspect import inspect, methods
from mergekit_lfm.commands.merge import merge
from mergekit_lfm.commands.mergekit import MergekitGroup
from mergekit_lfm.commands.meta import meta
from mergekit_lfm.commands.meta_teachers import meta_teachers
from mergekit_lfm.commands.offsite import offsite
from mergekit_lfm.commands.patch import patch
from mergekit_lfm.commands.plan import plan
from mergekit_lfm.commands.push import push
from mergekit_lfm.commands.repair import repair
from mergekit_lfm.commands.select import select
from mergekit_lfm.commands.stats import stats
from mergekit_lfm.commands.student import student
from mergekit_lfm.commands.synthesise import synthesise
from mergekit_lfm.commands.trace import trace
from mergekit_lfm.commands.tune import tune
from mergekit_lfm.commands.verify import verify


@click.group(
    cls=MergekitGroup,
    epilog="""\b
Examples:
  mergekit-lfm merge recipe.yaml out/my-model
  mergekit-lfm methods ties
  mergekit-lfm verify out/my-model""",
)
@options.version
def main() -> None:
    """Merge and edit saved models: checkpoints in, a checkpoint out."""


for command in (
    *(init, merge, plan, push, verify, inspect, methods, evaluate),
    *(
        stats,
        align,
        barrier,
        repair,
        edit,
        patch,
        trace,
        extract_lora,
        head,
        student,
        tune,
        distill,
        meta,
        meta_teachers,
        generate,
        average,
        export,
        curves,
        offsite,
        select,
        synthesise,
    ),
):
    main.add_command(command)
