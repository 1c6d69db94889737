"""Causal tracing: against a plain loop with hooks of its own, and for states with a known effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_editing import MODELS, tiny_model, trained_tokenizer
from torch import Tensor, nn

from mergekit_lfm.edit.trace import ROLES, STATE_KINDS, Trace, trace
from mergekit_lfm.errors import PlanError

FACTS = [
    {"prompt": "We said {} speaks", "subject": "Leo Wagner Stone", "target_new": "Danish"},
    {"prompt": "{} is in the", "subject": "Ada", "target_new": "city of Rome"},
]
LAYERS = 4


def flat_model(name: str = "gpt2") -> nn.Module:
    """A tiny model that is not nearly certain of any token, so that effects are visible."""
    model = tiny_model(name)
    with torch.no_grad():
        (model.model.norm if hasattr(model, "model") else model.transformer.ln_f).weight.mul_(0.2)
    return model


def modules_of(model: nn.Module, name: str, kind: str) -> list[nn.Module]:
    """The modules whose outputs are restored, layer by layer, by their names in transformers."""
    blocks = list(model.get_submodule(MODELS[name][2]))
    attention = "attn" if hasattr(blocks[0], "attn") else "self_attn"
    kinds: dict[str, list[nn.Module]] = {
        "hidden": blocks,
        "mlp": [block.mlp for block in blocks],
        "attention": [block.get_submodule(attention) for block in blocks],
    }
    return kinds[kind]


class PlainTrace:
    """Causal tracing of one fact in float64, one run for each state, positions by counting tokens."""

    def __init__(self, name: str, fact: dict[str, str], tokenizer: Any) -> None:
        self.name, self.model = name, flat_model(name)
        self.clean: dict[str, list[Tensor]] = {}
        before, after = fact["prompt"].split("{}")
        head, body = tokenizer(before.rstrip())["input_ids"], " " * bool(before) + fact["subject"]
        subject = tokenizer(body, add_special_tokens=False)["input_ids"]
        rest = tokenizer(after, add_special_tokens=False)["input_ids"]
        self.ids = [*head, *subject, *rest]
        self.subject = range(len(head), len(head) + len(subject))
        self.wanted = tokenizer(f" {fact['target_new']}", add_special_tokens=False)["input_ids"][0]

    def chance(self, noise: Tensor | None, changes: list[tuple[nn.Module, Callable[[Tensor], None]]]) -> float:
        """p of the right token. noise: [subject, width]; changes: functions that change modules' outputs in place."""

        def changed(change: Callable[[Tensor], object]) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, out: Any) -> Any:
                state = (out[0] if isinstance(out, tuple) else out).clone()
                change(state[0])
                return (state, *out[1:]) if isinstance(out, tuple) else state

            return hook

        def noisy(state: Tensor) -> None:
            if noise is not None:
                state[self.subject.start : self.subject.stop] += noise

        changes = [(self.model.get_input_embeddings(), noisy), *changes]
        handles = [module.register_forward_hook(changed(change)) for module, change in changes]
        try:
            with torch.no_grad():
                scores = self.model(torch.tensor([self.ids]), use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return float(scores.double().softmax(-1)[self.wanted])

    def restored(self, noise: Tensor, kind: str, layers: list[int], position: int) -> float:
        """p with the outputs of some layers at this position restored to those of the run without noise."""
        modules = modules_of(self.model, self.name, kind)
        if kind not in self.clean:
            states: list[Tensor] = []
            self.chance(None, [(module, lambda state: states.append(state.clone())) for module in modules])
            self.clean[kind] = states

        def put(layer: int) -> Callable[[Tensor], object]:
            return lambda state: state[position].copy_(self.clean[kind][layer][position])

        return self.chance(noise, [(modules[layer], put(layer)) for layer in layers])

    def roles(self) -> dict[str, list[int]]:
        first, *middle = self.subject if len(self.subject) > 1 else (None, *self.subject)
        further = list(range(self.subject.stop, len(self.ids)))
        return {
            "first subject token": [] if first is None else [first],
            "middle subject tokens": middle[:-1],
            "last subject token": middle[-1:],
            "further tokens": further[:-1],
            "last token": further[-1:],
        }


def plain_trace(
    name: str, tokenizer: Any, facts: Any, *, noise: float, window: int, draws: int, seed: int
) -> dict[str, Any]:
    """The result of `trace`."""
    plain = [PlainTrace(name, fact, tokenizer) for fact in facts]
    embedding = plain[0].model.get_input_embeddings().weight.detach()
    size = torch.cat([embedding[[one.ids[i] for i in one.subject]] for one in plain]).std() * noise
    draw = torch.Generator().manual_seed(seed)
    effects: dict[str, dict[str, list[list[float]]]] = {kind: {role: [] for role in ROLES} for kind in STATE_KINDS}
    clean, corrupted = [], []
    for one in plain:
        shape = (draws, len(one.subject), embedding.shape[1])
        noises = size * torch.randn(shape, generator=draw, dtype=torch.float64)
        clean.append(one.chance(None, []))
        forgotten = [one.chance(noise, []) for noise in noises]
        corrupted.append(sum(forgotten) / draws)
        for kind in STATE_KINDS:
            wide = window if kind != "hidden" else 1
            for role, positions in one.roles().items():
                rows = []
                for layer in range(LAYERS):
                    near = [i for i in range(LAYERS) if layer - wide // 2 <= i < layer + wide / 2]
                    gains = [
                        one.restored(noise, kind, near, position) - lost
                        for noise, lost in zip(noises, forgotten, strict=True)
                        for position in positions
                    ]
                    rows.append(sum(gains) / len(gains) if gains else 0.0)
                effects[kind][role] += [rows] if positions else []
    mean = {
        kind: {role: [sum(x) / len(x) for x in zip(*rows, strict=True)] or [None] * LAYERS for role, rows in e.items()}
        for kind, e in effects.items()
    }
    return {"clean": sum(clean) / len(facts), "corrupted": sum(corrupted) / len(facts), "effects": mean}


@pytest.mark.parametrize(
    ("name", "window", "kind"),
    [("gpt2", 2, "gpt2"), ("llama", 3, "llama3"), ("gpt-j", 1, "gpt2"), ("gpt-neo", 1, "gpt2")],
)
def test_a_trace_is_that_of_a_plain_loop(name: str, window: int, kind: str) -> None:
    tokenizer = trained_tokenizer(kind)
    options: dict[str, Any] = {"noise": 2.0, "window": window, "draws": 2, "seed": 3}
    facts = FACTS if name == "gpt2" else FACTS[1:]
    found = trace(flat_model(name), tokenizer, facts, batch=7, **options).as_data()
    expected = plain_trace(name, tokenizer, facts, **options)
    near = 1e-12 if name == "gpt2" else 1e-6  # transformers computes parts of the others in float32
    assert found["clean"] == pytest.approx(expected["clean"], abs=near)
    assert found["corrupted"] == pytest.approx(expected["corrupted"], abs=near)
    for what in STATE_KINDS:
        for role in ROLES:
            assert found["effects"][what][role] == pytest.approx(expected["effects"][what][role], abs=near), (
                what,
                role,
            )
    assert max(abs(x) for row in found["effects"]["hidden"].values() for x in row if x is not None) > 1e-4


def found_in(name: str = "gpt2", facts: Any = FACTS, **options: Any) -> Trace:
    return trace(flat_model(name), trained_tokenizer(), facts, **options)


def test_restoring_the_last_state_gives_the_clean_run() -> None:
    for row in found_in().rows:
        assert row.effects["hidden"]["last token"][-1] == pytest.approx(row.clean - row.corrupted, abs=1e-12)
        for role in ROLES[:-1]:  # behind the last layer nothing reads them
            assert row.effects["hidden"][role][-1] in (None, pytest.approx(0, abs=1e-15))


def test_a_subject_that_is_the_last_token_is_all_there_is_to_put_back() -> None:
    row = found_in(facts=[{"prompt": "We said it is {}", "subject": ".", "target_new": "Rome"}], window=9).rows[0]
    lost = row.clean - row.corrupted
    assert abs(lost) > 1e-5
    assert row.effects["hidden"]["last subject token"] == pytest.approx([lost] * LAYERS, abs=1e-12)
    for kind in ("mlp", "attention"):  # not all layers: the noise also passes around them
        assert row.effects[kind]["last subject token"][0] != pytest.approx(lost, rel=0.01)
    for role in set(ROLES) - {"last subject token"}:
        assert row.effects["hidden"][role] == (None,) * LAYERS


def test_almost_no_noise_has_no_effect() -> None:
    found = found_in(noise=1e-9)
    assert found.corrupted == pytest.approx(found.clean, abs=1e-8)
    effects = [x for kind in STATE_KINDS for role in ROLES for x in found.effects[kind][role]]
    assert effects == pytest.approx([0.0] * len(effects), abs=1e-8)


@pytest.mark.parametrize(
    ("fact", "roles"),
    [
        (("{} is", "Ada"), {"last subject token", "last token"}),
        (("is {}", "Ada"), {"last subject token"}),
        (("{}", "Ada Blake"), {"first subject token", "last subject token"}),
        (("is {} .", "Ada Blake Wagner"), set(ROLES) - {"further tokens"}),
        (("{} is in the", "Ada Blake Wagner"), set(ROLES)),
    ],
)
def test_roles_that_there_are(fact: tuple[str, str], roles: set[str]) -> None:
    found = found_in(facts=[{"prompt": fact[0], "subject": fact[1], "target_new": "Danish"}])
    assert {role for role in ROLES if found.effects["hidden"][role][0] is not None} == roles
    for kind in STATE_KINDS:
        assert all(len(found.effects[kind][role]) == LAYERS for role in ROLES)


def test_the_result_depends_on_the_seed_and_not_on_the_batch() -> None:
    one, other = found_in(batch=5).as_data(), found_in(batch=1000).as_data()
    numbers = [
        [data["corrupted"], *(x for kind in STATE_KINDS for role in ROLES for x in data["effects"][kind][role])]
        for data in (one, other, found_in(seed=1).as_data())
    ]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-14)
    assert abs(numbers[0][0] - numbers[2][0]) > 1e-6
    alone = found_in(facts=FACTS[:1])  # later prompts take their noise later; its size is that of all subjects
    assert alone.rows[0].clean == pytest.approx(found_in().rows[0].clean, abs=1e-14)


def test_the_model_is_left_as_it_was() -> None:
    model = flat_model("llama").train()
    hooks = [sum(map(len, (m._forward_hooks, m._forward_pre_hooks))) for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told: list[tuple[int, int]] = []
    trace(model, trained_tokenizer(), FACTS, draws=1, progress=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    assert [sum(map(len, (m._forward_hooks, m._forward_pre_hooks))) for m in model.modules()] == hooks
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def with_effects(effects: list[float | None]) -> tuple[int, ...]:
    """The layers to edit, numbered from 10, for these effects of the MLPs at the last subject token."""
    nothing: list[float | None] = [None] * len(effects)
    by_role = {role: tuple(effects if role == "last subject token" else nothing) for role in ROLES}
    numbers = tuple(range(10, 10 + len(effects)))
    return Trace(0.9, 0.1, dict.fromkeys(STATE_KINDS, by_role), (), numbers, 3.0, 1, 2, 0).layers()


@pytest.mark.parametrize(
    ("effects", "layers"),
    [
        ([0.69, 0.03, 0.02, 0.0], (10,)),
        ([0.69, 0.70, 0.07, 0.03], (10, 11)),
        ([0.6, 0.1, 0.7, 0.5, 0.2], (12, 13)),  # no gaps
        ([0.5, 0.6, 0.7, 0.8, 0.8, 0.7, 0.6, 0.1], (12, 13, 14, 15, 16)),  # 11 to 15 has as much, and is not later
        ([-0.1, 0.0, -0.2], ()),
        ([0.0, 0.0], ()),
        ([None, None], ()),
    ],
)
def test_the_layers_to_edit(effects: list[float | None], layers: tuple[int, ...]) -> None:
    assert with_effects(effects) == layers


def test_models_that_cannot_be_traced() -> None:
    with pytest.raises(PlanError, match=r"noise is 0, .*window is 0, .*draws is -1"):
        found_in(noise=0, window=0, draws=-1)
    with pytest.raises(PlanError, match="the model takes 48"):
        found_in(facts=[{"prompt": "{} is" + " a" * 60, "subject": "Ada", "target_new": "baker"}])
    with pytest.raises(PlanError, match="no tokenizer"):
        trace(flat_model(), None, FACTS)
    model = flat_model()
    model.config.model_type = "mamba"
    with pytest.raises(PlanError, match="model_type 'mamba'"):
        trace(model, trained_tokenizer(), FACTS)
