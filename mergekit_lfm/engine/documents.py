"""The files beside the weights: index, config, tokenizer files, model card, and the lock.

The lock (merge.lock.json) holds the normalised recipe, the identity of every input, versions, and per tensor the method
and the xxh3-128 of its bytes and of those of its inputs: enough to verify the output and to see how it was made. It has
digests of the other files, of the shards' headers and of itself, and no time of day or of a file and no absolute path,
so that the same merge gives the same lock.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from mergekit_lfm.arch.heads import HEAD, LABEL_KEYS, trunk_of
from mergekit_lfm.arch.ties import is_tied, tied_names
from mergekit_lfm.artifacts.facts import as_facts
from mergekit_lfm.artifacts.patch import PatchInfo
from mergekit_lfm.engine.digests import input_digests
from mergekit_lfm.engine.public import names_of, own_text, public_recipe, short_recipe
from mergekit_lfm.errors import FormatError
from mergekit_lfm.output.card import CARD, CONFIG, Source, find_loader, model_card, recipe_text
from mergekit_lfm.output.journal import Receipt
from mergekit_lfm.output.layout import Index, indexes_of
from mergekit_lfm.output.lock import FORMAT, LOCK, encode_lock
from mergekit_lfm.output.names import last_name
from mergekit_lfm.plan.pieces import stacked_config
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.align import AlignRequest
from mergekit_lfm.recipe.registry import ALIGN_METHODS, EDIT_METHODS
from mergekit_lfm.store.files import parse_json
from mergekit_lfm.store.hub import HubName
from mergekit_lfm.store.tensors import FLOATS
from mergekit_lfm.version import versions
from mergekit_lfm.views.patched import Changes, Patched

DTYPE_KEYS = ("dtype", "torch_dtype")
QUANTISATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Documents:
    """Every file of a plan's output but the shards. They are made before the work; the lock's digests come after it.

    name: the output's, the title of its card.
    """

    plan: Plan
    name: str

    def check(self) -> None:
        """Make all that can be made before the work. Raises FormatError if a file cannot be written."""
        _ = self.files
        with _explain(LOCK):
            _json(self._facts)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The files that the lock covers, by name."""
        plan, files, paths = self.plan, dict[str, bytes](), dict(self.plan.files)
        for name, data in plan.contents.items():
            with _explain(paths.get(name, name)):
                files[name] = _without_paths(data)
                if name == "config.json":
                    files[name] = _config(files[name], plan)
        for index in indexes_of(plan.shards):
            with _explain(index.name):
                files[index.name] = _encode_index(index)
        with _explain(CARD):
            files[CONFIG] = recipe_text(short_recipe(plan)).encode()
            if plan.recipe.card:
                files[CARD] = _card(plan, self.name, files).encode()
        return files

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The entries of the lock about the plan: all but the tensors."""
        plan, names = self.plan, names_of(self.plan)
        return {
            "format": FORMAT,
            "plan": plan.digest,
            "versions": versions("torch"),
            "recipe": public_recipe(plan),
            **({} if (text := own_text(plan)) is None else {"recipe_text": text}),
            "inputs": [
                {"model": names[label], "files": model.identity}
                for label, model in zip(plan.labels, plan.models, strict=True)
            ],
            "statistics": [
                {
                    "statistics": names[file.ref],
                    "kind": statistics.info.kind,
                    "data": statistics.info.data,
                    "files": statistics.tensors.identity,
                }
                for file, statistics in zip(plan.recipe.statistics, plan.statistics, strict=True)
            ],
            "segments": {name: job.segment_numel for job in plan.tensors if job.segments > 1 for name in job.names},
            "files": {name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(self.files.items())},
            "headers": {shard.name: xxhash.xxh3_128_hexdigest(shard.header) for shard in plan.shards},
            **({"allowed": list(plan.allowed)} if plan.allowed else {}),
            "dropped": [{"model": names[m], "tensor": t, "reason": why} for m, t, why in plan.dropped],
        }

    def lock(self, receipts: Mapping[tuple[str, int], Receipt]) -> tuple[bytes, str]:
        """The lock of an output whose segments have these receipts, and the digest in it."""
        plan = self.plan
        shards = {spec.name: shard.name for shard in plan.shards for spec in shard.tensors}
        tensors = {
            name: {
                "method": job.method,
                "dtype": job.dtype,
                "shape": list(job.shape),
                "file": shards[name],
                "xxh3": [receipts[name, segment].xxh3 for segment in range(job.segments)],
                **({"inputs": digests} if (digests := input_digests(job, receipts)) else {}),
            }
            for job in plan.tensors
            for name in job.names
        }
        nonfinite = sorted({where for receipt in receipts.values() for where in receipt.nonfinite})
        return encode_lock({**self._facts, "nonfinite": nonfinite, "tensors": tensors})


@contextmanager
def _explain(file: object) -> Iterator[None]:
    """Raise FormatError about a file that is made of data that no file can hold."""
    try:
        yield
    except UnicodeEncodeError as error:
        part = error.object[max(0, error.start - 20) : error.end]
        raise FormatError(
            f"{file} cannot be written to the output: {part!r} in it ends in half of a character, expected Unicode "
            "text; correct the model's file, or rename what has this name"
        ) from None


def _without_paths(raw: bytes) -> bytes:
    """A JSON file without the folder on some machine that transformers records as the model's; else the same bytes."""
    if b'name_or_path"' not in raw:
        return raw
    try:
        data = parse_json(raw, "a file beside the weights")
    except FormatError:
        return raw
    before = deepcopy(data)
    for part in _parts(data) if isinstance(data, dict) else ():
        for key in ("_name_or_path", "name_or_path"):
            if isinstance(part.get(key), str) and last_name(part[key]) != part[key]:
                del part[key]
    return raw if data == before else _json(data)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _config(raw: bytes, plan: Plan) -> bytes:
    """The template's config with the dtype that most output tensors have; its own bytes if that changes nothing.

    In a part of the config, such as text_config, the dtype is replaced if it was that of the whole, or if all output
    tensors have one dtype. The key of a quantisation is left out if the template is dequantised. Choices of the recipe
    that change the model's form show, too.
    """
    floats = Counter(job.dtype for job in plan.tensors if job.dtype in FLOATS)
    if not floats:
        return raw
    dtype = floats.most_common(1)[0][0]
    before = parse_json(raw, "config.json")
    config = stacked_config(before, plan.stacks, plan.models)
    template = plan.models[plan.template].config
    for key in (key for key in QUANTISATION_KEYS if key in config and key not in template):
        del config[key]
    _fit(config, plan)
    old = [config[key] for key in DTYPE_KEYS if config.get(key)]
    for part in _parts(config):
        named = [key for key in DTYPE_KEYS if key in part]
        part.update({key: dtype for key in named if part is config or len(floats) == 1 or part[key] in old})
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = dtype
    return raw if config == before else _json(config)


def _fit(config: dict[str, Any], plan: Plan) -> None:
    """Change what a recipe's choices change: the length of the vocabulary, the class and labels with the head.

    So is whether the head is the embedding: a head of its own would be lost by loaders that tie it.
    """
    before, rows = plan.vocabulary or (0, 0)
    for part in _parts(config) if plan.vocabulary is not None else ():
        if isinstance(size := part.get("vocab_size"), int) and (size == before or size > rows):
            part["vocab_size"] = rows
    for job in plan.tensors:
        keeper = next(iter(job.match.sources.values()))[0]
        if len(job.match.sources) == 1 and keeper != plan.template and HEAD.search(job.name):
            theirs = plan.models[keeper].config
            config.update({key: theirs[key] for key in ("architectures", *LABEL_KEYS) if key in theirs})
    if plan.recipe.heads == "drop":
        _drop_head(config)
    if is_tied(config) and _has_own_head(plan):
        config["tie_word_embeddings"] = False
        for part in _parts(config):
            part.update({key: False for key in ("tie_word_embeddings",) if key in part})


def _drop_head(config: dict[str, Any]) -> None:
    """Name the class without a head in a config, where it is known, and leave out the labels."""
    kinds = [trunk_of(str(kind), str(config.get("model_type", ""))) for kind in config.get("architectures") or ()]
    for key in LABEL_KEYS:
        config.pop(key, None)
    if kinds and None not in kinds:
        config["architectures"] = kinds
    else:
        config.pop("architectures", None)


def _has_own_head(plan: Plan) -> bool:
    """True if the output has a head that is not its embedding: of a model that does not tie its own."""
    jobs = {name: job for job in plan.tensors for name in job.names}
    groups = ([jobs[name] for name in group] for group in tied_names(jobs))
    others = (job for one, *others in groups for job in others if job is not one and job.shape == one.shape)
    return any(not is_tied(plan.models[i].config) for job in others for i, _ in job.match.sources.values())


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and all configs inside it that describe parts of the model."""
    yield config
    for key, value in list(config.items()):
        if isinstance(value, dict) and key not in QUANTISATION_KEYS:
            yield from _parts(value)


def _encode_index(index: Index) -> bytes:
    specs = [spec for shard in index.shards for spec in shard.tensors]
    totals = {"total_parameters": sum(spec.numel for spec in specs), "total_size": sum(spec.nbytes for spec in specs)}
    return _json({"metadata": totals, "weight_map": index.weight_map})


def _card(plan: Plan, name: str, files: Mapping[str, bytes]) -> str:
    """The model card: a front matter for the Hub, the sources, edited facts, how to load it, the recipe."""
    dtypes = ", ".join(sorted({job.dtype for job in plan.tensors}))
    return model_card(
        name=name,
        methods=_methods(plan),
        numbers=f"{len(plan.tensors)} tensors, {sum(job.spec.numel for job in plan.tensors):,} numbers, {dtypes}",
        sources=list(_sources(plan)),
        facts=_taught(plan),
        loader=find_loader(name, files, [shard.name for shard in plan.shards]),
        recipe=recipe_text(short_recipe(plan)),
        lock=LOCK,
    )


def _sources(plan: Plan) -> Iterator[Source]:
    """The models of the card, each once, though slices may have it twice."""
    names, base, seen = names_of(plan), plan.recipe.base, set[object]()
    models = zip(plan.recipe.all_models, plan.licenses, plan.models, strict=True)
    for model, license, checkpoint in models:
        if not plan.stacks or model.source not in seen:
            repo = None if checkpoint.snapshot is None else checkpoint.snapshot.repo
            yield Source(names[model.label], " (base)" if base and model.label == base.label else "", license, repo)
            hub = [
                (adapter.ref, adapter.source.repo) for adapter in model.adapters if isinstance(adapter.source, HubName)
            ]
            yield from (Source(ref, " (adapter)", {}, repo) for ref, repo in hub)
        seen.add(model.source)


def _patches(plan: Plan) -> list[PatchInfo]:
    """The headers of all patches that the plan applies."""
    views = [*plan.models, *([] if plan.added is None else [plan.added])]
    return [info for view in views if isinstance(view, Patched | Changes) for info in view.infos]


def _methods(plan: Plan) -> dict[str, str]:
    """The methods that make the output, each with its source."""
    merges, patches = plan.recipe.methods, _patches(plan)
    requests = [model.align for model in plan.recipe.all_models if isinstance(model.align, AlignRequest)]
    methods = {merge.name: merge.source for merge in merges} if len(plan.models) > 1 else {}
    methods |= {request.method: ALIGN_METHODS[request.method].source for request in requests}
    methods |= {info.method: EDIT_METHODS[info.method].source for info in patches if info.method in EDIT_METHODS}
    return methods or {merges[0].name: ""}


def _taught(plan: Plan) -> list[str]:
    """The facts that the edits teach, one line each."""
    files = [as_facts(info.facts) for info in _patches(plan) if info.facts]
    facts = {fact.text: fact for file in files for fact in file.facts}
    was = {text: f" (before: {fact.target_true.strip()})" if fact.target_true else "" for text, fact in facts.items()}
    return [f"{text}{fact.continuation}{was[text]}" for text, fact in facts.items()]
