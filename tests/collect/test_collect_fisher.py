"""The diagonal Fisher against explicit loops over examples and labels in float64, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_collect import (
    Case,
    OutOfSight,
    Positions,
    Tied,
    arrays,
    brute_force_fisher,
    convolutional,
    expected_classes,
    mlp,
    texts,
    transformer,
    true_tokens,
)
from torch import Tensor, nn

from mergekit_lfm.artifacts.statistics import Statistics
from mergekit_lfm.collect import examplewise, fisher
from mergekit_lfm.collect.request import StatisticsRequest
from mergekit_lfm.collect.run import collect
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.batches import Batch
from mergekit_lfm.runtime.subject import Subject

SIZES = [3, 4, 1]


def embedding_entries(output: Any, _example: Batch) -> list[tuple[float, Tensor]]:
    """The entries of the embedding: the tensor itself, else the unit vector along the mean state."""
    if isinstance(output, Tensor):
        return [(1.0, x) for x in output[0]]
    mean = output.last_hidden_state[0].mean(0)
    return [(1.0, x) for x in mean / mean.norm()]


class Mixed(nn.Module):
    """Mixes the batch: an example's output depends on its neighbours unless it is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x + 1) * x.std(0, correction=0).mean().add(1)
        return out


class Attended(nn.Module):
    """Uses the parameters of nn.MultiheadAttention without a call of their module, and returns a tuple inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attention(x, x, x)[0].mean(1))
        return out


def case(name: str) -> Case:
    torch.manual_seed(4)
    made: dict[str, Callable[[], Case]] = {
        "mlp": lambda: Case(mlp(6, 7, 5, 3), arrays(6)),
        "tokens": lambda: Case(nn.Sequential(mlp(6, 7, 6), nn.Flatten(), mlp(24, 3)), arrays(4, 6)),
        "conv": lambda: Case(convolutional(), arrays(1, 8, 8)),
        "tied": lambda: Case(Tied().double(), texts(7), "lm"),
        "out of sight": lambda: Case(OutOfSight().double(), arrays(6)),
        "positions": lambda: Case(Positions().double(), texts(6), "embedding"),
        "mixed": lambda: Case(Mixed().double(), arrays(6)),
        "attention": lambda: Case(Attended().double(), arrays(4, 6)),
        "recurrent": lambda: Case(nn.Sequential(nn.GRU(6, 3, batch_first=True), Last()).double(), arrays(4, 6)),
        **{kind: lambda kind=kind: Case(transformer(kind), texts(9), "lm") for kind in ("llama", "gpt2")},  # type: ignore[misc]
        "bert": lambda: Case(transformer("bert"), texts(9)),
        "encoder": lambda: Case(transformer("encoder"), texts(9), "embedding"),
    }
    found = made[name]()
    found.model.eval()
    return found


class Last(nn.Module):
    """The last state of a recurrent network."""

    def forward(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[0][:, -1]


TOGETHER = ("mlp", "tokens", "conv", "tied", "positions", "llama", "gpt2", "bert", "encoder")
SINGLY = ("out of sight", "mixed", "attention", "recurrent")
SCALARS: dict[str, Any] = {"classification": expected_classes, "lm": true_tokens, "embedding": embedding_entries}
LABELS: dict[str, Any] = {"classification": "expected", "lm": "true", "embedding": "expected"}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each statistic, True if batches were taken whole."""
    found: list[bool] = []
    original = fisher.FisherStatistic._separable

    def separable(self: fisher.FisherStatistic, request: StatisticsRequest) -> bool:
        found.append(original(self, request))
        return found[-1]

    monkeypatch.setattr(fisher.FisherStatistic, "_separable", separable)
    return found


def assert_fisher(stats: Statistics, expected: dict[str, Tensor], rtol: float = 2e-7) -> None:
    largest = max(float(x.max()) for x in expected.values())
    for name, x in expected.items():
        if name in stats.info.skipped:
            assert float(x.abs().max()) == 0
        else:
            torch.testing.assert_close(
                stats.read(name).double(), x, rtol=rtol, atol=rtol * float(x.max()) + 1e-20 * largest
            )


@pytest.mark.parametrize("name", [*TOGETHER, *SINGLY])
def test_fisher_is_the_mean_of_squared_gradients(name: str, tmp_path: Path, ways: list[bool]) -> None:
    made = case(name)
    batches = made.data(SIZES)
    stats = collect("fisher", made.model, batches, tmp_path / "fisher", task=made.task, labels=LABELS[made.task])
    assert ways == [name in TOGETHER]
    assert_fisher(stats, brute_force_fisher(made.model, batches, SCALARS[made.task]))
    unused = {"pooler.dense.weight", "pooler.dense.bias"} if name == "encoder" else set()
    assert stats.info.skipped.keys() == unused
    squares = sum(float(stats.tensors.read(entry).double().square().sum()) for entry in stats.tensors)
    assert stats.info.norm == pytest.approx(squares**0.5, rel=1e-12)


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-3)])
def test_a_whole_batch_gives_the_same_as_single_examples(name: str, dtype: torch.dtype, rtol: float) -> None:
    """In float32 both ways have the rounding of the backward pass, which the squares double."""
    made = case(name)
    model, (batch,) = made.model.to(dtype), made.data([5])
    subject = Subject(model, "", {n: n for n, _ in model.named_parameters(remove_duplicate=False)})
    request = StatisticsRequest((subject,), [batch], made.task, (), 10**9, {"labels": LABELS[made.task]})
    statistic = fisher.FisherStatistic(request)
    found = []
    for together in (True, False):
        statistic.together = together
        sums = {n: torch.zeros(s, dtype=torch.float64) for unit in statistic.units.values() for n, s in unit.items()}
        statistic.add(batch, sums)
        found.append(sums)
    largest = max(float(x.max()) for x in found[1].values())
    for entry, x in found[1].items():
        # the gradients of keys' biases are only rounding: compared with the other parameters
        torch.testing.assert_close(found[0][entry], x, rtol=rtol, atol=rtol * (float(x.max()) * 0.1 + 1e-10 * largest))


def test_a_linear_softmax_model_has_the_closed_form(tmp_path: Path) -> None:
    """F of W[k, j] is the mean of p_k (1 - p_k) x_j^2: the variance of the k-th indicator, times the input squared."""
    model, batches = mlp(6, 4), arrays(6)(SIZES)
    stats = collect("fisher", model, batches, tmp_path / "fisher")
    x = torch.cat([batch.args[0] for batch in batches])
    p = model(x).softmax(-1).detach()
    expected = {"0.weight": ((p * (1 - p)).T @ x**2) / len(x), "0.bias": (p * (1 - p)).mean(0)}
    assert_fisher(stats, expected)


def test_labels_of_the_data(tmp_path: Path) -> None:
    model, batches = mlp(6, 7, 3), arrays(6, labels=3)(SIZES)
    stats = collect("fisher", model, batches, tmp_path / "fisher", labels="true")

    def score(output: Tensor, example: Batch) -> list[tuple[float, Tensor]]:
        assert example.labels is not None
        return [(1.0, output[0].log_softmax(-1)[example.labels[0]])]

    assert_fisher(stats, brute_force_fisher(model, batches, score))


def tokens_expected(output: Any, _example: Batch) -> list[tuple[Tensor, Tensor]]:
    """Every token at every position, with its probability."""
    log_p = getattr(output, "logits", output)[0, :-1].log_softmax(-1).flatten()
    return [(score.detach().exp(), score) for score in log_p]


@pytest.mark.parametrize(
    ("made", "scalars", "samples"),
    [
        (lambda: Case(mlp(6, 7, 3), arrays(6)), expected_classes, 1500),
        (lambda: Case(Tied().double(), texts(4), "lm"), tokens_expected, 400),
        (lambda: Case(Positions().double(), texts(4), "embedding"), embedding_entries, 400),
    ],
)
def test_samples_converge_to_the_expectation(
    made: Callable[[], Case], scalars: Any, samples: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    found = made()
    batches = found.data([6])
    stats = collect(
        "fisher", found.model, batches, tmp_path / "fisher", task=found.task, labels="sampled", samples=samples
    )
    for name, x in brute_force_fisher(found.model, batches, scalars).items():
        assert float((stats.read(name) - x).norm() / x.norm()) < 0.1, name


def collected(out: Path, case: Case, sizes: Sequence[int], **options: Any) -> Statistics:
    return collect("fisher", case.model, case.data(sizes), out, task=case.task, **options)


def test_draws_depend_on_seed_and_example_alone(tmp_path: Path) -> None:
    made = case("tied")
    one, two, other = (
        collected(tmp_path / f"{i}", made, sizes, seed=seed, samples=2)
        for i, (sizes, seed) in enumerate([([8], 0), (SIZES, 0), ([8], 1)])
    )
    assert one.info.options["labels"] == "sampled"
    for name in ("embed.weight", "block.bias"):
        torch.testing.assert_close(one.read(name), two.read(name), rtol=1e-6, atol=0)
    assert (one.read("block.bias") / other.read("block.bias") - 1).abs().max() > 0.01


def test_batches_change_the_fisher_by_rounding_only(tmp_path: Path) -> None:
    made = case("llama")
    made.model.float()
    one, many = (collected(tmp_path / f"{len(s)}", made, s, labels="true") for s in ([8], [1] * 8))
    for name in one.tensors:
        torch.testing.assert_close(one.tensors.read(name), many.tensors.read(name), rtol=1e-3, atol=1e-7)


def test_a_parameter_stored_twice_has_its_fisher_twice(tmp_path: Path) -> None:
    stats = collected(tmp_path / "fisher", case("tied"), [4])
    assert torch.equal(stats.read("embed.weight"), stats.read("head.weight"))


def test_tensors_are_chosen_by_name(tmp_path: Path) -> None:
    stats = collected(tmp_path / "fisher", case("mlp"), [4], layers=["2.", "bias"])
    assert stats.tensors.keys() == {"fisher/0.bias", "fisher/2.weight", "fisher/2.bias", "fisher/4.bias"}
    assert stats.info.skipped.keys() == {"0.weight", "4.weight"}
    whole = collected(tmp_path / "whole", case("mlp"), [4])
    assert all(torch.equal(stats.tensors.read(name), whole.tensors.read(name)) for name in stats.tensors)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("lm", "expected", "one backward pass for every entry of the vocabulary"),
        ("embedding", "true", "embedding cannot have 'true' labels; choose one of sampled, expected"),
        ("classification", "some", "labels: found 'some', expected one of expected, sampled, true"),
        ("classification", "true", "8 examples have no label"),
    ],
)
def test_labels_that_cannot_be_had_are_refused(task: Any, labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        collect("fisher", mlp(6, 3), arrays(6)([8]), tmp_path / "fisher", task=task, labels=labels)


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"found the label [34], expected 0 to 2"):
        collect("fisher", mlp(6, 3), arrays(6, labels=5)([20]), tmp_path / "fisher", labels="true")


@pytest.mark.parametrize(
    ("model", "data", "task", "message"),
    [
        (
            lambda: mlp(6, 3),
            arrays(6),
            "lm",
            r"\[8, 3\], expected \[examples, tokens.*'lm'; .* task 'classification' takes",
        ),
        (lambda: Tied().double(), texts(4), "classification", r"\[8, 4, 29\], expected .*classes\].* task 'lm' takes"),
        (lambda: mlp(6, 3), arrays(5, 5, 6), "lm", r"\[8, 5, 5, 3\], expected .*; wrap it"),
        (lambda: mlp(6, 1), arrays(6), "classification", "one class, whose probability is always 1"),
        (
            lambda: labelled("regression"),
            texts(4),
            "classification",
            "problem_type 'regression', expected a classifier",
        ),
        (lambda: labelled("multi_label_classification"), texts(4), "classification", "problem_type 'multi_label"),
        (lambda: Tied().double(), texts(1), "lm", "0 everywhere"),
    ],
)
def test_models_without_a_fisher_of_the_task_are_refused(
    model: Callable[[], nn.Module], data: Any, task: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        collect("fisher", model(), data([8]), tmp_path / "fisher", task=task)
    assert not (tmp_path / "fisher").exists()


def labelled(problem: str) -> nn.Module:
    model: Any = transformer("bert")
    model.config.problem_type = problem
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(("elements", "groups"), [(1000, [3]), (20, [2, 1]), (0, [1, 1, 1])])
def test_both_ways_are_compared_within_the_memory(elements: int, groups: list[int]) -> None:
    """The last parameter's gradients are zero except for rounding; the others show that, whatever group they are in."""
    parameters = [nn.Parameter(torch.ones(10)) for _ in range(3)]
    seen: list[int] = []

    def way(last: float) -> Callable[[examplewise.Parameters], None]:
        def add(wanted: examplewise.Parameters) -> None:
            seen.append(len(wanted))
            for parameter, (total,) in wanted.items():
                total += last if parameter is parameters[2] else 1.0

        return add

    memory = elements * examplewise.TRIED_BYTES
    assert examplewise.gradients_agree(parameters, way(1e-16), way(1e-20), memory)
    assert seen == [n for n in groups for _ in "12"]
    assert not examplewise.gradients_agree(parameters, way(1e-3), way(1e-20), memory)
    assert not examplewise.gradients_agree(parameters, way(float("nan")), way(1.0), memory)
