"""Find, by gradient descent, the state at the subject's last token that makes the model say a fact.

The searches of many facts share each forward and backward pass but do not affect one another: the losses are summed,
Adam treats each number by itself, and a fact whose search has ended stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.facts import Fact
from mergekit_lfm.edit.prompts import Encoded, encode, fill_template, target_ids
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.runtime.hooks import hook_modules
from mergekit_lfm.runtime.load import logits, run

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer


@dataclass(frozen=True)
class EditedModel:
    """The model to edit, its tokenizer, and the most tokens that it takes."""

    model: nn.Module
    tokenizer: Tokenizer
    limit: int | None

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    def encode(
        self, prompts: Sequence[tuple[str, tuple[int, int]]], endings: Sequence[Sequence[int]] | None = None
    ) -> Encoded:
        """Encode texts with the spans of their subjects, and the tokens `endings` after them."""
        texts, spans = [text for text, _ in prompts], [span for _, span in prompts]
        return encode(self.tokenizer, texts, spans, endings, limit=self.limit)

    def at_subject(self, encoded: Encoded, modules: Sequence[nn.Module], *, inputs: bool, rows: int) -> list[Tensor]:
        """The output or input of each module at the last token of every text's subject, [n, width]."""
        states_of: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
        for start in range(0, len(encoded.ids), rows):
            chunk = encoded.rows(start, start + rows)
            index = torch.arange(len(chunk.ids)), chunk.last

            def keep(state: Tensor, states: list[Tensor], index: tuple[Tensor, Tensor] = index) -> None:
                states.append(state[index].detach().clone())

            hooks = {module: _partial(keep, states) for module, states in states_of.items()}
            with torch.no_grad(), hook_modules(hooks, inputs=inputs):
                run(self.model, kwargs=chunk.inputs(self.device))
        return [torch.cat(parts) for parts in states_of.values()]


def _partial(keep: Callable[[Tensor, list[Tensor]], None], states: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda state: keep(state, states)


def max_tokens(model: nn.Module) -> int | None:
    """The most tokens that the model takes; None if its config names no limit."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None or limit < 1 else int(limit)


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode without gradients; restore it afterwards."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in trainable:
            parameter.requires_grad_(True)


def find_targets(
    subject: EditedModel,
    module: nn.Module,
    facts: Sequence[Fact],
    options: Mapping[str, Any],
    templates: Sequence[str],
    progress: Count | None = None,
) -> Tensor:
    """For each fact, the module's output at the subject's last token that makes the model say it, [n, width].

    templates: the contexts; the search starts from the state in the first. The loss of a fact is

        mean over contexts of the target's mean negative log-probability
        + kl_factor KL(edited || original) at the subject's last token in kl_template
        + weight_decay |delta| / |v0|^2

    delta, at most clamp |v0| long, is added to the output at the subject's last token in all these texts.
    Source: Meng et al. 2022, ROME (arXiv 2202.05262), equation 4; MEMIT (arXiv 2210.07229), equation 16. As in their
    code, the last of `steps` only computes the loss, and a search ends below loss_threshold.
    """
    targets, size = [], options["batch"]
    for start in range(0, len(facts), size):
        chunk = facts[start : start + size]
        targets.append(_search(subject, module, chunk, options, templates))
        if progress is not None:
            progress(start + len(chunk), len(facts))
    return torch.cat(targets)


def check_texts(subject: EditedModel, facts: Sequence[Fact], templates: Sequence[str], kl_template: str) -> None:
    """Raise PlanError if the model cannot take some text of a fact, before it runs on any."""
    _texts(subject, facts, templates, kl_template)


@dataclass(frozen=True)
class _Texts:
    """The texts of a batch. fact: of each row; targets [rows, t] with weights 1 / tokens, 0 for padding."""

    encoded: Encoded
    fact: Tensor
    scored: Tensor
    targets: Tensor
    weights: Tensor
    kl: Tensor
    bare: Tensor


def _texts(subject: EditedModel, facts: Sequence[Fact], templates: Sequence[str], kl_template: str) -> _Texts:
    prompts, endings, owner, wanted = [], list[Sequence[int]](), [], list[list[int]]()
    for i, fact in enumerate(facts):
        ids = target_ids(subject.tokenizer, fact.text, fact.continuation)
        prompts += [fill_template(template, fact.prompt, fact.subject) for template in templates]
        prompts.append(fill_template("{}", kl_template, fact.subject))
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
    subject: EditedModel, module: nn.Module, facts: Sequence[Fact], options: Mapping[str, Any], templates: Sequence[str]
) -> Tensor:
    texts = _texts(subject, facts, templates, options["kl_template"])
    rows, device = torch.arange(len(texts.fact)), subject.device
    inputs, last, fact = texts.encoded.inputs(device), texts.encoded.last, texts.fact
    clean: list[Tensor] = []  # every row's state before the addition
    delta: Tensor | None = None

    def add(state: Tensor) -> Tensor:
        nonlocal delta
        if delta is None:
            clean.append(state[rows, last].detach().clone())
            delta = torch.zeros(len(facts), state.shape[-1], dtype=state.dtype, device=device, requires_grad=True)
        addition = torch.zeros_like(state).index_put((rows.to(device), last.to(device)), delta[fact.to(device)])
        return state + addition

    original: Tensor | None = None
    active = torch.ones(len(facts), dtype=torch.bool, device=device)
    optimiser: torch.optim.Adam | None = None
    for step in range(options["steps"]):
        with torch.enable_grad(), hook_modules({module: add}):
            scores = logits(run(subject.model, kwargs=inputs))
            assert delta is not None
            size = clean[0][texts.bare].norm(dim=1)
            loss, original = _losses(texts, scores, delta, size, original, options, len(facts))
        active &= loss.detach() >= options["loss_threshold"]
        if step == options["steps"] - 1 or not bool(active.any()):
            break
        optimiser = optimiser or torch.optim.Adam([delta], lr=options["lr"])
        optimiser.zero_grad()
        torch.autograd.backward(loss, active.to(loss))  # each fact's own gradient; 0 for ended searches
        before = delta.detach().clone()
        optimiser.step()
        with torch.no_grad():
            norm, most = delta.norm(dim=1), options["clamp"] * size
            shrunk = torch.where((norm > most)[:, None], delta * (most / norm.where(norm > 0, 1.0))[:, None], delta)
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
    """Every fact's loss, [n], and the original log-probabilities at the subject in kl_template, [n, v]."""
    device = scores.device
    rows = torch.arange(len(texts.fact), device=device)[:, None]
    logp = scores[rows, texts.scored.to(device)].log_softmax(-1)  # [rows, t, v]
    of_target = logp.gather(2, texts.targets.to(device)[..., None])[..., 0]
    each = -(of_target * texts.weights.to(logp)).sum(1)
    contexts = torch.bincount(texts.fact, minlength=count).to(logp) - 1
    nll = torch.zeros(count, dtype=logp.dtype, device=device).index_add(0, texts.fact.to(device), each) / contexts
    kl_rows = texts.kl.to(device)
    now = scores[kl_rows, texts.encoded.last[texts.kl].to(device)].log_softmax(-1)
    if original is None:
        original = now.detach()
    divergence = (now.exp() * (now - original)).sum(-1)
    decay = delta.norm(dim=1) / size**2
    return nll + options["kl_factor"] * divergence + options["weight_decay"] * decay, original
