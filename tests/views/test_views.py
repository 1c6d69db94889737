"""Views as such: tensors made of several others, views of views, and views whose values are still to come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest
import torch
from helpers_views import make_patch, patched, pending, plain_tensors, rewritten, rotated, save_plain

from mergekit_lfm.output.layout import lay_out
from mergekit_lfm.plan.budget import Budget
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.store.checkpoint import Checkpoint, Cost, open_checkpoint
from mergekit_lfm.store.tensors import TensorSpec
from mergekit_lfm.views.base import ReadRows, Source, View
from mergekit_lfm.views.patched import patched_view


@dataclass
class Outer:
    """Makes [n, m] from a column [n] and a row [m] of another file, two rows at a time."""

    spec: TensorSpec
    sources: tuple[Source, Source]
    whole: bool = False
    scratch: int = 1000
    made: int = 0

    @property
    def panels(self) -> list[tuple[int, int]]:
        return [(i, min(i + 2, self.spec.shape[0])) for i in range(0, self.spec.shape[0], 2)]

    def rows(self, first: int, last: int, read: ReadRows) -> torch.Tensor:
        self.made += 1
        return read(self.sources[0], first, last)[:, None] * read(self.sources[1], 0, self.spec.shape[1])


@final
class Products(View):
    """One tensor, `product`, of a checkpoint's up.bias [301] and `other` [5]; and the checkpoint's `scale`."""

    def __init__(self, inner: Checkpoint, other: Checkpoint) -> None:
        self.product = Outer(TensorSpec("product", (301, 5), "bfloat16"), ((0, "up.bias"), (1, "other")))
        super().__init__({"product": self.product.spec, "again": inner["scale"]}, (inner, other), {"products": True})

    def maker(self, name: str) -> Outer | None:
        return self.product if name == "product" else None

    def source(self, name: str) -> Source:
        return 0, "scale" if name == "again" else name


@pytest.fixture
def stored(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_plain(tmp_path / "model"))


@pytest.fixture
def products(stored: Checkpoint, tmp_path: Path) -> Products:
    from safetensors.torch import save_file

    save_file({"other": torch.arange(5).bfloat16()}, tmp_path / "other.safetensors")
    return Products(stored, open_checkpoint(tmp_path / "other.safetensors"))


def test_a_tensor_is_made_from_tensors_of_two_checkpoints(products: Products) -> None:
    expected = plain_tensors()["up.bias"][:, None] * torch.arange(5).bfloat16()
    assert torch.equal(products.read("product").view(301, 5), expected)
    assert torch.equal(products.read("product", 7, 26), expected.flatten()[7:26])
    assert products.location("product") is None and products.location("again") == products.inners[0].location("scale")
    assert [file.name for file in products.files][-1] == "other.safetensors"


def test_neighbouring_ranges_share_a_panel(products: Products) -> None:
    for start in range(0, 30, 3):
        products.read("product", start, start + 3)
    assert products.product.made == 3  # ten ranges of three panels of two rows of five


def test_a_pending_view_has_shapes_and_costs_but_no_place_and_no_bytes(stored: Checkpoint) -> None:
    view = pending(stored)
    assert dict(view) == dict(stored) and view.files == stored.files and view.layout == stored.layout
    assert {view.location(name) for name in view} == {None}
    assert {view.cost(name) for name in view} == {Cost(100)} and view.resident == 1000
    with pytest.raises(AssertionError, match="before its alignment or edit was made"):
        view.read("up.weight")


@final
class Added(View):
    """A checkpoint's `scale`, and once more under another name."""

    def __init__(self, inner: Checkpoint) -> None:
        super().__init__({"scale": inner["scale"], "again": inner["scale"]}, (inner,), {"added": True})

    def maker(self, name: str) -> None:  # noqa: ARG002
        return None

    def source(self, name: str) -> Source:  # noqa: ARG002
        return 0, "scale"


def test_an_output_of_other_tensors_than_the_files_is_laid_out_anew(stored: Checkpoint) -> None:
    view = Added(stored)
    specs = [TensorSpec(name, spec.shape, spec.dtype) for name, spec in view.items()]
    assert [shard.tensors for shard in lay_out(view, specs, None)] == [tuple(specs)]
    assert len(lay_out(stored, list(stored.values()), None)) == 2


def test_costs_add_up_through_views(stored: Checkpoint) -> None:
    inner = rotated(rewritten(stored))
    outer = patched(inner)
    alone = patched(stored).cost("up.weight").scratch
    assert outer.cost("up.weight").scratch == alone + inner.cost("up.weight").scratch > alone
    assert outer.cost("down.weight") == inner.cost("down.weight")
    assert outer.cost("down.weight").at_once and not patched(stored).cost("down.weight").at_once
    assert outer.resident == inner.resident + patched(stored).resident > inner.resident > 0
    assert outer.cost("scale").scratch == patched(stored).cost("scale").scratch  # replaced: nothing is read for it


def test_the_plan_counts_views_of_views(stored: Checkpoint) -> None:
    recipe = Recipe.parse({"merge_method": "passthrough", "models": [{"model": str(stored.path)}]})
    view = patched(rotated(stored))
    budget = Budget(make_plan(recipe, views=(view,)))
    jobs = {job.name: job for job in budget.plan.tensors}
    assert budget.resident_views == view.resident
    assert budget.views(jobs["up.weight"]) == view.cost("up.weight").scratch
    assert budget.by_one_worker(jobs["down.weight"]) and not budget.by_one_worker(jobs["up.weight"])


def test_views_of_views_are_told_apart(stored: Checkpoint) -> None:
    first, second = make_patch(stored), make_patch(stored, ("down.weight",))
    both = patched_view(patched_view(stored, first), second)
    assert len({view.digest for view in (both, patched_view(stored, second), patched_view(stored, first))}) == 3
    assert len({view.content for view in (both, patched_view(stored, second), patched_view(stored, first))}) == 3
