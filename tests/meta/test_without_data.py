"""Images in place of data: episodes of a pool, the curriculum's gradients, and distillation from black boxes."""

from __future__ import annotations

import torch
from torch import nn

from mergekit_lfm.meta.black_box import BlackBox
from mergekit_lfm.meta.episodes import sides
from mergekit_lfm.meta.losses import Inner
from mergekit_lfm.meta.pool import Pool, PoolEpisodes
from mergekit_lfm.meta.without_data import PATIENCE, BiDf, Purer
from mergekit_lfm.recipe.training import Group, Options
from mergekit_lfm.train.loop import fit

INNER = Inner(1, 0.1)
HOW = Options(steps=3, batch_size=2, learning_rate=1e-2, clip=0.0, groups=(Group("meta.*", learning_rate=0.1),))


class Tiny(nn.Module):
    """A linear classifier of images of 2 x 2 in three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(x.flatten(1))
        return scores


def nets(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Tiny().requires_grad_(requires_grad=number == 0) for number in range(count)]


def new_pool() -> Pool:
    return Pool(2, 3, 4, (1, 2, 2), low=-1.0, high=2.0)


def test_episodes_of_a_pool_have_images_of_their_classes_alone() -> None:
    episodes = PoolEpisodes(2, 3, 4, 1, 2, alone=True)
    batch = episodes.batch(range(8))
    support, query = sides(batch)
    assert batch["teacher"].tolist() == [0, -1, 1, -1, 0, -1, 1, -1]
    for row, teacher in enumerate(batch["teacher"].tolist()):
        for side, each in ((support, 1), (query, 2)):
            places = batch["classes"][row].repeat_interleave(each)
            assert torch.equal(side["number"][row] // 4, places)  # four images of each class
            assert side["labels"][row].tolist() == torch.arange(3).repeat_interleave(each).tolist()
        assert not {*support["number"][row].tolist()} & {*query["number"][row].tolist()}
        if teacher >= 0:
            assert {*(batch["classes"][row] // 3).tolist()} == {teacher}
            assert bool((support["number"][row] % 4 < 2).all() and (query["number"][row] % 4 >= 2).all())
    assert torch.equal(episodes.batch([3, 7])["classes"], batch["classes"][[3, 7]])


def test_images_stay_in_range_and_follow_their_teachers_until_episodes_are_learned() -> None:
    """The images' gradient is the inversion's; once the switch is on, less the outer loss's, times the weight."""
    model, *teachers = nets(3)
    pool, batch = new_pool(), PoolEpisodes(2, 3, 4, 1, 2).batch(range(2))
    loss = Purer(model, INNER, teachers, pool, "x", curriculum=0.5)
    images = torch.cat([pool.images(t) for t in range(2)])
    assert float(images.detach().min()) > -1 and float(images.detach().max()) < 2

    def slopes() -> tuple[torch.Tensor, torch.Tensor]:
        terms = loss(model, batch)
        found = torch.autograd.grad(terms.total / terms.number, [pool.raw[0], pool.raw[1]])
        return torch.cat([x.flatten() for x in found]), terms.total.detach() / terms.number

    inversion = loss.inversion(torch.cat([pool.images(t) for t in range(2)]))
    plain = torch.cat([x.flatten() for x in torch.autograd.grad(inversion, [*pool.raw])])
    found, value = slopes()
    torch.testing.assert_close(found, plain)
    loss.waited.fill_(PATIENCE)
    found, _ = slopes()
    assert int(loss.waited) == 0  # the count begins anew

    def outer() -> torch.Tensor:
        whole = torch.cat([pool.images(t) for t in range(2)])
        labels = {side: batch[f"{side}labels"] for side in ("support/", "query/")}
        task = loss.episodes(whole, batch, labels)
        each = [
            loss.loss_of(loss.start(), *({name: x[row] for name, x in side.items()} for side in sides(task)))
            for row in range(2)
        ]
        return torch.stack(each).mean()

    torch.testing.assert_close(value, outer().detach())
    hard = torch.cat([x.flatten() for x in torch.autograd.grad(outer(), [*pool.raw])])
    torch.testing.assert_close(found, plain - 0.5 * hard)


def test_black_boxes_are_asked_as_often_as_is_counted_and_learned_from() -> None:
    model, *teachers = nets(3)
    pool, calls = new_pool(), torch.zeros(2, dtype=torch.long)
    boxes = [BlackBox(each, calls) for each in teachers]
    loss = BiDf(model, INNER, boxes, pool, "x", directions=2, first=1)
    before = pool.raw[0].detach().clone()
    fit(model, PoolEpisodes(2, 3, 4, 1, 2, alone=True), loss, HOW)
    # The first step asks both teachers, the others one each, about 12 images, and about them moved in two directions.
    assert calls.tolist() == [4 * 12 * 3, 4 * 2] and all(x.grad is None for t in teachers for x in t.parameters())
    assert not torch.equal(before, pool.raw[0])


def test_the_labels_of_a_teachers_episode_are_its_probabilities_in_the_episodes_order() -> None:
    model, *teachers = nets(3)
    pool, calls = new_pool(), torch.zeros(2, dtype=torch.long)
    loss = BiDf(model, INNER, [BlackBox(each, calls) for each in teachers], pool, "x", directions=1)
    batch, seen = PoolEpisodes(2, 3, 4, 1, 2, alone=True).batch([2]), list[dict[str, torch.Tensor]]()
    made = loss.episodes

    def keep(*arguments: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(made(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    loss.episodes = keep  # type: ignore[assignment, method-assign]
    loss(model, batch)
    support, query = sides(seen[0])
    for side in (support, query):
        wanted = teachers[1](side["x"][0]).softmax(-1)[:, batch["classes"][0] - 3]
        torch.testing.assert_close(side["labels"][0], wanted)
