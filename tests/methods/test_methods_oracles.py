"""Every method on tensors in memory against its float64 formula: all dtypes, odd shapes, random parameters."""

from typing import Any

import numpy as np
import oracles
import oracles_deltas
import pytest
import torch
from oracles import assert_close, doubles, rounded, to_bfloat16

from mergekit_lfm import merge_tensors
from mergekit_lfm.errors import PlanError
from mergekit_lfm.methods.registry import METHODS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (0,), (3, 0), (7,), (64,), (33, 17), (5, 1), (1, 5), (2, 3, 5)]
LARGE = (1025, 300)  # more than one block of 2^18 elements


def positive(random, count):
    return random.uniform(0.1, 1.5, count).tolist()


def signed(random, count):
    """Weights of both signs whose sum is not near zero."""
    while abs(sum(weights := random.uniform(-1, 2, count).tolist())) < 0.3:
        pass
    return weights


def linear(random):
    count = random.integers(1, 5)
    return count, {"weight": signed(random, count), "normalize": bool(random.integers(2))}


def passthrough(random):
    return 1, {"scale": [float(random.uniform(-2, 2))] if random.integers(2) else [None]}


def slerp(random):
    return 2, {"t": float(random.uniform(-0.5, 1.5))}


def nuslerp(random):
    flatten, row_wise = (bool(random.integers(2)) for _ in range(2))
    return 2, {"weight": signed(random, 2), "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}


def multislerp(random):
    count = random.integers(1, 5)
    return count, {"weight": positive(random, count), "normalize_weights": bool(random.integers(2))}


def karcher(random):
    count = random.integers(1, 5)
    return count, {"weight": positive(random, count), "max_iter": int(random.integers(1, 20))}


def model_stock(random):
    return random.integers(2, 5), {"filter_wise": bool(random.integers(2)), "lambda": float(random.uniform(0.2, 1.5))}


def task_arithmetic(random):
    count = random.integers(1, 5)
    shared = {"lambda": float(random.uniform(0.2, 1.5)), "normalize": bool(random.integers(2))}
    return count, {"weight": signed(random, count), **shared}


def ties(random):
    count = random.integers(1, 5)
    normalize = bool(random.integers(2))
    weights = (positive if normalize else signed)(random, count)  # opposite weights can make a divisor near zero
    rescale = [False, True, "l1", "density"][random.integers(4)]
    density = [float(d) for d in random.choice([0.01, 0.2, 0.5, 0.7, 1.0], count)]
    shared = {"lambda": float(random.uniform(0.2, 1.5)), "normalize": normalize, "rescale": rescale}
    return count, {"weight": weights, "density": density, **shared}


def breadcrumbs(random):
    count, parameters = ties(random)
    return count, parameters | {"gamma": [float(g) for g in random.choice([0, 0.01, 0.2], count)]}


def fisher(random):
    count = random.integers(1, 5)
    epsilon = float(random.choice([0, 1e-6, 0.1]))
    return count, {"weight": positive(random, count), "epsilon": epsilon, "normalize": bool(random.integers(2))}


def sce(random):
    count = random.integers(1, 5)
    share = float(random.choice([0, 0.1, 0.5, 1]))
    return count, {"select_topk": share, "lambda": float(random.uniform(0.2, 1.5))}


def nearswap(random):
    return 2, {"t": float(random.choice([0, 0.001, 0.05, 100]))}


def arcee_fusion(_):
    return 2, {}


def della(random):
    count, parameters = ties(random)
    density = [float(d) for d in random.choice([0.3, 0.5, 0.7, 1.0], count)]
    return count, parameters | {"density": density, "epsilon": [float(e) for e in random.choice([0, 0.1, 0.29], count)]}


def ram(random):
    epsilon = float(random.choice([0, 1e-5, 0.03]))
    return random.integers(1, 5), {"epsilon": epsilon, "lambda": float(random.uniform(0.2, 1.5))}


def ramplus_tl(random):
    count, parameters = ram(random)
    return count, parameters | {"r": float(random.uniform(0, 1)), "alpha": float(random.choice([0.2, 3]))}


def magmax(random):
    return random.integers(2, 5), {"lambda": float(random.uniform(0.2, 1.5))}


def consensus(random):
    count, parameters = magmax(random)
    threshold = [float(t) for t in random.choice([0, 0.25, 0.4, 2.1], count)]
    return count, parameters | {"threshold": threshold, "agree": int(random.integers(1, 4))}


def pcb(random):
    return random.integers(1, 5), {"density": float(random.choice([0.05, 0.1, 0.4])), "lambda": 0.7}


def expo(random):
    return 1, {"alpha": float(random.uniform(-0.5, 1))}


DRAW = {
    "linear": linear,
    "passthrough": passthrough,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs,
    "dare_linear": ties,
    "dare_ties": ties,
    "fisher": fisher,
    "sce": sce,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "della": della,
    "della_linear": della,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "magmax": magmax,
    "consensus": consensus,
    "negmerge": magmax,
    "expo": expo,
    "pcb": pcb,
}
ORACLES = vars(oracles) | vars(oracles_deltas)
TAKES_BASE = {"nuslerp", "multislerp"}
ON_SPHERES = {"slerp", "nuslerp", "multislerp", "karcher"}


def tensors(random, count, shape, dtype):
    """A base and `count` inputs near it or far from it, with many equal magnitudes or none, and some zeros."""
    base = random.normal(0, 0.1, shape)
    step = random.choice([1e-3, 0.05, 1.0])
    made = [base + step * random.normal(0, 1, shape) for _ in range(count)]
    if random.integers(2):
        base, *made = (np.round(x * 64) / 64 for x in (base, *made))
    return rounded(base, dtype), [rounded(x, dtype) for x in made]


def bounds(method, dtype):
    """The precision of the arithmetic; solves on spheres, and exponentials of scores, lose some of float64's."""
    return torch.float32 if dtype != torch.float64 or method in ON_SPHERES | {"model_stock", "pcb"} else torch.float64


def masks(xs, base, density, **keys):
    """The entries of each input that dare keeps, found by giving the others no weight."""
    ones = [torch.ones_like(base) for _ in xs]
    alone = np.eye(len(xs)).tolist()
    settings = {"base": torch.zeros_like(base), "density": density, "rescale": False, **keys}
    return [doubles(merge_tensors("dare_linear", ones, weight=w, **settings)) > 0 for w in alone]


def masks_by_rank(xs, base, density, epsilon):
    """The entries of each delta that della keeps, of those that are not 0: found without weights, as they are."""
    wide = torch.promote_types(base.dtype, torch.float32)
    deltas = [x.to(wide) - base.to(wide) for x in xs]
    settings = {"base": torch.zeros_like(base, dtype=wide), "density": density, "epsilon": epsilon, "rescale": False}
    alone = np.eye(len(xs)).tolist()
    return [doubles(merge_tensors("della_linear", deltas, weight=w, **settings)) != 0 for w in alone]


def undirected(method, shape):
    """Single numbers have a sign and no direction, so two may be opposite: a test of their own is below."""
    return method in ON_SPHERES | {"model_stock"} and 1 in (*shape, np.prod(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", DRAW)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_float64_formula(method, dtype, seed):
    random = np.random.default_rng([seed, DTYPES.index(dtype), list(DRAW).index(method)])
    for shape in SHAPES:
        count, parameters = DRAW[method](random)
        base, xs = tensors(random, count, shape, dtype)
        if not undirected(method, shape):
            compare(method, xs, base, parameters, random)


@pytest.mark.parametrize("method", DRAW)
def test_agrees_with_the_float64_formula_over_several_blocks(method):
    random = np.random.default_rng(list(DRAW).index(method))
    count, parameters = DRAW[method](random)
    base, xs = tensors(random, count, LARGE, torch.bfloat16)
    compare(method, xs, base, parameters, random)


def compare(method, xs, base, parameters, random):
    """Merge and compare with the oracle; the inputs do not change."""
    needs = METHODS[method].base == "required" or (method in TAKES_BASE and bool(random.integers(2)))
    bases = {"base": base} if needs else {}
    before = [x.clone() for x in (*xs, base)]
    if METHODS[method].statistics:
        squares = [random.normal(0, 1, base.shape) ** 2 * random.choice([1e-12, 0, 1], base.shape) for _ in xs]
        parameters["normalize"] &= all(f.any() for f in squares)
        bases = {"statistics": [rounded(f, torch.float32) for f in squares]}
    got = merge_tensors(method, xs, **bases, **parameters)
    assert all(torch.equal(x, y) for x, y in zip((*xs, base), before, strict=True))
    assert got.dtype == base.dtype
    more = {"base": doubles(base), "exact": base.dtype == torch.float64} if needs else {}
    if method.startswith("dare"):
        more["mask"] = masks(xs, base, parameters["density"])
    if method.startswith("della"):
        more["mask"] = masks_by_rank(xs, base, parameters["density"], parameters.pop("epsilon"))
    if METHODS[method].statistics:
        more["statistics"] = [doubles(f) for f in bases["statistics"]]
    expected = ORACLES[method]([doubles(x) for x in xs], **parameters, **more)
    assert_close(got, expected, arithmetic=bounds(method, base.dtype))


def test_every_method_is_compared():
    """Methods that see whole matrices are in test_singular.py and test_merge_statistics.py."""
    assert set(DRAW) == {name for name, method in METHODS.items() if not method.whole}


# Cases that the formulas leave open, by hand


def test_equal_magnitudes_are_kept_by_the_lowest_index():
    x = torch.tensor([2.0, -3.0, 3.0, 2.0, -2.0, 1.0])
    zero = torch.zeros(6)
    got = merge_tensors("ties", [x], base=zero, weight=1, density=0.5)
    assert got.tolist() == [2, -3, 3, 0, 0, 0]
    got = merge_tensors("breadcrumbs", [x], base=zero, weight=1, density=0.5, gamma=0.34)
    assert got.tolist() == [2, 0, 0, 2, -2, 0]
    got = merge_tensors("breadcrumbs", [x], base=zero, weight=1, density=0.5, gamma=0)
    assert got.tolist() == [2, -3, 3, 0, 0, 0]


def test_a_vote_that_is_even_is_positive():
    x, y = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])
    assert merge_tensors("ties", [x, y], base=torch.zeros(2), weight=1).tolist() == [1, 2]


def test_an_even_vote_of_the_whole_model_is_negative():
    """As in the authors' code, where an element without a majority follows the model, and the model has none either."""
    x, y = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])
    assert merge_tensors("ties", [x, y], base=torch.zeros(2), weight=1, scope="global").tolist() == [-1, -2]


def test_zeros_do_not_count_in_the_mean_of_those_that_agree():
    x, y = torch.tensor([4.0, 1.0]), torch.tensor([0.0, 3.0])
    assert merge_tensors("ties", [x, y], base=torch.zeros(2), weight=[1, 3]).tolist() == [4, 2.5]


def test_negative_weights_turn_the_vote_round():
    x, y = torch.tensor([1.0]), torch.tensor([3.0])
    settings: dict[str, Any] = {"base": torch.zeros(1), "normalize": False}
    assert merge_tensors("ties", [x, y], weight=[1, -1], **settings).tolist() == [-3]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties"])
def test_a_mean_is_the_same_with_all_weights_negated(method):
    random = np.random.default_rng(0)
    base, *xs = (torch.from_numpy(random.normal(0, 1, 50)).float() for _ in range(4))
    settings: dict[str, Any] = {"base": base, "density": 0.6, "normalize": True}
    found = merge_tensors(method, xs, weight=[-0.5, -1, -2], **settings)
    assert torch.equal(found, merge_tensors(method, xs, weight=[0.5, 1, 2], **settings))


def test_deltas_of_zero_norm_are_not_rescaled():
    base = torch.ones(8)
    for method in ("dare_linear", "dare_ties", "ties", "breadcrumbs"):
        got = merge_tensors(method, [base, base], base=base, weight=1, density=0.3, rescale=True)
        assert torch.equal(got, base)


def test_small_information_decides_as_large_does():
    """Fisher information of a confident model is far below 1; where no model has any, the weights decide."""
    first, second = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.0])
    squares = [torch.tensor([3e-12, 0.0, 1e-30, 0.0]), torch.tensor([1e-12, 1e-20, 3e-30, 0.0])]
    got = merge_tensors("fisher", [first, second], statistics=squares, weight=[1, 3])
    assert got.tolist() == pytest.approx([0.5, 0, 0.1, 0.25])


def test_normalizing_comes_before_epsilon():
    """Two models whose information differs by a factor alone have equal shares, whatever epsilon is."""
    first, second = torch.tensor([4.0, 4.0]), torch.tensor([0.0, 0.0])
    squares = [torch.tensor([1e-3, 2e-3]), torch.tensor([1e-9, 2e-9])]
    got = merge_tensors("fisher", [first, second], statistics=squares, normalize=True, epsilon=0.5)
    assert got.tolist() == pytest.approx([2, 2])


@pytest.mark.parametrize("method", ["linear", "nuslerp", "multislerp", "task_arithmetic"])
def test_the_size_of_weights_that_are_normalised_does_not_matter(method):
    random = np.random.default_rng(0)
    base, *xs = (torch.from_numpy(random.normal(0, 1, 50)).float() for _ in range(3))
    bases: dict[str, Any] = {"base": base, "normalize": True} if method == "task_arithmetic" else {}
    plain = merge_tensors(method, xs, weight=[1, 3], **bases)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(merge_tensors(method, xs, weight=[factor, 3 * factor], **bases), plain)


def test_an_even_vote_of_the_whole_model_does_not_turn_the_least_numbers():
    x = torch.tensor([1e-40, -1e-40])
    assert torch.equal(merge_tensors("ties", [x], base=torch.zeros(2), weight=1, scope="global"), x)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear", "breadcrumbs"])
def test_weights_that_sum_to_zero_cannot_be_normalised(method):
    x = torch.ones(3)
    bases: dict[str, Any] = {"base": x} if METHODS[method].base == "required" else {}
    with pytest.raises(PlanError, match="sum to"):
        merge_tensors(method, [x, x], **bases, weight=[1, -1], normalize=True)


def spread(x):
    """The largest magnitude."""
    return float(x.abs().max())


@pytest.mark.parametrize("size", [1, 2, 50, 1000])
@pytest.mark.parametrize("method", ["karcher", "multislerp", "nuslerp", "slerp"])
def test_opposite_inputs_give_nothing_larger_than_themselves(method, size):
    random = np.random.default_rng(size)
    for factor in (1.0, 2.0, 0.3):
        x = torch.from_numpy(random.normal(0, 1, size)).float()
        for weight in ([0.3, 0.7], [0.5, 0.5], [0.7, 0.3]):
            parameters = {"t": weight[1]} if method == "slerp" else {"weight": weight}
            got = merge_tensors(method, [x, -factor * x], **parameters)
            assert spread(got) <= 1.001 * max(1, factor) * spread(x)


@pytest.mark.parametrize("size", [1, 2, 50])
def test_opposite_inputs_of_a_spherical_mean_go_with_the_majority(size):
    random = np.random.default_rng(size)
    for _ in range(20):
        x = torch.from_numpy(random.normal(0, 1, size)).float()
        got = merge_tensors("karcher", [x, -2 * x, x], weight=[0.3, 0.2, 0.4])
        assert_close(got, oracles.Expected(doubles(x) * 1.1 / 0.9, np.abs(doubles(2 * x))))


@pytest.mark.parametrize(
    ("shape", "row_wise"), [((5, 1), False), ((1, 5), True), ((1, 1), False), ((5, 1), True), ((1, 5), False)]
)
def test_rows_of_one_element_are_rows(shape, row_wise):
    random = np.random.default_rng(0)
    base, *xs = (torch.from_numpy(random.normal(0, 1, shape)).float() for _ in range(3))
    exact = [doubles(x) for x in xs]
    settings = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    got = merge_tensors("nuslerp", xs, weight=[0.75, 0.25], **settings)
    assert_close(got, oracles.nuslerp(exact, [0.75, 0.25], **settings))
    got = merge_tensors("model_stock", xs, base=base, filter_wise=True)
    assert_close(got, oracles.model_stock(exact, doubles(base), filter_wise=True))


@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_of_one_tensor_is_that_tensor(normalize):
    x, base = torch.arange(5.0), torch.ones(5)
    cases: list[dict[str, Any]] = [{}, {"base": base}]
    for bases in cases:
        got = merge_tensors("multislerp", [x], weight=0.1, normalize_weights=normalize, **bases)
        assert torch.equal(got, x)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_zero_tensors_have_no_direction_and_do_no_harm(method):
    zero, x = torch.zeros(5), torch.arange(5.0)
    parameters = {"t": 0.25} if method == "slerp" else {"weight": [0.75, 0.25]}
    for inputs in ([zero, zero], [zero, x], [x, zero]):
        got = merge_tensors(method, inputs, **parameters)
        assert_close(got, getattr(oracles, method)([doubles(v) for v in inputs], **parameters))
    assert not merge_tensors(method, [zero, zero], **parameters).any()


# Random masks


def coins(seed=0, name="tensor", place=0, numel=100_000, density=0.3):
    inputs = [torch.ones(numel)] * (place + 1)
    return masks(inputs, inputs[0], density, seed=seed, name=name)[place]


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_kept_fraction_is_binomial(density):
    for seed in range(5):
        kept = coins(seed=seed, density=density)
        assert abs(kept.mean() - density) < 5 * np.sqrt(density * (1 - density) / kept.size)
        halves = kept.reshape(2, -1).mean(axis=1)
        assert abs(halves[0] - halves[1]) < 5 * 2 * np.sqrt(density * (1 - density) / kept.size)


def test_masks_follow_the_seed_the_name_and_the_place_alone():
    first = coins()
    assert np.array_equal(first, coins())
    assert np.array_equal(first, masks([torch.ones(100_000)] * 3, torch.ones(100_000), 0.3)[0])
    for other in (coins(seed=1), coins(name="other"), coins(place=1), np.roll(first, 1)):
        expected = 0.3**2 + 0.7**2
        assert abs((first == other).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / first.size)


def test_larger_entries_of_a_row_are_kept_more_often():
    """With probabilities that grow evenly with the rank, from density - epsilon to density + epsilon."""
    rows = 20_000
    x = torch.tensor([0.5, -4.0, 1.0, -2.0, 3.0]).repeat(rows, 1)
    got = merge_tensors("della_linear", [x], base=0 * x, weight=1, density=0.6, epsilon=0.3, rescale=False)
    expected = np.array([0.3, 0.9, 0.45, 0.6, 0.75])
    shares = doubles(got != 0).mean(axis=0)
    assert (abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / rows)).all()


def test_probabilities_beyond_0_and_1_are_refused():
    x = torch.ones(3)
    with pytest.raises(PlanError, match=r"density 0\.9 and epsilon 0\.15 .* choose an epsilon below 0\.1"):
        merge_tensors("della", [x], base=x, weight=1, density=0.9)


def test_kept_entries_are_scaled_by_exactly_one_over_the_density():
    x = torch.ones(1000)
    got = merge_tensors("dare_linear", [x], base=0 * x, weight=1, density=0.25, rescale="density")
    assert set(got.tolist()) == {0.0, 4.0}


def test_the_l1_norm_is_kept():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    got = merge_tensors("dare_linear", [x], base=0 * x, weight=1, density=0.3)
    assert float(got.double().abs().sum()) == pytest.approx(float(x.double().abs().sum()), rel=1e-6)


# The yardstick itself


def test_rounding_to_bfloat16_is_to_the_nearest_and_even():
    unit = 2.0**-7  # the distance of bfloat16 numbers in [1, 2)
    tiny = 2.0**-60  # lost if the value went through float32 first
    for x, expected in [
        (1 + unit / 2, 1.0),
        (1 + unit / 2 + tiny * 2**10, 1 + unit),
        (1 + 3 * unit / 2, 1 + 2 * unit),
        (1 + 3 * unit / 2 - tiny * 2**10, 1 + unit),
        (-(1 + unit / 2), -1.0),
        (2.0**-133, 2.0**-133),
        (2.0**-134, 0.0),
        (32.6 * 2.0**-133, 33 * 2.0**-133),
        (3.4e38, np.inf),
    ]:
        assert to_bfloat16([x])[0] == expected, x
    many = np.random.default_rng(0).normal(0, 1, 10_000).astype(np.float32)
    assert torch.equal(rounded(many, torch.bfloat16), torch.from_numpy(many).bfloat16())


def test_the_yardstick_refuses_an_error_of_one_ulp_in_bfloat16():
    exact = np.array([1.0, 0.3, -5.0])
    expected = oracles.Expected(exact, np.abs(exact))
    assert_close(rounded(exact, torch.bfloat16), expected)
    off = rounded(exact, torch.bfloat16)
    off[1] = torch.nextafter(off[1], torch.tensor(9, dtype=off.dtype))
    with pytest.raises(AssertionError, match="1 of 3 elements"):
        assert_close(off, expected)
