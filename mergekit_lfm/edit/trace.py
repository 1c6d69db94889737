"""Causal tracing: find the layers and tokens through which a model recalls a fact.

Noise on the subject's embeddings makes the model forget. Then one state of the run without noise is put back, in one
layer at one token; the gain in the right answer's probability is the state's indirect effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_lfm.artifacts.facts import Fact, as_facts
from mergekit_lfm.edit.prompts import encode, fill_template, target_ids
from mergekit_lfm.edit.sites import Site, find_sites
from mergekit_lfm.edit.targets import frozen_eval, max_tokens
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.progress import Count
from mergekit_lfm.runtime.hooks import hook_modules
from mergekit_lfm.runtime.load import logits, run, tokenizer_for_texts

if TYPE_CHECKING:
    from mergekit_lfm.runtime.load import Tokenizer

# The kinds of states to put back: the output of a layer, or of its MLP or attention alone.
STATE_KINDS: Mapping[str, Callable[[Site], nn.Module]] = {
    "hidden": lambda site: site.block,
    "mlp": lambda site: site.mlp,
    "attention": lambda site: site.attention,
}
ROLES = ("first subject token", "middle subject tokens", "last subject token", "further tokens", "last token")
EFFECT_SHARE = 0.5  # of the greatest effect: the least effect of a suggested layer
MOST = 5  # suggested layers, as many as MEMIT edits in most published settings

Effects = Mapping[str, Mapping[str, tuple[float | None, ...]]]  # by KINDS, ROLES and layer; None without such a token


@dataclass(frozen=True, slots=True)
class FactTrace:
    """One fact's probabilities with and without noise, and its effects: means over draws and over a role's tokens."""

    subject: str
    prompt: str
    target_new: str
    clean: float
    corrupted: float
    effects: Effects


@dataclass(frozen=True, slots=True)
class Trace:
    """Means over facts of the probability of the target's first token, with and without noise, and of the effects.

    An effect is p(restored) - p(corrupted). Its mean is over the facts with tokens of the role; None without any.
    numbers: the layers' numbers, in the order of the effects.
    """

    clean: float
    corrupted: float
    effects: Effects
    rows: tuple[FactTrace, ...]
    numbers: tuple[int, ...]
    noise: float
    window: int
    draws: int
    seed: int

    def layers(self) -> tuple[int, ...]:
        """The layers to edit: those around the one whose MLP has the greatest effect at the subject's last token.

        A band without gaps of at most MOST layers, each with at least SHARE of the greatest effect; the part of a
        longer band with the greatest sum. Empty if no MLP has an effect there.
        """
        effects = [x or 0.0 for x in self.effects["mlp"]["last subject token"]]
        best = max(range(len(effects)), key=effects.__getitem__)
        if effects[best] <= 0:
            return ()
        enough = [x >= EFFECT_SHARE * effects[best] for x in effects]
        first, end = best, best + 1
        while first > 0 and enough[first - 1]:
            first -= 1
        while end < len(effects) and enough[end]:
            end += 1
        size = min(MOST, end - first)
        start = max(range(first, end - size + 1), key=lambda i: sum(effects[i : i + size]))
        return self.numbers[start : start + size]

    def as_data(self) -> dict[str, Any]:
        """The whole trace for JSON, with the number of facts and the layers to edit."""
        data = {name: getattr(self, name) for name in ("clean", "corrupted", "noise", "window", "draws", "seed")}
        effects = {kind: {role: list(row) for role, row in each.items()} for kind, each in self.effects.items()}
        rows = [asdict(row) for row in self.rows]
        return {"facts": len(rows), **data, "effects": effects, "layers": list(self.layers()), "rows": rows}


def trace(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    facts: Any,
    *,
    noise: float = 3.0,
    window: int = 1,
    draws: int = 2,
    seed: int = 0,
    batch: int = 32,
    progress: Count | None = None,
) -> Trace:
    """Trace where the model knows that target_new follows each prompt: facts that it knows, not those of an edit.

    noise: its standard deviation, as a multiple of that of all entries of the embeddings of the facts' subject tokens.
    draws: of noise for each fact, the same for all states. window: put back the MLP or attention outputs of this many
    layers around one at once; with an even number, one more before it than after. The layers' own outputs are put back
    one at a time. batch: runs of the model in one forward pass; it changes the result by rounding only. progress:
    called with (facts done, all facts). Tokens before the subject are not tried: noise cannot reach them.

    Raises PlanError for an architecture without a table, texts that the model cannot take, and numbers out of range.
    Source: Meng et al. 2022, ROME (arXiv 2202.05262), section 2.1 and appendix B; p is the probability of the target's
    first token, as in the authors' code.
    """
    _check(noise, window, draws, batch)
    known, sites = as_facts(facts).facts, find_sites(model)
    texts = _texts(model, tokenizer_for_texts(tokenizer), known)
    draw, rows = torch.Generator().manual_seed(seed), []
    with frozen_eval(model), torch.no_grad():
        size = noise * float(_embed(model, texts).cpu().double().std())
        for i, (fact, text) in enumerate(zip(known, texts, strict=True)):
            case = _case(model, sites, text, size, draws, draw, batch)
            rows.append(_trace_fact(case, fact, window))
            if progress is not None:
                progress(i + 1, len(known))
    return Trace(
        clean=_mean([row.clean for row in rows]),
        corrupted=_mean([row.corrupted for row in rows]),
        effects=_means([row.effects for row in rows]),
        rows=tuple(rows),
        numbers=tuple(site.layer for site in sites),
        noise=noise,
        window=window,
        draws=draws,
        seed=seed,
    )


def _check(noise: float, window: int, draws: int, batch: int) -> None:
    problems = [] if 0 < noise < float("inf") else [f"noise is {noise}, expected a positive number"]
    counts = {"window": window, "draws": draws, "batch": batch}
    problems += [f"{name} is {count}, expected 1 or more" for name, count in counts.items() if count < 1]
    if problems:
        raise PlanError(f"trace: {'; '.join(problems)}. Change or remove it")


@dataclass(frozen=True)
class _Text:
    """A prompt's tokens, [n]; the positions of the subject's first and last token; the right next token."""

    ids: Tensor
    first: int
    last: int
    wanted: int

    def of_role(self) -> dict[str, list[int]]:
        """The positions of the tokens in each role. A subject's only token is its last."""
        end = len(self.ids) - 1
        return {
            "first subject token": [self.first] if self.first < self.last else [],
            "middle subject tokens": list(range(self.first + 1, self.last)),
            "last subject token": [self.last],
            "further tokens": list(range(self.last + 1, end)),
            "last token": [end] if end > self.last else [],
        }


def _texts(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[_Text]:
    prompts, spans = zip(*(fill_template("{}", fact.prompt, fact.subject) for fact in facts), strict=True)
    encoded = encode(tokenizer, prompts, spans, limit=max_tokens(model))
    positions = zip(encoded.lengths.tolist(), encoded.first.tolist(), encoded.last.tolist(), strict=True)
    wanted = [target_ids(tokenizer, fact.text, fact.continuation)[0] for fact in facts]
    return [
        _Text(ids[:end], first, last, token)
        for ids, token, (end, first, last) in zip(encoded.ids, wanted, positions, strict=True)
    ]


def _embedding(model: Any) -> nn.Module:
    module: nn.Module = model.get_input_embeddings()
    return module


def _embed(model: nn.Module, texts: Sequence[_Text]) -> Tensor:
    """The embeddings of all subject tokens of the texts, [tokens, width]."""
    ids = torch.cat([text.ids[text.first : text.last + 1] for text in texts])
    embeddings: Tensor = _embedding(model)(ids[None].to(next(model.parameters()).device))[0]
    return embeddings


@dataclass(frozen=True)
class _Case:
    """One fact in a model. noise: [draws, subject's tokens, width]; clean: the states without noise by kind,
    [layers, tokens, width]."""

    model: nn.Module
    sites: Sequence[Site]
    text: _Text
    batch: int
    noise: Tensor
    clean: Mapping[str, Tensor]
    p_clean: float

    def chances(self, draws: Tensor, restore: Callable[[slice], dict[nn.Module, Any]]) -> Tensor:
        """p of the right token in runs with noise, float64 [rows]. restore: returns the hooks for a slice of rows."""
        chances = []
        for start in range(0, len(draws), self.batch):
            chunk = slice(start, start + self.batch)
            add = partial(_add, noise=self.noise[draws[chunk]], first=self.text.first)
            hooks = {_embedding(self.model): add, **restore(chunk)}
            chances.append(_chances(self.model, self.text, len(draws[chunk]), hooks))
        return torch.cat(chances)


def _case(
    model: nn.Module, sites: Sequence[Site], text: _Text, size: float, draws: int, draw: torch.Generator, batch: int
) -> _Case:
    states: dict[tuple[str, int], Tensor] = {}

    def keep(state: Tensor, key: tuple[str, int]) -> None:
        states[key] = state[0].clone()

    modules = {(kind, i): module(site) for kind, module in STATE_KINDS.items() for i, site in enumerate(sites)}
    hooks = {module: partial(keep, key=key) for key, module in modules.items()}
    (p_clean,) = _chances(model, text, 1, hooks).tolist()
    clean = {kind: torch.stack([states[kind, i] for i in range(len(sites))]) for kind in STATE_KINDS}
    shape = (draws, *_embed(model, [text]).shape)
    noise = size * torch.randn(shape, dtype=torch.float64, generator=draw)
    return _Case(model, sites, text, batch, noise, clean, p_clean)


def _chances(model: nn.Module, text: _Text, rows: int, hooks: Mapping[nn.Module, Any]) -> Tensor:
    """p of the right token after the text, in each of several runs, float64 [rows]."""
    device = next(model.parameters()).device
    ids = text.ids.expand(rows, -1).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with hook_modules(hooks):
        scores = logits(run(model, kwargs=inputs))[:, -1]  # [rows, vocabulary]
    p = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    return p[:, text.wanted].double().cpu()


def _add(state: Tensor, *, noise: Tensor, first: int) -> Tensor:
    """The embeddings, with noise [rows, tokens, width] added to the subject's."""
    noisy = state.clone()
    noisy[:, first : first + noise.shape[1]] += noise.to(state)
    return noisy


def _put_back(state: Tensor, *, rows: Tensor, positions: Tensor, clean: Tensor) -> Tensor:
    """The states after putting back clean ones, [tokens, width], in some rows, at one position each."""
    restored = state.clone()
    restored[rows, positions] = clean[positions]
    return restored


def _trace_fact(case: _Case, fact: Fact, window: int) -> FactTrace:
    draws = torch.arange(len(case.noise))
    corrupted = case.chances(draws, lambda _: {})
    effects = {}
    for kind in STATE_KINDS:
        restored = _restore(case, kind, 1 if kind == "hidden" else window)
        effect = (restored - corrupted[:, None, None]).mean(0)  # [layers, positions from the subject on]
        offsets = {role: [i - case.text.first for i in positions] for role, positions in case.text.of_role().items()}
        effects[kind] = {role: _mean_over(effect, positions) for role, positions in offsets.items()}
    return FactTrace(fact.subject, fact.prompt, fact.target_new, case.p_clean, float(corrupted.mean()), effects)


def _mean_over(effect: Tensor, positions: Sequence[int]) -> tuple[float | None, ...]:
    return tuple(effect[:, list(positions)].mean(1).tolist() if positions else [None] * len(effect))


def _restore(case: _Case, kind: str, window: int) -> Tensor:
    """p with one state put back, for each draw, layer and position from the subject on, float64."""
    first, depth = case.text.first, len(case.sites)
    shape = (len(case.noise), depth, len(case.text.ids) - first)
    draws, layers, positions = (x.flatten() for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    positions = positions + first
    # as in the authors' code: layers l - window // 2 to l + (window + 1) // 2 - 1
    begin, end = layers - window // 2, layers + (window + 1) // 2

    def hooks(chunk: slice) -> Iterator[tuple[nn.Module, Any]]:
        for layer, site in enumerate(case.sites):
            (rows,) = ((begin[chunk] <= layer) & (layer < end[chunk])).nonzero(as_tuple=True)
            if len(rows):
                at = positions[chunk][rows]
                yield (
                    STATE_KINDS[kind](site),
                    partial(_put_back, rows=rows, positions=at, clean=case.clean[kind][layer]),
                )

    return case.chances(draws, lambda chunk: dict(hooks(chunk))).reshape(shape)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _means(each: Sequence[Effects]) -> Effects:
    """The mean of every effect over the facts that have it."""

    def mean(kind: str, role: str, layer: int) -> float | None:
        numbers = [x for effects in each if (x := effects[kind][role][layer]) is not None]
        return _mean(numbers) if numbers else None

    depth = len(each[0]["hidden"]["last token"])
    return {kind: {role: tuple(mean(kind, role, i) for i in range(depth)) for role in ROLES} for kind in STATE_KINDS}
