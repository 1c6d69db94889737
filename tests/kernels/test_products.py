"""Products of small matrices against dense matrices in numpy: their sums, their factors, and the bases they share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergekit_lfm.kernels.products import Limit, Product, add_products, core_space, factor, fit, knots

OUT, IN = 14, 9
Array = NDArray[np.float64]


def random_product(seed: int, rank: int, out: int = OUT, columns: int = IN) -> Product:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, columns)))
    return Product(b, a)


@pytest.fixture
def products() -> list[Product]:
    return [random_product(i, rank) for i, rank in enumerate((2, 3, 1))]


def dense(product: Product) -> Array:
    return np.asarray(product.b.double().numpy() @ product.a.double().numpy())


def truncated(matrix: Array, rank: int) -> Array:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def test_a_sum_is_exact_and_keeps_every_a(products: list[Product]) -> None:
    total = add_products(products, [0.5, -2.0, 3.0])
    assert total.rank == 6
    expected = 0.5 * dense(products[0]) - 2 * dense(products[1]) + 3 * dense(products[2])
    np.testing.assert_allclose(dense(total), expected, rtol=0, atol=1e-13)
    assert torch.equal(total.a, torch.cat([product.a for product in products]))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fit_and_factor_are_the_best_of_their_rank(rank: int) -> None:
    product = random_product(0, 5)
    matrix, limit = torch.from_numpy(dense(product)), Limit(rank)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    for fitted in (fit(product, limit), factor(matrix, limit)):
        assert fitted.product.rank == rank
        np.testing.assert_allclose(dense(fitted.product), truncated(matrix.numpy(), rank), rtol=0, atol=1e-12)
        assert fitted.energy == pytest.approx(values.sum())
        assert fitted.kept == pytest.approx(values[:rank].sum())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_a_share_of_energy_takes_the_least_rank_that_has_it(share: float) -> None:
    product = random_product(0, 5)
    squares = np.linalg.svd(dense(product), compute_uv=False)[:5] ** 2
    least = next(k for k in range(1, 6) if squares[:k].sum() >= share * squares.sum() * (1 - 1e-14))
    for fitted in (fit(product, Limit(energy=share)), factor(torch.from_numpy(dense(product)), Limit(energy=share))):
        assert fitted.product.rank == least


def test_a_rank_that_is_not_there_is_not_written() -> None:
    assert fit(random_product(0, 3), Limit(8)).product.rank == 3
    nothing = Product(torch.zeros(OUT, 2), torch.randn(2, IN))
    assert fit(nothing, Limit(8)).product.rank == factor(torch.zeros(OUT, IN), Limit(8)).product.rank == 1
    assert dense(fit(nothing, Limit(8)).product).any() == np.False_


def test_the_randomised_factors_of_a_large_matrix_are_nearly_the_best() -> None:
    """Its energy is exact, and the kept part that of the product."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(n, 160, generator=generator).double()).Q for n in (300, 400))
    matrix = ((left * 0.9 ** torch.arange(160)) @ right.T).float()
    found = factor(matrix, Limit(8), key=1)
    best = (0.9 ** (2 * np.arange(160)))[:8].sum()
    assert found.kept == pytest.approx(best, rel=1e-3)
    rest = matrix.double().numpy() - dense(found.product)
    assert (rest**2).sum() == pytest.approx(found.energy - found.kept, rel=1e-5)
    again = factor(matrix, Limit(8), key=1)
    assert torch.equal(found.product.b, again.product.b)


def test_knots_are_those_of_the_dense_matrices_side_by_side(products: list[Product]) -> None:
    """Up to the sign of each singular vector, which the formula leaves open."""
    basis, coordinates = knots(products)
    u, s, v = np.linalg.svd(np.concatenate([dense(product) for product in products], 1), full_matrices=False)
    kept = int((s > 1e-5 * s[0]).sum())
    assert basis.shape == (OUT, kept) == (OUT, 6)
    signs = np.sign((u[:, :kept] * basis.numpy()).sum(0))
    np.testing.assert_allclose(basis.numpy() * signs, u[:, :kept], atol=1e-10)
    for i, own in enumerate(coordinates):
        part = s[:kept, None] * v[:kept, i * IN : (i + 1) * IN]
        np.testing.assert_allclose(own.numpy() * signs[:, None], part, atol=1e-10)
        np.testing.assert_allclose(basis.numpy() @ own.numpy(), dense(products[i]), atol=1e-10)


def test_knots_drop_directions_that_are_rounding() -> None:
    one = random_product(0, 2)
    basis, _ = knots([one, Product(one.b, one.a * 3), Product(one.b + 1e-9 * random_product(1, 2).b, one.a)])
    assert basis.shape[1] == 2


def test_the_core_space_is_that_of_the_papers_bases(products: list[Product]) -> None:
    left, right, cores = core_space(products)
    u = np.linalg.svd(np.concatenate([product.b.numpy() for product in products], 1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([product.a.numpy() for product in products], 0), full_matrices=False)[2].T
    assert (left.shape, right.shape) == ((OUT, 6), (IN, 6))
    for ours, theirs in ((left, u), (right, v)):
        np.testing.assert_allclose(np.abs((ours.numpy() * theirs).sum(0)), 1, atol=1e-10)
    for core, product in zip(cores, products, strict=True):
        np.testing.assert_allclose(core.numpy(), left.numpy().T @ dense(product) @ right.numpy(), atol=1e-10)
        np.testing.assert_allclose(left.numpy() @ core.numpy() @ right.numpy().T, dense(product), atol=1e-10)


def test_more_directions_than_a_module_has_become_as_many() -> None:
    products = [random_product(i, 4, out=6, columns=5) for i in range(3)]
    left, right, _ = core_space(products)
    assert (left.shape, right.shape, knots(products)[0].shape) == ((6, 6), (5, 5), (6, 6))


def rotation(seed: int, size: int) -> torch.Tensor:
    turned: torch.Tensor = torch.linalg.qr(random_product(seed, size, size, size).b).Q
    return turned


def test_coordinates_do_not_depend_on_the_frame(products: list[Product]) -> None:
    """A rotation of a module's outputs goes into the bases alone; in the core space one of its inputs, too."""
    turned = [Product(rotation(7, OUT) @ b, a) for b, a in products]
    for own, new in zip(knots(products)[1], knots(turned)[1], strict=True):
        np.testing.assert_allclose(np.abs(own.numpy()), np.abs(new.numpy()), atol=1e-10)
    turned = [Product(b, a @ rotation(8, IN)) for b, a in turned]
    for own, new in zip(core_space(products)[2], core_space(turned)[2], strict=True):
        np.testing.assert_allclose(np.abs(own.numpy()), np.abs(new.numpy()), atol=1e-10)


def test_knots_depend_on_the_products_alone(products: list[Product]) -> None:
    """Not on how a training has split them into b and a."""
    mixes = [random_product(i, each.rank, each.rank, each.rank).b for i, each in enumerate(products)]
    split = [Product(b @ mix, torch.linalg.solve(mix, a)) for (b, a), mix in zip(products, mixes, strict=True)]
    for own, new in zip(knots(products)[1], knots(split)[1], strict=True):
        np.testing.assert_allclose(np.abs(own.numpy()), np.abs(new.numpy()), atol=1e-8)
