"""What the state at the subject's last token has to be for the model to say a fact: found by gradient descent.

The searches of many facts run in one forward and backward pass. They do not touch one another: the losses are added up,
Adam works on each number by itself, and a fact that has ended its search stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.facts import Fact
from mergekit_lfm.edit.prompts import Encoded, encode, filled, target_ids
from mergekit_lfm.runtime.hooks import hooked
from mergekit_lfm.runtime.load import logits, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True)
class Subject:
    """A model that is edited: itself, its tokenizer, and the most tokens that it takes."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    limit: int | None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    def encode(
        self, prompts: Sequence[tuple[str, tuple[int, int]]], endings: Sequence[Sequence[int]] | None = None
    ) -> Encoded:
        """Texts with the spans of their subjects, and tokens after them."""
        texts, spans = [text for text, _ in prompts], [span for _, span in prompts]
        return encode(self.tokenizer, texts, spans, endings, limit=self.limit)

    def at_subject(self, encoded: Encoded, modules: Sequence[nn.Module], *, inputs: bool, rows: int) -> list[Tensor]:
        """The output, or input, of each module at the last token of the subject in every text, [n, width]."""
        found: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
        for start in range(0, len(encoded.ids), rows):
            part = encoded.rows(start, start + rows)
            index = torch.arange(len(part.ids)), part.last

            def keep(state: Tensor, kept: list[Tensor], index: tuple[Tensor, Tensor] = index) -> None:
                kept.append(state[index].detach().clone())

            hooks = {module: _partial(keep, kept) for module, kept in found.items()}
            with torch.no_grad(), hooked(hooks, inputs=inputs):
                run(self.model, kwargs=part.inputs(self.device))
        return [torch.cat(parts) for parts in found.values()]


def _partial(keep: Callable[[Tensor, list[Tensor]], None], kept: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda state: keep(state, kept)


def limit_of(model: nn.Module) -> int | None:
    """The most tokens that the model takes; None where its config names no limit."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None or limit < 1 else int(limit)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with no parameter that asks for gradients; afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in asking:
            parameter.requires_grad_(True)


def find_targets(
    subject: Subject,
    module: nn.Module,
    facts: Sequence[Fact],
    options: Mapping[str, Any],
    templates: Sequence[str],
    progress: Progress | None = None,
) -> Tensor:
    """For every fact the output of the module at the subject's last token with which the model says it, [n, width].

    templates: the contexts; the state that the search starts from is that in the first. Of each fact the loss is

        mean over contexts of the target's mean negative log-probability
        + kl_factor KL(edited || as it was) at the subject's last token in kl_template
        + weight_decay |delta| / |v0|^2

    delta is added to the output at the subject's last token in all these texts, and is at most clamp |v0|.
    Source: Meng et al. 2022, ROME (arXiv 2202.05262), equation 4; MEMIT (arXiv 2210.07229), equation 16; as their code
    has it: the last of `steps` only looks, and a search ends below loss_threshold.
    """
    found, size = [], options["batch"]
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        found.append(_search(subject, module, part, options, templates))
        if progress is not None:
            progress(start + len(part), len(facts))
    return torch.cat(found)


def check_texts(subject: Subject, facts: Sequence[Fact], templates: Sequence[str], kl_template: str) -> None:
    """PlanError where a text of a fact cannot be given to the model, before any of them is."""
    _texts(subject, facts, templates, kl_template)


@dataclass(frozen=True)
class _Texts:
    """The texts of a batch. fact: of each row; targets [rows, t] with weights that are 1 / tokens, 0 where padded."""

    encoded: Encoded
    fact: Tensor
    scored: Tensor
    targets: Tensor
    weights: Tensor
    kl: Tensor
    bare: Tensor


def _texts(subject: Subject, facts: Sequence[Fact], templates: Sequence[str], kl_template: str) -> _Texts:
    prompts, endings, owner, wanted = [], list[Sequence[int]](), [], list[list[int]]()
    for i, fact in enumerate(facts):
        ids = target_ids(subject.tokenizer, fact.text, fact.target_new)
        prompts += [filled(template, fact.prompt, fact.subject) for template in templates]
        prompts.append(filled("{}", kl_template, fact.subject))
        endings += [ids[:-1]] * len(templates) + [[]]
        wanted += [ids] * len(templates) + [[]]
        owner += [i] * (len(templates) + 1)
    encoded = subject.encode(prompts, endings)
    most = max(map(len, wanted))
    targets, weights = (
        torch.zeros(len(wanted), most, dtype=torch.int64),
        torch.zeros(len(wanted), most, dtype=torch.float64),
    )
    scored = torch.zeros(len(wanted), most, dtype=torch.int64)
    for row, ids in enumerate(wanted):
        if ids:
            targets[row, : len(ids)], weights[row, : len(ids)] = torch.tensor(ids), 1 / len(ids)
            length = int(encoded.lengths[row])
            scored[row, : len(ids)] = torch.arange(length - len(ids), length)
    each = len(templates) + 1
    rows = torch.arange(len(facts)) * each
    return _Texts(encoded, torch.tensor(owner), scored, targets, weights, kl=rows + each - 1, bare=rows)


def _search(
    subject: Subject, module: nn.Module, facts: Sequence[Fact], options: Mapping[str, Any], templates: Sequence[str]
) -> Tensor:
    texts = _texts(subject, facts, templates, options["kl_template"])
    rows, device = torch.arange(len(texts.fact)), subject.device
    inputs, last, fact = texts.encoded.inputs(device), texts.encoded.last, texts.fact
    clean: list[Tensor] = []  # the state of every row before anything is added
    delta: Tensor | None = None

    def add(state: Tensor) -> Tensor:
        nonlocal delta
        if delta is None:
            clean.append(state[rows, last].detach().clone())
            delta = torch.zeros(len(facts), state.shape[-1], dtype=state.dtype, device=device, requires_grad=True)
        added = torch.zeros_like(state).index_put((rows.to(device), last.to(device)), delta[fact.to(device)])
        return state + added

    original: Tensor | None = None
    active = torch.ones(len(facts), dtype=torch.bool, device=device)
    optimiser: torch.optim.Adam | None = None
    for step in range(options["steps"]):
        with torch.enable_grad(), hooked({module: add}):
            scores = logits(run(subject.model, kwargs=inputs))
            assert delta is not None
            size = clean[0][texts.bare].norm(dim=1)
            loss, original = _losses(texts, scores, delta, size, original, options, len(facts))
        active &= loss.detach() >= options["loss_threshold"]
        if step == options["steps"] - 1 or not bool(active.any()):
            break
        optimiser = optimiser or torch.optim.Adam([delta], lr=options["lr"])
        optimiser.zero_grad()
        torch.autograd.backward(loss, active.to(loss))  # each fact's own gradient; none for those that have ended
        before = delta.detach().clone()
        optimiser.step()
        with torch.no_grad():
            norm, most = delta.norm(dim=1), options["clamp"] * size
            shrunk = torch.where((norm > most)[:, None], delta * (most / norm.clamp_min(1e-30))[:, None], delta)
            delta.copy_(torch.where(active[:, None], shrunk, before))
    assert delta is not None
    return clean[0][texts.bare] + delta.detach()


def _losses(
    texts: _Texts,
    scores: Tensor,
    delta: Tensor,
    size: Tensor,
    original: Tensor | None,
    options: Mapping[str, Any],
    count: int,
) -> tuple[Tensor, Tensor]:
    """The loss of every fact, [n], and what the model said of its subject before, in log-probabilities [n, v]."""
    device = scores.device
    rows = torch.arange(len(texts.fact), device=device)[:, None]
    said = scores[rows, texts.scored.to(device)].log_softmax(-1)  # [rows, t, v]
    of_target = said.gather(2, texts.targets.to(device)[..., None])[..., 0]
    each = -(of_target * texts.weights.to(said)).sum(1)
    contexts = torch.bincount(texts.fact, minlength=count).to(said) - 1
    nll = torch.zeros(count, dtype=said.dtype, device=device).index_add(0, texts.fact.to(device), each) / contexts
    kl_rows = texts.kl.to(device)
    now = scores[kl_rows, texts.encoded.last[texts.kl].to(device)].log_softmax(-1)
    if original is None:
        original = now.detach()
    divergence = (now.exp() * (now - original)).sum(-1)
    decay = delta.norm(dim=1) / size**2
    return nll + options["kl_factor"] * divergence + options["weight_decay"] * decay, original
