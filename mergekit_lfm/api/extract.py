"""`extract_lora`: from a fine-tuned model and its base to an adapter that makes the one of the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_lfm.api.arguments import StrPath, as_bytes, expand
from mergekit_lfm.api.extraction_plans import PlannedExtraction, plan_extract
from mergekit_lfm.api.outcome import Outcome, warn_of
from mergekit_lfm.engine.extraction import Extractor, Ranks, Reduced, threads_for
from mergekit_lfm.errors import PlanError, shorten
from mergekit_lfm.machine.devices import find_gpu
from mergekit_lfm.machine.progress import SILENCE, Progress
from mergekit_lfm.machine.resources import default_memory, default_threads
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.output.adapter import new_adapter
from mergekit_lfm.output.request import result_of
from mergekit_lfm.plan.extraction import EXCLUDED, Extraction
from mergekit_lfm.plan.groups import WORDS
from mergekit_lfm.recipe.extract_recipe import ExtractRecipe
from mergekit_lfm.store.folder import ADAPTER_WEIGHTS

NO_ROOM = "no rank fits into the size"
ENTRY = 150  # bytes of a tensor in a header besides its name, at most


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
    data: dict[str, Any] = {"job": "extract", "model": model, "base_model": base, "dtype": dtype}
    data |= {"rank": rank, "energy": energy, "size": as_bytes(size), "embed_lora": embed_lora, "exact": exact}
    data |= {"include": list(include), "exclude": list(exclude), "save": list(save)}
    planned = plan_extract(ExtractRecipe.parse(data, label="extraction"), expand(out), device=device)
    return extract_planned(planned, memory=memory, threads=threads, overwrite=overwrite, progress=progress)


def extract_planned(
    planned: PlannedExtraction,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENCE,
) -> Outcome[Extracted]:
    """Write the adapter of a planned extraction; options and outcome as of `extract_lora`."""
    started, request = time.monotonic(), planned.request
    there = request.is_answered(planned.out, overwrite=overwrite)
    extracted = _read_result(planned.out) if there else _carry_out(planned, as_bytes(memory), threads, progress)
    warnings = warn_of([*planned.notices, *_findings(planned.plan, extracted, planned.recipe.model)])
    return Outcome(planned.out, extracted, request.digest, there, warnings, time.monotonic() - started)


def _carry_out(planned: PlannedExtraction, memory: int | None, threads: int | None, progress: Progress) -> Extracted:
    """Write the adapter of a planned extraction."""
    plan, recipe = planned.plan, planned.recipe
    stated = recipe.normalised()
    ranks = Ranks(stated.get("rank"), recipe.energy, recipe.size, recipe.exact)
    gpu = find_gpu(planned.device)
    place = torch.device("cpu") if gpu is None else gpu
    extractor = Extractor(plan, ranks, getattr(torch, stated["dtype"]), place, 1, lambda _: None)
    wanted = (threads or default_threads()) if gpu is None else 1
    count = threads_for(extractor, wanted, memory or default_memory(), stated=memory is not None)
    for side in (plan.model, plan.base):
        side.fetch(progress)
    with progress.by_bytes(_work(plan, 2 if ranks.nbytes is not None else 1), "extracting") as done:
        return _extract(replace(extractor, threads=count, done=done), planned)


def _findings(plan: Extraction, extracted: Extracted, model: str) -> list[str]:
    """The facts about the adapter that a user should know."""
    lost = [each for each in extracted.dropped if each.why != EXCLUDED]
    findings = [f"the adapter lacks {_names(lost)}: {lost[0].why}"] if lost else []
    if plan.unties and any(WORDS.search(each.name.removesuffix(".weight")) for each in extracted.saved):
        findings.append(
            f"with PEFT the head of {model} keeps the base's embedding, which is tied to it, and was changed"
        )
    return findings


def _read_result(out: Path) -> Extracted:
    """The contents of an adapter that an earlier run has made, from its lock."""
    result = result_of(out)
    return Extracted(
        tuple(Reduced(**{**each, "shape": tuple(each["shape"])}) for each in result["reduced"]),
        tuple(Whole(**each) for each in result["saved"]),
        tuple(Whole(**each) for each in result["dropped"]),
        result["unchanged"],
        (out / ADAPTER_WEIGHTS[0]).stat().st_size,
    )


def _work(plan: Extraction, passes: int) -> int:
    """Bytes to compare and to decompose, the latter in so many passes."""
    matrices = sum(plan.model[name].nbytes for group in plan.groups for name in group.names)
    return passes * matrices + sum(plan.model[name].nbytes for name in plan.compared)


def _names(tensors: Sequence[Whole]) -> str:
    return shorten([each.name for each in tensors], 3)


def _extract(extractor: Extractor, planned: PlannedExtraction) -> Extracted:
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
    with new_adapter(planned.out, planned.output, planned.request) as adapter:
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
        adapter.result = {key: value for key, value in asdict(extracted).items() if key != "nbytes"}
    return replace(extracted, nbytes=(planned.out / ADAPTER_WEIGHTS[0]).stat().st_size)


def _rest(plan: Extraction, saved: Sequence[str], nbytes: int) -> int:
    """The bytes that saved tensors leave, and the file's header. Raises PlanError if they take all."""
    taken = 0
    for name, own in ((name, plan.names[name]) for name in saved):
        taken += plan.copies(own.removesuffix(".weight")) * (plan.model[name].nbytes + ENTRY + len(own))
    taken += sum(2 * plan.copies(group.module) * (ENTRY + len(group.module)) for group in plan.groups)
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
