"""Terms of a distillation against sums in float64 that are written from the papers, one example after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lfm.distill import terms
from mergekit_lfm.distill.blocks import fed
from mergekit_lfm.distill.course import Course, Wanted, even_pairs
from mergekit_lfm.distill.divergences import kd_divergence
from mergekit_lfm.distill.follow import Follow
from mergekit_lfm.distill.teachers import NUMBER, Live, Reading, largest, rows_of
from mergekit_lfm.distill.watch import PLACES, SCORES, STATE, Part, watch
from mergekit_lfm.runtime.functional import use_plain_attention
from mergekit_lfm.train.examples import IGNORED, Examples

N, D = 5, 4


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mine, theirs = torch.randn(2, N, D, dtype=torch.float64)
    return mine, theirs


def _huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_the_largest_scores_and_the_rest_are_all_scores() -> None:
    """With all classes but one, the rest is that class; with fewer, p is summed over it."""
    torch.manual_seed(0)
    mine, theirs = 3 * torch.randn(2, 6, 5, dtype=torch.float64)
    for kind in ("forward", "reverse", "js"):
        top, ids = largest(theirs, 4, 2.0)
        whole = kd_divergence(mine, theirs, 2.0, kind)
        assert float(terms.kd_of_largest(mine, top, ids, 2.0, kind)) == pytest.approx(float(whole), rel=1e-12)
    top, ids = largest(theirs, 2, 2.0)
    p, q, total = (theirs / 2).softmax(-1), (mine / 2).softmax(-1), 0.0
    for row in range(6):
        first = p[row].argsort(descending=True)[:2].tolist()
        groups = [[first[0]], [first[1]], [i for i in range(5) if i not in first]]
        shares = [(float(p[row][group].sum()), float(q[row][group].sum())) for group in groups]
        total += 4 * sum(a * math.log(a / b) for a, b in shares)
    assert float(terms.kd_of_largest(mine, top, ids, 2.0, "forward")) == pytest.approx(total, rel=1e-12)


def test_sorted_probabilities_by_hand() -> None:
    """Sorted and followed by zeros; the order of classes has no part, and the larger vocabulary may be on each side."""
    torch.manual_seed(0)
    mine, theirs = 2 * torch.randn(3, 4, dtype=torch.float64), 2 * torch.randn(3, 6, dtype=torch.float64)
    for a, b in ((mine, theirs), (theirs, mine)):
        expected = list[float]()
        for row in range(3):
            sides = list[list[float]]()
            for scores in (a[row].tolist(), b[row].tolist()):
                whole = sum(math.exp(x / 2) for x in scores)
                sides.append(sorted((math.exp(x / 2) / whole for x in scores), reverse=True))
            expected.append(sum(abs(q - p) for q, p in itertools.zip_longest(*sides, fillvalue=0.0)))
        assert terms.uld(a, b, 2.0).tolist() == pytest.approx(expected, rel=1e-12)
    assert terms.uld(mine, mine[:, [2, 0, 3, 1]], 2.0).tolist() == pytest.approx([0.0] * 3, abs=1e-15)


def test_relations_by_hand(vectors: tuple[Tensor, Tensor]) -> None:
    """Distances and angles of RKD, and the triplets, over all pairs and triplets of a batch."""
    a, b = ([[float(y) for y in row] for row in x] for x in vectors)
    pairs = [*itertools.combinations(range(N), 2)]

    def scaled(x: list[list[float]]) -> dict[tuple[int, int], float]:
        found = {pair: math.dist(x[pair[0]], x[pair[1]]) for pair in pairs}
        mean = sum(found.values()) / len(found)
        return {key: d / mean for (i, j), d in found.items() for key in ((i, j), (j, i))}

    first, second = scaled(a), scaled(b)
    expected = sum(_huber(first[pair] - second[pair]) for pair in pairs) / len(pairs)
    assert float(terms.distance(*vectors)) == pytest.approx(expected, rel=1e-12)

    def cosine(x: list[list[float]], j: int, i: int, k: int) -> float:
        sides = [[p - q for p, q in zip(x[other], x[j], strict=True)] for other in (i, k)]
        dot = sum(p * q for p, q in zip(*sides, strict=True))
        return float(dot / math.prod(math.hypot(*side) for side in sides))

    triplets = [(j, i, k) for j in range(N) for i, k in pairs if j not in (i, k)]
    expected = sum(_huber(cosine(a, *t) - cosine(b, *t)) for t in triplets) / len(triplets)
    assert float(terms.angle(*vectors)) == pytest.approx(expected, rel=1e-12)

    def chance(d: dict[tuple[int, int], float], j: int, i: int, k: int) -> float:
        return 1 / (1 + math.exp(d[j, i] - d[j, k]))

    expected = 0.0
    for t in triplets:
        p, q = chance(second, *t), chance(first, *t)
        expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(terms.triplet(*vectors)) == pytest.approx(expected / len(triplets), rel=1e-10)


def test_equal_vectors_have_gradients() -> None:
    x = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    (terms.distance(x, torch.eye(3, 2).double()) + terms.triplet(x, torch.eye(3, 2).double())).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_the_bound_on_shared_information_by_hand(vectors: tuple[Tensor, Tensor]) -> None:
    """-ln of the normal density, less ln sqrt(2 pi); its negative is least where the variance is the mean square."""
    mine, theirs = vectors
    spread = torch.randn(D, dtype=torch.float64)
    variances = [math.log1p(math.exp(float(s))) + terms.LEAST for s in spread]
    for row in range(N):
        normal = [
            (theirs[row, c] - mine[row, c]).item() ** 2 / (2 * variances[c]) + math.log(2 * math.pi * variances[c]) / 2
            for c in range(D)
        ]
        expected = sum(normal) / D - math.log(2 * math.pi) / 2
        found = terms.shared_information(mine, theirs, spread)[row]
        assert float(found) == pytest.approx(expected, rel=1e-10)


def test_attention_and_local_classes_by_hand(vectors: tuple[Tensor, Tensor]) -> None:
    mine, theirs = (x.softmax(-1) for x in vectors)
    theirs = torch.where(torch.arange(D) == 3, 0, theirs)
    expected = [
        sum(float(p * (p / q).log()) for p, q in zip(t[:3], m[:3], strict=True))
        for t, m in zip(theirs, mine, strict=True)
    ]
    assert terms.attention(mine, theirs).tolist() == pytest.approx(expected, rel=1e-12)
    assert terms.attention(torch.eye(D).double(), torch.eye(D).double()).tolist() == [0.0] * D
    scores, labels = torch.randn(N, 3, dtype=torch.float64), torch.tensor([2, 0, 2, 0, 0])
    unit = vectors[1] / vectors[1].norm(dim=1, keepdim=True)
    total = 0.0
    means = torch.stack([unit[labels == label].mean(0) for label in (0, 2)])
    for row in range(N):
        near = torch.nn.functional.cosine_similarity(unit[row][None], means) * math.sqrt(D)
        p, q = (near / 2).softmax(-1), (scores[row, [0, 2]] / 2).softmax(-1)
        total += 4 * float((p * (p / q).log()).sum())
    assert float(terms.local(scores, vectors[1], labels, 2.0)) == pytest.approx(total, rel=1e-10)


def _llama(layers: int, seed: int, vocabulary: int = 40) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().train()


def _batch(**more: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, IGNORED), **more}


@pytest.mark.parametrize("weights", [{"kd": 1.0}, {"hint": 1.0, "attention": 0.5}, {"vid": 1.0}, {"lit": 1.0}])
def test_a_batch_is_its_examples_one_by_one(weights: dict[str, float]) -> None:
    """Padding and neighbours change nothing: the sum over a batch is that over its examples, in number and gradient."""
    teacher, student = _llama(4, 0).eval(), _llama(2, 1)
    use_plain_attention(teacher)
    course = Course("lm", weights, [even_pairs(2, 4)], [1.0])
    follow = Follow(course, [Live(teacher, Reading("lm", course.wanted(0)))])
    batch = _batch()
    follow.build(student, batch, 0)
    whole = follow(student, batch)
    apart = [follow(student, row) for row in rows_of(batch)]
    assert whole.number == sum(each.number for each in apart) == 6
    total = torch.stack([each.total for each in apart]).sum()
    torch.testing.assert_close(whole.total, total, rtol=1e-10, atol=0)
    names = [name for name, x in student.named_parameters() if x.requires_grad]
    parameters = [student.get_parameter(name) for name in names]
    mine, theirs = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (whole.total, total))
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_targets_are_compared_in_their_places_and_a_batch_is_its_examples() -> None:
    """By the two models alone, in float64: the mean over pairs, for each target of an example."""
    theirs: Any = [
        {"input_ids": [2, 30, 31, 32], "labels": [2, 30, 31, 32], PLACES: [-1, 0, 2, 4]},
        {"input_ids": [2, 33], "labels": [2, 33], PLACES: [-1, 0]},
    ]
    items = [{name: torch.tensor(x) for name, x in item.items()} for item in theirs]
    examples = Examples(items, {"input_ids": 0, "labels": IGNORED, PLACES: -1})
    teacher, student = _llama(2, 0, 50).eval(), _llama(2, 1)
    course = Course("lm", {"uld": 1.0}, [()], [1.0], 1.5)
    follow = Follow(course, [Live(teacher, Reading("lm", course.wanted(0)), examples)])
    places = torch.tensor([[-1, 0, 1, 2, 3], [-1, 1, 2, -1, -1]])
    batch = _batch(**{PLACES: places, NUMBER: torch.tensor([0, 1])})
    follow.build(student, batch, 0)
    whole, apart = follow(student, batch), [follow(student, row) for row in rows_of(batch)]
    said = [teacher(item["input_ids"][None]).logits[0] for item in items[:1]]
    mine = student(batch["input_ids"][:1]).logits[0]
    pairs = [(0, 0), (2, 1)]  # the places 0 and 2; the second example shares none
    rows = [terms.uld(mine[a][None], said[0][b][None], 1.5) for a, b in pairs]
    expected = float(4 * torch.cat(rows).mean().detach())
    assert whole.number == sum(each.number for each in apart) == 6
    assert float(whole.total.detach()) == pytest.approx(expected, rel=1e-10)
    assert [float(each.total.detach()) for each in apart] == pytest.approx([expected, 0.0], rel=1e-10)
    gradients = [torch.autograd.grad(x, student.lm_head.weight)[0] for x in (whole.total, apart[0].total)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-12)


def test_a_block_is_fed_with_the_teachers_states() -> None:
    """By a layer of transformers, called by hand; and a student that is the teacher has no loss."""
    teacher, batch = _llama(2, 0).eval(), _batch()
    course = Course("lm", {"lit": 1.0}, [[(1, 1), (2, 2)]], [1.0])
    follow = Follow(course, [Live(teacher, Reading("lm", course.wanted(0)))])
    twin = _llama(2, 0)
    follow.build(twin, batch, 0)
    assert float(follow(twin, batch).total.detach()) == pytest.approx(0, abs=1e-12)
    student = _llama(2, 1)
    row = {name: x[:1] for name, x in batch.items()}
    states = teacher(**{n: row[n] for n in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states
    with fed(student, {1: states[1]}):
        _, seen = watch(student, "lm", row, Wanted(states=(2,)))
    trunk = student.model
    places = torch.arange(5)[None]
    layer = trunk.layers[1](states[1], position_embeddings=trunk.rotary_emb(states[1], places), position_ids=places)
    expected = trunk.norm(layer if isinstance(layer, Tensor) else layer[0])
    torch.testing.assert_close(seen[STATE.format(2)].values, expected[0], rtol=1e-9, atol=1e-9)


class _Fixed:
    """A teacher with the same scores whatever it is asked."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def about(self, batch: Mapping[str, Tensor]) -> dict[str, Part]:  # noqa: ARG002
        return {SCORES: Part(self.scores, (1,) * len(self.scores))}


@pytest.mark.parametrize("labelled", [True, False])
def test_teachers_of_some_classes_are_compared_among_those_if_there_are_labels(labelled: bool) -> None:
    """Without labels the scores of both, in the order of their classes, are those of one teacher."""
    torch.manual_seed(0)
    student, x = torch.nn.Linear(3, 5).double(), torch.randn(4, 3, dtype=torch.float64)
    mine, low, high = student(x), *(torch.randn(4, n, dtype=torch.float64) for n in (2, 3))
    weights = {"kd": 0.5, **({"task": 1.0} if labelled else {})}
    course = Course("classification", weights, [(), ()], [0.25, 0.75], 2.0, "forward", [(2, 4), (0, 1)])
    labels = torch.tensor([0, 4, 2, 1])
    found = Follow(course, [_Fixed(high), _Fixed(low)])(student.train(), {"input": x, "labels": labels})
    apart = 0.25 * kd_divergence(mine[:, 2:], high, 2.0) + 0.75 * kd_divergence(mine[:, :2], low, 2.0)
    if labelled:
        expected = 0.5 * apart + torch.nn.functional.cross_entropy(mine, labels, reduction="sum")
    else:
        expected = 0.5 * kd_divergence(mine, torch.cat([low, high], 1), 2.0, "forward")
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)
