"""`extract_lora`: from a fine-tuned model and its base to an adapter that makes the one of the other."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mergekit_lfm.api.arguments import StrPath, as_bytes, expand
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.engine.extraction import Extractor, Ranks, Reduced, threads_for
from mergekit_lfm.errors import PlanError, did_you_mean, shorten
from mergekit_lfm.machine.devices import find_gpu
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import default_memory, default_threads
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.adapter import AdapterOutput, new_adapter
from mergekit_lfm.output.card import read_license
from mergekit_lfm.output.save import check_out
from mergekit_lfm.plan.extraction import EXCLUDED, Extraction, plan_extraction
from mergekit_lfm.plan.groups import WORDS, Selection
from mergekit_lfm.store.folder import ADAPTER_WEIGHTS
from mergekit_lfm.store.hub import hub_name
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.quantisation import dequantise

NO_ROOM = "no rank fits into the size"
ENTRY = 150  # bytes of a tensor in a header besides its name, at most
RANK = 32  # where nothing says how many
LABELS = re.compile(r"^(classifier(\.out_proj)?|score)\.weight$")  # has a row for each
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Whole:
    """A changed tensor that is not a product in the adapter: |D|^2, and why it is not in the adapter, "" if it is."""

    name: str
    energy: float
    why: str = ""


@dataclass(frozen=True)
class Extracted:
    """An adapter's contents. reduced: its products. saved: the tensors that it holds whole. dropped: changes it lacks.

    unchanged: the number of other tensors. nbytes: of its file.
    """

    reduced: tuple[Reduced, ...]
    saved: tuple[Whole, ...]
    dropped: tuple[Whole, ...]
    unchanged: int
    nbytes: int

    @property
    def energy(self) -> float:
        """|D|^2 of all that changed."""
        whole = sum(each.energy for each in (*self.saved, *self.dropped))
        return sum(each.energy for each in self.reduced) + whole

    @property
    def kept(self) -> float:
        """The share of the energy that the adapter keeps, 1 if nothing changed."""
        kept = sum(each.kept for each in self.reduced) + sum(each.energy for each in self.saved)
        return kept / self.energy if self.energy else 1.0


def extract_lora(
    model: StrPath,
    base: StrPath,
    out: StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    size: int | str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    save: Sequence[str] = (),
    embed_lora: bool = False,
    exact: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Extracted]:
    """Write the change from a base to a fine-tuned model as a LoRA for PEFT: every matrix's best one of its rank.

    One of: rank, for all matrices (32 without any of the three); energy, the share of each matrix's |D|^2 to keep, from
    0 to 1; size, bytes for the adapter, spent where they keep most. include, exclude: regular expressions; only tensors
    with one of the first in their names and none of the second. save: modules to save whole. embed_lora: embeddings and
    heads as products, too. exact: decompose without random numbers. dtype: of the products; tensors that are saved
    whole keep theirs. memory: bytes, or text such as "4GB", for what is decomposed at a time.

    Other tensors are saved whole if they changed and PEFT can; the outcome names changes that are lost. Models are
    paths, names on the Hub, or MODEL+ADAPTER. Raises PlanError if they differ in more than values, or nothing changed.
    """
    started, target = time.monotonic(), expand(out)
    ranks = _ranks(rank, energy, as_bytes(size), exact=exact)
    selection = Selection(_expressions(include), _expressions(exclude), _expressions(save), embed_lora)
    if dtype not in DTYPES:
        raise PlanError(f"found dtype {dtype!r}, expected one of {', '.join(DTYPES)}; {did_you_mean(dtype, DTYPES)}")
    ours, theirs = dequantise(open_model(model)), dequantise(open_model(base))
    inputs = {str(path): path for side in (ours, theirs) for path in side.folders}
    check_out(target, inputs, overwrite=overwrite)
    plan = plan_extraction(ours, theirs, (str(model), str(base)), selection)
    gpu = find_gpu(device)
    place = torch.device("cpu") if gpu is None else gpu
    extractor = Extractor(plan, ranks, getattr(torch, dtype), place, 1, lambda _: None)
    wanted = (threads or default_threads()) if gpu is None else 1
    most = default_memory() if memory is None else as_bytes(memory)
    assert most is not None
    count = threads_for(extractor, wanted, most, stated=memory is not None)
    for side in (ours, theirs):
        side.fetch(progress)
    with progress.by_bytes(_work(plan, 2 if ranks.nbytes is not None else 1), "extracting") as done:
        extracted = _extract(replace(extractor, threads=count, done=done), target, str(base))
    lost = [each for each in extracted.dropped if each.why != EXCLUDED]
    findings = [f"the adapter lacks {_names(lost)}: {lost[0].why}"] if lost else []
    if plan.unties and any(WORDS.search(each.name.removesuffix(".weight")) for each in extracted.saved):
        findings.append(
            f"with PEFT the head of {model} keeps the base's embedding, which is tied to it, and was changed"
        )
    return Outcome(target, extracted, warnings=warn_of(findings), seconds=time.monotonic() - started)


def _ranks(rank: int | None, energy: float | None, nbytes: int | None, *, exact: bool) -> Ranks:
    """How ranks are chosen. Raises PlanError for values out of range, and for more than one."""
    given = {"rank": rank, "energy": energy, "size": nbytes}
    stated = [name for name, value in given.items() if value is not None]
    if len(stated) > 1:
        raise PlanError(f"found {' and '.join(stated)}, expected one of rank, energy and size; leave out the others")
    if rank is not None and rank < 1:
        raise PlanError(f"found rank {rank}, expected 1 or more; choose another")
    if energy is not None and not 0 < energy <= 1:
        raise PlanError(f"found energy {energy}, expected a share above 0 and at most 1; choose another")
    return Ranks(rank if stated else RANK, energy, nbytes, exact)


def _expressions(texts: Sequence[str]) -> tuple[str, ...]:
    """The regular expressions. Raises PlanError for one that is wrong."""
    for text in texts:
        try:
            re.compile(text)
        except re.error as error:
            raise PlanError(f"found {text!r}, expected a regular expression ({error}); correct it") from None
    return tuple(texts)


def _work(plan: Extraction, passes: int) -> int:
    """Bytes to compare and to decompose, the latter in so many passes."""
    matrices = sum(plan.model[name].nbytes for group in plan.groups for name in group.names)
    return passes * matrices + sum(plan.model[name].nbytes for name in plan.compared)


def _names(tensors: Sequence[Whole]) -> str:
    return shorten([each.name for each in tensors], 3)


def output_of(plan: Extraction, base: str) -> AdapterOutput:
    """The facts in the files of an adapter for the planned model, and for a base as its user names it."""
    architecture = next(iter(plan.model.config.get("architectures") or []), None)
    name = None if Path(base).expanduser().exists() else hub_name(base)
    return AdapterOutput(
        names=plan.running,
        base=base,
        architecture=architecture if isinstance(architecture, str) else None,
        labels=_labels(plan),
        fan_in_fan_out=plan.turned,
        tied=plan.tied,
        repo=None if name is None else name.repo,
        license=read_license(plan.base.path),
    )


def _labels(plan: Extraction) -> int | None:
    """The number of a classifier's labels, if it has a head of its own."""
    heads = (name for name, running in plan.names.items() if LABELS.search(running))
    return next((plan.model[name].shape[0] for name in heads), None)


def _extract(extractor: Extractor, target: Path, base: str) -> Extracted:
    """Compare, decompose, and write the adapter."""
    plan = extractor.plan
    changed = extractor.changed(plan.compared)
    modules = plan.save_with([module for module, own in plan.modules.items() if not changed.keys().isdisjoint(own)])
    saved = [*(name for name in plan.biases if name in changed)]
    saved += [name for module, own in plan.modules.items() if module in modules for name in own]
    ranks: Mapping[str, int] = {}
    if extractor.ranks.rank is not None:
        ranks = {group.name: min(extractor.ranks.rank, group.most) for group in plan.groups}
    elif extractor.ranks.nbytes is not None:
        ranks = extractor.share(plan.groups, _rest(plan, saved, extractor.ranks.nbytes))
    sizes = {group.name: len(group.names) for group in plan.groups}
    with new_adapter(target, output_of(plan, base)) as adapter:
        reduced = extractor.write(adapter, plan.groups, ranks)
        for name in saved:
            adapter.save(plan.names[name], plan.model.read(name).view(plan.model[name].shape))
        lost = {name: why for name, why in plan.lost.items() if name in changed and name not in saved}
        dropped = [Whole(name, changed[name], why) for name, why in lost.items()]
        dropped += [Whole(each.name, each.energy, NO_ROOM) for each in reduced if not each.rank]
        if not (saved or any(each.rank for each in reduced)):
            more = f" but in {_names(dropped)}: {dropped[0].why}" if dropped else ""
            raise PlanError(f"nothing to extract: the models have the same values{more}; give others, or take more")
        extracted = Extracted(
            tuple(each for each in reduced if each.rank),
            tuple(Whole(name, changed.get(name, 0.0)) for name in saved),
            tuple(dropped),
            len(plan.names) - len(changed) - sum(sizes[each.name] for each in reduced),
            0,
        )
        adapter.about = _about(extracted)
    return replace(extracted, nbytes=(target / ADAPTER_WEIGHTS[0]).stat().st_size)


def _rest(plan: Extraction, saved: Sequence[str], nbytes: int) -> int:
    """The bytes that saved tensors leave, and the file's header. Raises PlanError if they take all."""
    taken = sum(plan.model[name].nbytes + ENTRY + len(plan.names[name]) for name in saved)
    taken += sum(2 * (ENTRY + len(group.module)) for group in plan.groups)
    if taken >= nbytes:
        whole = f" and the tensors that are saved whole, {shorten(saved, 3)}" if saved else ""
        raise PlanError(
            f"found a size of {format_size(nbytes)}, expected more than {format_size(taken)}, for the header{whole}; "
            "give more, or exclude some"
        )
    return nbytes - taken


def _about(extracted: Extracted) -> str:
    """The part of the model card about the contents."""
    ranks = sorted({each.rank for each in extracted.reduced})
    rows = {
        "matrices as products": len(extracted.reduced),
        "their ranks": " to ".join(map(str, dict.fromkeys([*ranks[:1], *ranks[-1:]]))),
        "tensors whole": len(extracted.saved),
        "changed tensors that it lacks": len(extracted.dropped),
        "kept of the change": f"{extracted.kept:.2%} of the sum of its squares",
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in rows.items() if value)
    return f"Extracted from a fine-tuned model:\n\n{lines}"
