"""Pair the attention heads of two models: find the best matrices inside every pair, then assign heads by their worth.

A head here is a group: a head of keys and values with the query heads that read it. Inside, a matrix acts on keys and
queries, another on values and the output, and query heads change places. The best matrices depend on the places of
the query heads, and these on the matrices; with several query heads, the two are improved in turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lfm.align.choices import Family, MatchScores, assign, best_matrix
from mergekit_lfm.arch.table import HEAD_VIEWS, Heads
from mergekit_lfm.artifacts.transform import HeadsElement

ROUNDS = 20  # the most turns; two or three usually suffice


@dataclass(frozen=True)
class _Inside:
    """The matrices and query heads inside a pair, with their score."""

    worth: float
    queries: Tensor  # [per_group]
    query_key: Tensor  # [head_dim, head_dim]
    value_output: Tensor


@dataclass(frozen=True)
class _Pair:
    """The scores of a pair, [r, s, head_dim, head_dim] for its query heads r and s; r = s = 1 for key and value."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    def sums(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the two matrices, with the query heads in this order."""
        r = torch.arange(len(queries))
        return self.key[0, 0] + self.query[r, queries].sum(0), self.value[0, 0] + self.output[r, queries].sum(0)

    def judge(self, queries: Tensor, query_key: Tensor, value_output: Tensor) -> _Inside:
        """These with their score."""
        of_keys, of_values = self.sums(queries)
        worth = float((of_keys * query_key).sum() + (of_values * value_output).sum())
        return _Inside(worth, queries, query_key, value_output)

    def with_matrices(self, family: Family, queries: Tensor) -> _Inside:
        """The best matrices for this order of the query heads."""
        of_keys, of_values = self.sums(queries)
        return self.judge(queries, best_matrix(family.query_key, of_keys), best_matrix(family.value_output, of_values))

    def climb(self, family: Family, query_key: Tensor, value_output: Tensor) -> _Inside:
        """Improve query heads and matrices in turns, starting from these matrices, until the score stops growing."""
        best: _Inside | None = None
        for _ in range(ROUNDS):
            scores = (self.query * query_key).sum((2, 3)) + (self.output * value_output).sum((2, 3))
            tried = self.with_matrices(family, assign(scores))
            if best is not None and tried.worth <= best.worth:
                break
            best, query_key, value_output = tried, tried.query_key, tried.value_output
        assert best is not None
        return best

    def best(self, family: Family, now: _Inside | None) -> _Inside:
        """The best of several climbs: one from each possible partner of the first query head, one from `now`."""
        if len(self.query) == 1:
            return self.with_matrices(family, torch.zeros(1, dtype=torch.int64))
        tried = [] if now is None else [now, self.climb(family, now.query_key, now.value_output)]
        for s in range(len(self.query)):
            query_key = best_matrix(family.query_key, self.key[0, 0] + self.query[0, s])
            value_output = best_matrix(family.value_output, self.value[0, 0] + self.output[0, s])
            tried.append(self.climb(family, query_key, value_output))
        return max(tried, key=lambda inside: inside.worth)


def _pairs(group: Heads, scores: MatchScores) -> list[list[_Pair]]:
    """The scores of every head of one model with every head of the other."""
    views = {}
    for name in HEAD_VIEWS:
        shape = (group.groups, group.size(name) // (group.groups * group.head_dim), group.head_dim)
        views[name] = scores.view(name, *shape, *shape).permute(0, 3, 1, 4, 2, 5)  # [j, k, r, s, head_dim, head_dim]
    count = range(group.groups)
    return [[_Pair(**{name: view[j, k] for name, view in views.items()}) for k in count] for j in count]


def _present(pairs: list[list[_Pair]], element: HeadsElement) -> list[_Inside]:
    """A complete element's matrices and query heads for each head, with their scores."""
    groups, queries, query_key, value_output = vars(element).values()
    return [
        row[int(k)].judge(*inside)
        for row, k, *inside in zip(pairs, groups, queries, query_key, value_output, strict=True)
    ]


def heads_value(group: Heads, scores: MatchScores, element: HeadsElement) -> float:
    """<C, element> of a complete element."""
    return sum(inside.worth for inside in _present(_pairs(group, scores), element))


def best_heads(group: Heads, family: Family, scores: MatchScores, now: HeadsElement) -> HeadsElement:
    """The best known element, never worse than `now`, a complete one.

    With one query head per head it is optimal; with several it is the best of some climbs.
    """
    pairs, present = _pairs(group, scores), _present(_pairs(group, scores), now)
    assert now.groups is not None
    inside = [
        [pair.best(family, here if k == at else None) for k, pair in enumerate(row)]
        for row, here, at in zip(pairs, present, now.groups.tolist(), strict=True)
    ]
    order = assign(torch.tensor([[each.worth for each in row] for row in inside], dtype=torch.float64), now.groups)
    return _element(order, [row[int(k)] for row, k in zip(inside, order, strict=True)])


def best_query_key(group: Heads, family: Family, scores: MatchScores, now: HeadsElement) -> HeadsElement:
    """`now`, a complete element, with the best matrices on queries and keys; the rest stays."""
    pairs = _pairs(group, scores)
    assert now.groups is not None and now.queries is not None and now.value_output is not None
    sums = [row[int(k)].sums(q)[0] for row, k, q in zip(pairs, now.groups, now.queries, strict=True)]
    matrices = torch.stack([best_matrix(family.query_key, of_keys) for of_keys in sums])
    return HeadsElement(now.groups, now.queries, matrices, now.value_output)


def _element(groups: Tensor, inside: list[_Inside]) -> HeadsElement:
    return HeadsElement(
        groups,
        torch.stack([each.queries for each in inside]),
        torch.stack([each.query_key for each in inside]),
        torch.stack([each.value_output for each in inside]),
    )
