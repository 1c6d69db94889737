"""Edit facts in a model: ROME one after another, MEMIT all at once. The result is a patch; the model does not change.

The search changes the weights of the edited layers in place, since later layers depend on them, and puts them back bit
for bit at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.collect.locate import located
from mergekit_lfm.edit.covariance import Covariance, second_moments, solve
from mergekit_lfm.edit.prompts import filled
from mergekit_lfm.edit.sites import Site, find_sites
from mergekit_lfm.edit.targets import Progress, Subject, at_rest, check_texts, find_targets, limit_of
from mergekit_lfm.edits import EDIT_METHODS, edit_options
from mergekit_lfm.errors import PlanError
from mergekit_lfm.facts import BLANK, Fact, FactsFile, as_facts
from mergekit_lfm.patches import Changed, Patch
from mergekit_lfm.runtime import Loaded, tokenizer_for_texts
from mergekit_lfm.stats import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")
ALIKE = 0.995  # the cosine above which least squares cannot tell two keys apart


def edit(
    model: nn.Module | Loaded,
    tokenizer: PreTrainedTokenizerBase | None,
    facts: Any,
    *,
    method: str = "memit",
    covariance: Covariance = None,
    preset: str | None = None,
    dtype: torch.dtype | str = torch.float64,
    progress: Progress | None = None,
    **options: Any,
) -> Patch:
    """A patch that makes the model say the facts. The model itself does not change.

    model: a transformers model, or a result of `load_model`; then the patch uses its files' names and records which
    model it is for. The patch's tensors are on the CPU. facts: as `as_facts` takes them. covariance: second
    moments of the inputs of the layers' down-projections, by layer number or weight, [in, in]; a statistics file of
    kind gram; or "identity". dtype: of the solves, which run on the GPU if the model does; the model keeps its own.
    options: `layers`, `context_templates`, `steps`, `lr`, `weight_decay`, `kl_factor`, `clamp`, `loss_threshold`,
    `lambda_` or `lambda_ratio`, `ridge`, `kl_template`, `key`, `batch`, `allow_same_subject`; `EDIT_METHODS` has their
    defaults. progress: called with (facts searched, all facts).

    Raises PlanError for options that are wrong or that the model cannot honour and, with MEMIT, for two facts about one
    subject, which would undo each other. Source: `EDIT_METHODS`.
    """
    given = {"lambda" if name == "lambda_" else name: value for name, value in options.items()}
    if isinstance(covariance, str):
        given["covariance"] = covariance
    asked = edit_options(method, given, preset=preset, place="edit")
    covariance = asked["covariance"] if covariance is None else covariance
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    known = as_facts(facts)
    loaded = model if isinstance(model, Loaded) else None
    module = model.model if isinstance(model, Loaded) else model
    tokenizer = tokenizer_for_texts(tokenizer or (loaded.tokenizer if loaded else None))
    sites = _chosen(find_sites(module), method, asked["layers"])
    names = {site.weight: site.weight for site in sites}
    if loaded is not None:
        places, _ = located(module, loaded.checkpoint)
        names = {site.weight: places[site.weight] for site in sites}
    content = loaded.checkpoint.content if loaded is not None and isinstance(covariance, Statistics) else None
    moments = second_moments(covariance, sites, names, content, ridge=asked["ridge"], dtype=dtype)
    work = _Work(Subject(module, tokenizer, limit_of(module)), sites, moments, asked, dtype, progress)
    check_texts(work.subject, known.facts, work.contexts, asked["kl_template"])
    with at_rest(module), _put_back(sites), torch.no_grad():
        changes = (_rome if method == "rome" else _memit)(work, known.facts)
    used: dict[str, Any] = {
        **asked,
        "layers": [site.layer for site in sites],
        "dtype": str(dtype).removeprefix("torch."),
    }
    used["covariance"] = _named(covariance)
    if work.device != CPU:
        used["device"] = work.device.type
    return _patch(changes, sites, names, loaded, method, used, known)


def _named(covariance: Covariance) -> str:
    """How a patch names the second moments used for it."""
    if isinstance(covariance, Statistics):
        return f"gram of data {covariance.facts.data}"
    return covariance if isinstance(covariance, str) else "given as tensors"


@dataclass(frozen=True)
class _Work:
    """The inputs of both methods. moments: one matrix for each site."""

    subject: Subject
    sites: Sequence[Site]
    moments: Sequence[Tensor]
    options: Mapping[str, Any]
    dtype: torch.dtype
    progress: Progress | None

    @property
    def device(self) -> torch.device:
        """The device of the solves: the model's GPU, else the CPU, since other devices may lack float64."""
        device = self.subject.device
        return device if device.type == "cuda" else CPU

    @property
    def templates(self) -> list[list[str]]:
        """The contexts by kind: the lists in the option, or else the bare prompt and the others."""
        given = self.options["context_templates"]
        if any(isinstance(entry, list) for entry in given):
            return [entry if isinstance(entry, list) else [entry] for entry in given]
        others = [template for template in given if template != BLANK]
        return [kind for kind in ([BLANK], others) if kind]

    @property
    def contexts(self) -> list[str]:
        """All contexts, the bare prompt first: the search and the changes start from its state."""
        return sorted((each for kind in self.templates for each in kind), key=lambda template: template != BLANK)

    def states(self, facts: Sequence[Fact], templates: Sequence[str], module: nn.Module, *, inputs: bool) -> Tensor:
        """The module's output or input at the subjects in these contexts, [facts, templates, width], to solve with."""
        prompts = [filled(template, fact.prompt, fact.subject) for fact in facts for template in templates]
        rows = self.options["batch"] * (len(self.contexts) + 1)
        (found,) = self.subject.at_subject(self.subject.encode(prompts), [module], inputs=inputs, rows=rows)
        return found.reshape(len(facts), len(templates), -1).to(self.device, self.dtype)


Changes = list[tuple[Tensor, Tensor]]  # for each site (left [out, n], right [n, in])


def _memit(work: _Work, facts: Sequence[Fact]) -> Changes:
    """Least squares over all facts, layer by layer. Source: MEMIT, equations 14, 19 and 20."""
    sites, options, last = work.sites, work.options, work.sites[-1].block
    if not options["allow_same_subject"]:
        _refuse_same_subject(facts, _keys(work, facts, sites[0]))
    wanted = find_targets(work.subject, last, facts, options, work.contexts, work.progress)
    wanted = wanted.to(work.device, work.dtype)
    changes = []
    for i, (site, moment) in enumerate(zip(sites, work.moments, strict=True)):
        keys = _keys(work, facts, site)  # [n, in]
        residual = (wanted - work.states(facts, [BLANK], last, inputs=False)[:, 0]) / (len(sites) - i)
        weight = options["lambda"]
        if weight is None:
            weight = options["lambda_ratio"] * site.inputs
        solved = solve(weight * moment.to(work.device) + keys.mT @ keys, keys.mT, f"layer {site.layer}")  # [in, n]
        changes.append((residual.mT, solved.mT))
        _add(site, *changes[-1])
    return changes


def _keys(work: _Work, facts: Sequence[Fact], site: Site) -> Tensor:
    """The site's inputs at the subjects: the mean over kinds of contexts of the mean within each, [n, in]."""
    kinds = [work.states(facts, kind, site.projection, inputs=True).mean(1) for kind in work.templates]
    return torch.stack(kinds).mean(0)


def _refuse_same_subject(facts: Sequence[Fact], keys: Tensor) -> None:
    """Raise PlanError if two facts share a key: least squares would average them."""
    unit = torch.nn.functional.normalize(keys, dim=1)
    near = ((unit @ unit.mT) > ALIKE).cpu()
    pairs = [
        f"{a.text!r} and {b.text!r}"
        for i, a in enumerate(facts)
        for j, b in enumerate(facts[:i])
        if a.subject.casefold() == b.subject.casefold() or (bool(near[i, j]) and a.target_new != b.target_new)
    ]
    if pairs:
        more = f"\n  and {len(pairs) - 10} more pairs" if len(pairs) > 10 else ""
        raise PlanError(
            "one batch has several facts about one subject, which least squares would average:\n  "
            + "\n  ".join(pairs[:10])
            + f"{more}\nEdit them one after another, as several patches, or with rome; allow_same_subject edits them "
            "anyway"
        )


def _rome(work: _Work, facts: Sequence[Fact]) -> Changes:
    """Rank-one changes, one fact after another. Source: ROME, equation 2; keys as in the authors' code."""
    (site,), (moment,) = work.sites, work.moments
    moment = moment.to(work.device)
    options, parts = work.options, []
    for i, fact in enumerate(facts):
        (wanted,) = find_targets(work.subject, site.mlp, [fact], options, work.contexts).to(work.device, work.dtype)
        contexts = [BLANK] if options["key"] == "bare" else work.contexts
        mean_key = work.states([fact], contexts, site.projection, inputs=True)[0].mean(0)
        here = contexts if options["key"] == "mean" else [BLANK]
        key = work.states([fact], here, site.projection, inputs=True)[0].mean(0)
        value = work.states([fact], here, site.projection, inputs=False)[0].mean(0)
        direction = solve(moment, mean_key[:, None], f"layer {site.layer}")[:, 0]
        parts.append((((wanted - value) / (key @ direction))[:, None], direction[None]))
        _add(site, *parts[-1])
        if work.progress is not None:
            work.progress(i + 1, len(facts))
    return [(torch.cat([left for left, _ in parts], 1), torch.cat([right for _, right in parts]))]


def _add(site: Site, left: Tensor, right: Tensor) -> None:
    weight = site.parameter
    change = site.as_stored(left @ right).to(weight.device)
    weight.copy_((weight.to(left.dtype) + change).to(weight.dtype))


@contextmanager
def _put_back(sites: Sequence[Site]) -> Iterator[None]:
    """The weights of the sites as they are now, whatever happens to them within."""
    before = [site.parameter.detach().clone() for site in sites]
    try:
        yield
    finally:
        with torch.no_grad():
            for site, weight in zip(sites, before, strict=True):
                site.parameter.copy_(weight)


def _chosen(sites: Sequence[Site], method: str, layers: Sequence[int] | None) -> list[Site]:
    """The sites of `layers`, or of the method's band. Raises PlanError for layers that the model does not have."""
    depth, band = len(sites), EDIT_METHODS[method].band
    if layers is None:
        first, last = (1 / 6, 1 / 6) if band is None else band
        layers = range(round(first * depth), max(round(first * depth), round(last * depth)) + 1)
    if absent := [layer for layer in layers if layer >= depth]:
        raise PlanError(
            f"edit.layers: the model has no layer {absent[0]}; it has {depth}, 0 to {depth - 1}. Choose from them"
        )
    if band is None and len(layers) > 1:
        raise PlanError(f"edit.layers is {list(layers)}, but {method} edits one layer. Choose one, or use memit")
    return [sites[layer] for layer in layers]


def _patch(
    changes: Changes,
    sites: Sequence[Site],
    names: Mapping[str, str],
    loaded: Loaded | None,
    method: str,
    options: Mapping[str, Any],
    facts: FactsFile,
) -> Patch:
    """The changes as a patch, in the target's names, dtypes and orientation."""
    held = {}
    for site, (left, right) in zip(sites, changes, strict=True):
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise PlanError(
                f"the change of layer {site.layer} is not finite. Try a smaller lr or clamp, or a larger ridge"
            )
        left, right = left.cpu(), right.cpu()
        parts = (left, right) if site.axis == 1 else (right.mT, left.mT)
        spec = None if loaded is None else loaded.checkpoint[names[site.weight]]
        stored = str(site.parameter.dtype).removeprefix("torch.") if spec is None else spec.dtype
        held[names[site.weight]] = (*parts, Changed("low_rank", tuple(site.parameter.shape), stored, site.axis))
    patch = Patch.low_rank(method, held, options=options, facts=facts.as_data())
    if loaded is None:
        return patch
    checkpoint = loaded.checkpoint
    return patch.made_for(checkpoint.content, {name: checkpoint.digest_of(name) for name in held})
