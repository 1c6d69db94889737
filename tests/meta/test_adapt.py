"""Adapting as a function of where it begins: its slopes, and algorithms over it, against formulas and other code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn

from mergekit_lfm import merge_state_dicts
from mergekit_lfm.meta.adapt import adapt
from mergekit_lfm.meta.algorithms import build_loss
from mergekit_lfm.meta.episodes import DrawnEpisodes, Episode, sides
from mergekit_lfm.meta.losses import Inner, MetaLoss, over_tasks
from mergekit_lfm.meta.metric import Prototypes
from mergekit_lfm.meta.objective import TaskObjective
from mergekit_lfm.recipe.meta_algorithms import ALGORITHMS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.functional import additive_mask, functional_model
from mergekit_lfm.train.examples import IGNORED, Batch
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import LOSSES

WORDS = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def small(classes: int = 3, norm: type[nn.Module] = nn.Identity) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), nn.Linear(6, classes)).double()


class Named(nn.Module):
    """A model that takes its inputs by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.inner(x)
        return scores


def draw(generator: torch.Generator) -> Episode:
    """A task of three classes in four dimensions: three examples each to adapt on, and two to judge by."""
    centres = torch.eye(3, 4).double() + 0.5 * torch.randn(3, 4, generator=generator, dtype=torch.float64)

    def some(count: int) -> dict[str, Tensor]:
        labels = torch.arange(3).repeat_interleave(count)
        return {"x": centres[labels] + 0.3 * torch.randn(3 * count, 4, generator=generator).double(), "labels": labels}

    return Episode(some(3), some(2))


EPISODES = DrawnEpisodes(draw)


def tasks_of(batch: Batch) -> list[Episode]:
    """The episodes of a batch, each by itself."""
    both = sides(batch)
    count = len(next(iter(both.support.values())))
    return [Episode(*({name: x[number] for name, x in side.items()} for side in both)) for number in range(count)]


def loss_by_hand(parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
    hidden = (batch["x"] @ parameters["inner.0.weight"].T + parameters["inner.0.bias"]).tanh()
    scores = hidden @ parameters["inner.3.weight"].T + parameters["inner.3.bias"]
    return -scores.log_softmax(-1)[torch.arange(len(scores)), batch["labels"]].mean()


def adapted_by_hand(start: Mapping[str, Tensor], support: Batch, steps: int, rate: float) -> dict[str, Tensor]:
    found = {name: x.detach().clone().requires_grad_() for name, x in start.items()}
    for _ in range(steps):
        slopes = torch.autograd.grad(loss_by_hand(found, support), [*found.values()])
        moved = zip(found.items(), slopes, strict=True)
        found = {name: (x - rate * slope).detach().requires_grad_() for (name, x), slope in moved}
    return found


def slopes_of(loss: MetaLoss, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, batch).total.backward()  # type: ignore[no-untyped-call]
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def test_the_slope_through_inner_steps_is_that_of_finite_differences() -> None:
    model, batch = Named(small()), EPISODES.batch([0, 1])
    slopes = slopes_of(build_loss(model, "classification", ALGORITHMS["maml"], Inner(2, 0.3)), model, batch)
    tasks = tasks_of(batch)

    def whole(start: Mapping[str, Tensor]) -> float:
        return sum(loss_by_hand(adapted_by_hand(start, t.support, 2, 0.3), t.query).item() for t in tasks)

    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    for name, place in (("inner.0.weight", (2, 1)), ("inner.3.weight", (1, 4)), ("inner.3.bias", (0,))):
        sides = []
        for sign in (1, -1):
            moved = {other: x.clone() for other, x in start.items()}
            moved[name][place] += sign * 1e-5
            sides.append(whole(moved))
        assert slopes[name][place] == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)


def test_first_order_is_the_slope_at_the_end_and_only_the_head_moves_in_anil() -> None:
    model, batch = Named(small()), EPISODES.batch([3])
    ((support, query),) = tasks_of(batch)
    start = {name: x.detach() for name, x in model.named_parameters()}
    end = adapted_by_hand(start, support, 3, 0.2)
    wanted = torch.autograd.grad(loss_by_hand(end, query), [*end.values()])
    found = slopes_of(build_loss(model, "classification", ALGORITHMS["fomaml"], Inner(3, 0.2)), model, batch)
    for slope, name in zip(wanted, end, strict=True):
        torch.testing.assert_close(found[name], slope, rtol=1e-12, atol=1e-14)
    head = frozenset({"inner.3.weight", "inner.3.bias"})
    anil = build_loss(model, "classification", ALGORITHMS["anil"], Inner(3, 0.2), head)
    moved = {name for name, x in anil.adapted(start, support, Inner(3, 0.2)).items() if not torch.equal(x, start[name])}
    assert moved == head


@pytest.mark.parametrize("name", ["maml", "reptile", "metasgd"])
def test_many_tasks_at_once_are_each_task_by_itself(name: str) -> None:
    whole, parts = Named(small()), Named(small())
    loss, other = (build_loss(m, "classification", ALGORITHMS[name], Inner(2, 0.3)) for m in (whole, parts))
    together = slopes_of(loss, whole, EPISODES.batch([0, 1, 2]))
    alone = [slopes_of(other, parts, EPISODES.batch([number])) for number in range(3)]
    for name, slope in together.items():
        torch.testing.assert_close(slope, sum(each[name] for each in alone), rtol=1e-9, atol=1e-12)


def test_a_step_of_reptile_is_task_arithmetic() -> None:
    model = Named(small())
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    batch = EPISODES.batch([0, 1, 2, 3])
    loss = build_loss(model, "classification", ALGORITHMS["reptile"], Inner(5, 0.2))
    options = Options(steps=1, batch_size=4, learning_rate=0.7, optimizer="sgd", schedule="constant", clip=0.0)
    fit(model, EPISODES, loss, options)
    tasks = {}
    for number, (support, query) in enumerate(tasks_of(batch)):
        joined = {name: torch.cat([x, query[name]]) for name, x in support.items()}
        tasks[f"task{number}"] = {k: x.detach() for k, x in adapted_by_hand(start, joined, 5, 0.2).items()}
    parameters = {"weight": 0.7 / 4}
    merged = merge_state_dicts(tasks, method="task_arithmetic", base=start, parameters=parameters, out_dtype="float64")
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.detach(), merged[name], rtol=0, atol=1e-6)
        assert not torch.equal(x, start[name])


def test_learned_rates_are_learned_with_the_model() -> None:
    model, batch = Named(small()), EPISODES.batch([0])
    loss = build_loss(model, "classification", ALGORITHMS["metasgd"], Inner(1, 0.2))
    slopes = slopes_of(loss, model, batch)
    ((support, query),) = tasks_of(batch)
    start = {k: x.detach().requires_grad_() for k, x in model.named_parameters() if k.startswith("inner")}
    first = torch.autograd.grad(loss_by_hand(start, support), [*start.values()])
    end = {k: (x - 0.2 * g).detach().requires_grad_() for (k, x), g in zip(start.items(), first, strict=True)}
    last = torch.autograd.grad(loss_by_hand(end, query), [*end.values()])
    for name, a, b in zip(start, first, last, strict=True):
        torch.testing.assert_close(slopes[f"meta.{name.replace('.', '/')}"], -a * b, rtol=1e-9, atol=1e-12)


def test_factors_and_shifts_are_learned_and_folded_into_the_weights() -> None:
    model = Named(nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)).double())
    head = frozenset({"inner.3.weight", "inner.3.bias"})
    loss = build_loss(model, "classification", ALGORITHMS["mtl"], Inner(2, 0.1), head)
    frozen = model.inner[0].weight.detach().clone()  # type: ignore[index]

    def shaped(generator: torch.Generator) -> Episode:
        return Episode(*({**side, "x": side["x"][:, None]} for side in draw(generator)))

    fit(model, DrawnEpisodes(shaped), loss, Options(steps=5, batch_size=2, learning_rate=0.05))
    weight = model.inner[0].weight  # type: ignore[index]
    assert torch.equal(weight, frozen) and model.get_parameter("meta.inner/0/weight").shape == (3, 1, 1)
    x = torch.randn(5, 1, 4).double()
    unfolded = loss.objective.model.at(loss.start())(x=x)
    loss.fold()
    torch.testing.assert_close(model(x), unfolded, rtol=1e-12, atol=1e-14)
    assert not torch.equal(weight, frozen)


CLASSIFIER, LANGUAGE = "classification", "lm"
TEXTS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, {"num_labels": 3}, CLASSIFIER),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"num_key_value_heads": 1}, LANGUAGE),
    "encoder": (transformers.BertModel, transformers.BertConfig, {}, "embedding"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_models_of_texts_adapt_for_many_tasks_at_once(kind: str) -> None:
    """With padding: as each task does by itself, with the model's own mask, and derived a second time."""
    model_class, config, more, task = TEXTS[kind]
    torch.manual_seed(0)
    model = model_class(config(**WORDS, **more, max_position_embeddings=16)).eval()
    ids, mask = torch.randint(4, 40, (3, 4, 6)), torch.ones(3, 4, 6, dtype=torch.long)
    mask[:, 1, 4:] = mask[1, 2, 2:] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.randint(3, (3, 4))}
    if task == "lm":
        batch["labels"] = torch.where(mask.bool(), ids, IGNORED)
    if task == "embedding":
        batch |= {"positive_input_ids": ids.flip(1), "positive_attention_mask": mask.flip(1)}
    objective = TaskObjective(functional_model(model), task)
    start = {name: x for name, x in model.named_parameters() if "pooler" not in name or task != "embedding"}
    episodes = {f"{side}/{name}": x for side in ("support", "query") for name, x in batch.items()}

    def one(support: Batch, query: Batch) -> Tensor:
        return objective(adapt(objective, start, support, steps=1, rate=0.5), query)

    together = over_tasks(one, episodes)
    slopes = torch.autograd.grad(together.sum(), [*start.values()])
    assert all(bool(slope.isfinite().all()) for slope in slopes) and any(bool(slope.any()) for slope in slopes)
    for number in range(3):
        copied = model_class(model.config).eval()
        copied.load_state_dict(model.state_dict())
        alone = {name: x[number] for name, x in batch.items()}
        total, count = LOSSES[task](copied, alone)
        (total / count).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for x in copied.parameters():
                x -= 0.5 * (torch.zeros_like(x) if x.grad is None else x.grad)
        total, count = LOSSES[task](copied, alone)
        torch.testing.assert_close(together[number], total / count, rtol=1e-4, atol=1e-5)


def test_a_mask_hides_the_padding_and_in_decoders_the_tokens_after() -> None:
    mask = torch.tensor([[1, 1, 0]])
    shown = (additive_mask(mask, causal=False) == 0)[0, 0]
    assert shown.tolist() == [[True, True, False]] * 3
    shown = (additive_mask(mask, causal=True) == 0)[0, 0]
    assert shown.tolist() == [[True, False, False], [True, True, False], [True, True, False]]


@pytest.mark.parametrize("name", ["proto", "relation"])
def test_metrics_compare_with_the_means_of_classes(name: str) -> None:
    model, batch = Named(small()), EPISODES.batch([0])
    loss = build_loss(model, "classification", ALGORITHMS[name], Inner(1, 0.1))
    ((support, query),) = tasks_of(batch)
    vectors = [model.inner[:3](side["x"]) for side in (support, query)]  # type: ignore[index]
    means = torch.stack([vectors[0][support["labels"] == way].mean(0) for way in range(3)])
    if name == "proto":
        distances = torch.cdist(vectors[1], means).square()
        wanted = nn.functional.cross_entropy(-distances, query["labels"])
    else:
        pairs = torch.stack([torch.stack([torch.cat([mean, x]) for mean in means]) for x in vectors[1]])
        found = model.get_submodule("meta")(pairs).squeeze(-1).sigmoid()
        wanted = (found - torch.eye(3)[query["labels"]]).square().mean()
    torch.testing.assert_close(loss(model, batch).total, wanted, rtol=1e-9, atol=1e-12)
    before = wanted.item()
    fit(model, EPISODES, loss, Options(steps=30, batch_size=4, learning_rate=0.02))
    assert loss(model, batch).total.item() < before


def test_declared_algorithms_all_learn_on_easy_tasks() -> None:
    """Of each algorithm: the loss over tasks that training has not seen falls."""
    for name, row in ALGORITHMS.items():
        if row.named:
            continue  # its episodes have names: test_film.py
        model = Named(small())
        head = frozenset({"inner.3.weight", "inner.3.bias"}) if row.head_only else frozenset[str]()
        loss = build_loss(model, "classification", row, Inner(2, 0.1), head)
        unseen = replace(EPISODES, seed=1).batch(range(12))

        def value(loss: MetaLoss = loss, unseen: Batch = unseen) -> float:
            with torch.no_grad():
                return float(over_tasks(partial(loss.loss_of, loss.start()), unseen).mean())

        before, rate = value(), 1.0 if row.optimizer == "sgd" else 0.02
        options = Options(steps=20, batch_size=4, clip=0.0, learning_rate=rate, optimizer=row.optimizer)
        fit(model, EPISODES, loss, options)
        assert value() < 0.97 * before, name


def test_vectors_of_a_decoder_are_those_of_the_last_token_behind_a_prompt() -> None:
    """Positions that the model puts before the text are not counted by the mask."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.classifier = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: ARG002
            states = torch.cat([torch.zeros(len(input_ids), 2, 4), self.embed(input_ids)], 1)
            scores: Tensor = self.classifier(states)
            return scores

    model = Decoder()
    loss = build_loss(model, "classification", ALGORITHMS["proto"], Inner(1, 0.1))
    assert isinstance(loss, Prototypes)
    ids, mask = torch.tensor([[5, 6, 7], [4, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = loss.vectors(loss.start(), {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(found, model.embed.weight[[7, 8]])
