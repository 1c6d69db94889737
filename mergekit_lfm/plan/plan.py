"""From a recipe and the checkpoints' headers to a plan: all reads, arithmetic and writes. Pure data, no torch.

Every input tensor is merged, copied, or listed as dropped; whatever else differs between the checkpoints is reported,
all of it at once, before a byte is written. The plan's digest covers everything that determines the output's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import xxhash

from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.methods.method import Unit
from mergekit_lfm.methods.registry import METHODS
from mergekit_lfm.output.layout import Shard
from mergekit_lfm.plan.job import Job, unit_of
from mergekit_lfm.plan.matrices import MatrixGroup
from mergekit_lfm.plan.pieces import Stacked
from mergekit_lfm.plan.roles import TensorRef
from mergekit_lfm.plan.sources import ADDED, identity_of
from mergekit_lfm.recipe.parts import Input
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.recipe.rename import RenameRule
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.store.files import read_bytes
from mergekit_lfm.store.state import FileState
from mergekit_lfm.version import __version__
from mergekit_lfm.views.adapted import Adapted, adapted_in
from mergekit_lfm.views.patched import Patched
from mergekit_lfm.views.pending import Pending
from mergekit_lfm.views.renamed import found_rules


class AppliedAdapter(NamedTuple):
    """An adapter of a model in a plan: its kind, the tensors that it changes out of all, its own word for its base."""

    model: str
    adapter: str
    kind: str
    changed: int
    tensors: int
    trained_on: str | None


def _applied(label: str, view: Adapted | Patched) -> Iterator[AppliedAdapter]:
    """The adapters or patches of a view on a model."""
    if isinstance(view, Patched):
        for name, info in zip(view.named, view.infos, strict=True):
            yield AppliedAdapter(label, name, f"patch by {info.method}", len(info.tensors), len(view), None)
    else:
        for adapter, changed in zip(view.adapters, view.changed, strict=True):
            yield AppliedAdapter(label, adapter.label, adapter.kind, changed, len(view), adapter.base)


@dataclass(frozen=True)
class Plan:
    """Everything about a merge that is decided before it starts.

    models: the recipe's `all_models`, whose `template` is the index of the one whose form the output has. statistics:
    the inputs', part by part. added: the edits' changes to the result, float64 by tensor; None without edits, or if
    they are still to be made. norms: of the statistics of each part. part_of: by tensor the index of its part, where
    that is not the first.
    groups: the jobs that are solved together, as indices into `tensors`; matrices: those that the method merges as
    whole matrices. Each job is in one of them. dropped: (model, tensor, reason). files, left_behind, lent: of `Beside`,
    the files that go beside the weights, those that do not, and those that another model than the template has.
    licenses: what the card of each model states. edited_on: the kind of device on which edits of the result are solved,
    "" for the processor. named_files: the states of the recipe's files other than models, before they were read.
    allowed: the differences of the models that the recipe allows. vocabulary: the rows of the template's and of the
    output's, if they differ. made: the bytes of files that the plan makes. notices: about what the recipe leaves open,
    and warnings, which the merge gives, too. stacks: the layers that slices make.
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    tensors: tuple[Job, ...]
    groups: tuple[tuple[int, ...], ...]
    matrices: tuple[MatrixGroup, ...]
    shards: tuple[Shard, ...]
    dropped: tuple[tuple[str, str, str], ...]
    template: int = 0
    statistics: tuple[Statistics, ...] = ()
    added: Checkpoint | None = None
    norms: tuple[tuple[float, ...], ...] = ()
    part_of: Mapping[str, int] = field(default_factory=dict)
    files: tuple[tuple[str, Path], ...] = field(default=())
    left_behind: tuple[tuple[str, str, str], ...] = field(default=())
    lent: tuple[tuple[str, str], ...] = field(default=())
    licenses: tuple[dict[str, str], ...] = field(default=())
    edited_on: str = ""
    named_files: tuple[FileState, ...] = field(default=())
    allowed: tuple[str, ...] = ()
    vocabulary: tuple[int, int] | None = None
    made: tuple[tuple[str, bytes], ...] = ()
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    stacks: tuple[Stacked, ...] = ()

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(model.label for model in self.recipe.all_models)

    @cached_property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The models, beyond them the statistics files, and what edits add: what a job's sources point into."""
        added = () if self.added is None else (self.added,)
        return (*self.models, *(statistics.tensors for statistics in self.statistics), *added)

    @cached_property
    def source_labels(self) -> tuple[str, ...]:
        """The name of each of `sources` in the recipe."""
        added = () if self.added is None else (ADDED,)
        return (*self.labels, *(file.ref for file in self.recipe.statistics), *added)

    @cached_property
    def renamed(self) -> dict[str, tuple[RenameRule, ...]]:
        """The rules that were found for the names of a model, by its label; those of the recipe are not among them."""
        inputs = zip(self.recipe.all_models, self.models, strict=True)
        found = {model.label: found_rules(checkpoint) for model, checkpoint in inputs if not model.rename}
        return {label: rules for label, rules in found.items() if rules}

    @cached_property
    def adapters(self) -> tuple[AppliedAdapter, ...]:
        """The adapters and patches that the models are read with."""
        pairs = zip(self.labels, self.models, strict=True)
        views = [(label, view) for label, model in pairs for view in adapted_in(model)]
        return tuple(each for label, view in views for each in _applied(label, view))

    @property
    def pending(self) -> tuple[Input, ...]:
        """The models whose alignment is still to be found, or that are still to be edited."""
        models = zip(self.recipe.all_models, self.models, strict=True)
        return tuple(model for model, checkpoint in models if isinstance(checkpoint, Pending))

    @property
    def absent(self) -> int:
        """Bytes of the models that are still on the Hub."""
        files = {(str(model.snapshot), file): nbytes for model in self.models for file, nbytes in model.absent.items()}
        return sum(files.values())

    @property
    def unlisted(self) -> tuple[str, ...]:
        """The models on the Hub whose files are only known as far as they are in the cache, offline."""
        models = zip(self.labels, self.models, strict=True)
        return tuple(label for label, m in models if m.snapshot is not None and not m.snapshot.listed)

    @property
    def unedited(self) -> bool:
        """Whether edits are still to be made, of a model or of the result, which needs a model that runs."""
        models = any(model.edits for model in self.pending)
        return models or (bool(self.recipe.result_edits) and self.added is None)

    @cached_property
    def bytes_written(self) -> int:
        return sum(job.nbytes * len(job.names) for job in self.tensors)

    @property
    def bytes_read(self) -> int:
        refs = [ref for job in self.tensors for ref in job.all_inputs]
        refs += [gram for group in self.matrices for gram in group.grams]
        return sum(self.sources[i][name].nbytes for i, name in refs)

    @cached_property
    def grams(self) -> dict[str, tuple[TensorRef, ...]]:
        """The Gram matrices with which weights are merged, by the weight's name."""
        matrices = [matrix for group in self.matrices for matrix in group.matrices]
        return {self.tensors[matrix.weight].name: matrix.grams for matrix in matrices}

    @property
    def averaged(self) -> tuple[Job, ...]:
        """The jobs that are averaged because the method needs statistics and their tensors have none."""
        wanting = {i: part.method for i, part in enumerate(self.recipe.parts) if part.method.statistics is not None}
        return tuple(
            job
            for job in (self.tensors if wanting else ())
            if (method := wanting.get(self.part_of.get(job.name, 0))) and not job.copied and job.method != method.name
        )

    @property
    def left_groups(self) -> dict[tuple[str, str], list[str]]:
        """The files left behind, by model and reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for label, name, why in self.left_behind:
            groups.setdefault((label, why), []).append(name)
        return groups

    @property
    def inputs(self) -> tuple[FileState, ...]:
        """The states, when first seen, of all files that the output is made from; none of those still on the Hub."""
        files = [file.state for source in self.sources for file in source.files]
        return tuple(dict.fromkeys(state for state in (*files, *self.named_files) if state is not None))

    @property
    def places(self) -> dict[str, Path]:
        """The paths that are read and must be apart from the output: models by their labels, others by themselves."""
        models = {label: source.path for label, source in zip(self.source_labels, self.sources, strict=True)}
        return {str(path): path for path in self.paths if path not in models.values()} | models

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folders and files that are read: those of the sources, and the recipe's other files."""
        return (
            *(folder for source in self.sources for folder in source.folders),
            *(state.path for state in self.named_files),
        )

    @property
    def mapped_files(self) -> tuple[Path, ...]:
        """Inputs that torch must map or load, outside --memory: their tensors are not contiguous."""
        return tuple(file.path for model in self.models for file in model.files if file.fallback)

    @cached_property
    def contents(self) -> dict[str, bytes]:
        """The bytes of `files` and `made`, read once: the digest covers them, and the output's are made of them."""
        made = dict(self.made)
        read = {name: read_bytes(path) for name, path in self.files if name not in made}
        return dict(sorted({**read, **made}.items()))

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of all that determines the output's bytes: not of threads, memory, NaN policy or device."""
        facts = {
            "versions": [__version__, version("torch")],
            "methods": {job.method: METHODS[job.method].version for job in self.tensors if job.method in METHODS},
            "recipe": self.recipe.normalised(),
            "inputs": [
                source.identity for source in (*self.models, *(statistics.tensors for statistics in self.statistics))
            ],
            "statistics": [statistics.info.metadata() for statistics in self.statistics],
            "edits": [identity_of(edit) for edit in self.recipe.result_edits],
            **({"edited_on": self.edited_on} if self.edited_on else {}),
            "files": [[name, xxhash.xxh3_128_hexdigest(data)] for name, data in self.contents.items()],
            "licenses": self.licenses,
            "shards": [[shard.name, shard.congruent, *map(str, shard.tensors)] for shard in self.shards],
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())

    def unit(self, jobs: Sequence[Job]) -> Unit:
        """The input of the method's solve for jobs that are solved together."""
        norms = self.norms[self.part_of.get(jobs[0].name, 0)] if self.norms else ()
        return unit_of(jobs, self.recipe.seed, norms)
