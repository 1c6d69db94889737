"""The promises of every method on whole checkpoints, each against an independent float64 formula."""

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from fixtures_llama import Tensors, base_tensors, cast, entries, fine_tuned, merger, save
from oracles import assert_close, doubles, rounded

from mergekit_lfm.errors import PlanError

BF16, F32 = torch.bfloat16, torch.float32


class World:
    """BASE and three fine-tunes of it, A, B, C, in float32 and (A16 and so on) bfloat16, on disk and in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = base_tensors()
        self.tensors = {"BASE": base} | {name: fine_tuned(base, seed) for seed, name in enumerate("ABC", start=1)}
        self.tensors |= {f"{name}16": cast(tensors, BF16) for name, tensors in self.tensors.items()}
        for name, tensors in self.tensors.items():
            save(folder / name, tensors)

    def __getitem__(self, name: str) -> Tensors:
        return self.tensors[name]

    def path(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, method: str, models: str, base: str | None = None, suffix: str = "", **parameters):
        """A recipe for models named by letters; a list is a value per model, anything else one for all."""
        own = {name: values for name, values in parameters.items() if isinstance(values, list)}
        shared = {name: value for name, value in parameters.items() if name not in own}
        listed = entries(*(self.path(f"{name}{suffix}") for name in models), **own)
        bases = {} if base is None else {"base_model": str(self.path(f"{base}{suffix}"))}
        return {"merge_method": method, "models": listed, "parameters": shared} | bases

    def expect(self, oracle, models: str, base: str | None = None, suffix: str = "", **parameters):
        """The oracle's result for every tensor."""
        bases = {} if base is None else self.tensors[f"{base}{suffix}"]
        return {
            name: oracle(
                [doubles(self.tensors[f"{model}{suffix}"][name]) for model in models],
                **parameters,
                **({"base": doubles(bases[name])} if bases else {}),
            )
            for name in self["BASE"]
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def merged(tmp_path):
    return merger(tmp_path)


def check(got, expected):
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert_close(tensor, expected[name])


def check_equal(got, expected):
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


# Averages and copies


def test_linear_is_the_weighted_mean(world, merged):
    got = merged(world.recipe("linear", "AB", weight=[1, 3]) | {"dtype": "float32"})
    assert len(got) == 21
    check(got, world.expect(oracles.linear, "AB", weight=[1, 3]))
    for name, tensor in got.items():
        assert torch.allclose(tensor, (world["A"][name] + 3 * world["B"][name]) / 4, rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", ["", "16"])
def test_linear_without_normalising(world, merged, suffix):
    parameters = {"weight": [0.3, -1.7, 2.25], "normalize": False}
    got = merged(world.recipe("linear", "ABC", suffix=suffix, **parameters))
    check(got, world.expect(oracles.linear, "ABC", suffix=suffix, **parameters))


def test_the_mean_of_ten_copies_is_the_model_itself(world, merged, tmp_path):
    copies = [save(tmp_path / f"copy-{i}", world["A16"]) for i in range(10)]
    got = merged({"merge_method": "linear", "models": entries(*copies, weight=[0.1] * 10)})
    check_equal(got, world["A16"])


def test_weights_that_sum_to_zero_are_refused_where_they_are_to_be_normalised(world, merged):
    with pytest.raises(PlanError, match="sum to"):
        merged(world.recipe("linear", "AB", weight=[1, -1]))


@pytest.mark.parametrize("suffix", ["", "16"])
def test_passthrough_copies_every_bit(world, merged, suffix):
    check_equal(merged(world.recipe("passthrough", "A", suffix=suffix)), world[f"A{suffix}"])


def test_passthrough_scales_the_tensors_that_a_filter_names(world, merged):
    got = merged(world.recipe("passthrough", "A", scale={"filter": "down_proj", "value": 0}))
    check_equal(got, {name: x * 0 if "down_proj" in name else x for name, x in world["A"].items()})


# Spheres


@pytest.mark.parametrize("suffix", ["", "16"])
def test_slerp_ends_at_its_models(world, merged, suffix):
    for t, end in ((0, "A"), (1, "B")):
        check_equal(merged(world.recipe("slerp", "AB", base="A", suffix=suffix, t=t)), world[f"{end}{suffix}"])


@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize("t", [0.25, 0.9, 1.5, -0.5])
def test_slerp_follows_the_great_circle(world, merged, suffix, t):
    got = merged(world.recipe("slerp", "AB", base="A", suffix=suffix, t=t))
    check(got, world.expect(oracles.slerp, "AB", suffix=suffix, t=t))


def test_slerp_takes_the_chord_between_near_models(world, merged, tmp_path):
    near = fine_tuned(world["A"], seed=9, scale=1e-6)
    base = str(world.path("A"))
    models = entries(world.path("A"), save(tmp_path / "near", near))
    got = merged({"merge_method": "slerp", "base_model": base, "models": models, "parameters": {"t": 0.5}})
    check_equal(got, {name: 0.5 * world["A"][name] + 0.5 * near[name] for name in near})


def test_nuslerp_without_a_base_is_slerp(world, merged):
    turned = merged(world.recipe("nuslerp", "AB", weight=[0.7, 0.3]))
    check(turned, world.expect(oracles.nuslerp, "AB", weight=[0.7, 0.3]))
    for name, tensor in merged(world.recipe("slerp", "AB", base="A", t=0.3)).items():
        if tensor.ndim == 2:
            assert torch.equal(turned[name], tensor)
        else:  # slerp takes the chord between nearly parallel tensors
            assert torch.allclose(turned[name], tensor, rtol=0, atol=2e-4)


def test_nuslerp_with_opposite_weights_goes_half_way(world, merged):
    got = merged(world.recipe("nuslerp", "AB", weight=[0.5, -0.5]))
    check(got, world.expect(oracles.nuslerp, "AB", weight=[0.5, -0.5]))
    check_equal(got, merged(world.recipe("nuslerp", "AB", weight=[0.5, 0.5])))


@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize(
    "parameters",
    [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    ids=["whole", "rows", "columns"],
)
@pytest.mark.parametrize("base", [None, "BASE"])
def test_nuslerp_turns_tensors_rows_or_columns(world, merged, suffix, base, parameters):
    parameters |= {"weight": [0.6, 0.2]}
    got = merged(world.recipe("nuslerp", "AB", base=base, suffix=suffix, **parameters))
    check(got, world.expect(oracles.nuslerp, "AB", base=base, suffix=suffix, **parameters))


@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_of_one_model_is_that_model(world, merged, normalize):
    recipe = world.recipe("multislerp", "A", base="BASE", weight=[0.1], normalize_weights=normalize)
    check_equal(merged(recipe), world["A"])
    check_equal(merged(recipe | {"dtype": "bfloat16"}), world["A16"])


@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize("base", [None, "BASE"])
def test_multislerp_is_one_step_of_the_spherical_mean(world, merged, suffix, base):
    for parameters in ({"weight": [0.2, 0.5, 0.9]}, {"weight": [0.2, 0.3, 0.4], "normalize_weights": False}):
        got = merged(world.recipe("multislerp", "ABC", base=base, suffix=suffix, **parameters))
        check(got, world.expect(oracles.multislerp, "ABC", base=base, suffix=suffix, **parameters))


@pytest.mark.parametrize("suffix", ["", "16"])
def test_karcher_is_the_spherical_mean(world, merged, suffix):
    check(merged(world.recipe("karcher", "ABC", suffix=suffix)), world.expect(oracles.karcher, "ABC", suffix=suffix))
    parameters = {"weight": [1, 2, 0.5], "max_iter": 30, "tol": 1e-9}
    got = merged(world.recipe("karcher", "ABC", suffix=suffix, **parameters))
    check(got, world.expect(oracles.karcher, "ABC", suffix=suffix, **parameters))


def test_model_stock_of_opposite_deltas_is_the_base(merged, tmp_path):
    base = {name: (x * 1024).round() / 1024 for name, x in base_tensors().items()}  # so that the deltas are opposite
    step = {name: (x * 1024).round() / 1024 for name, x in fine_tuned(base, 1).items()}
    folders = [
        save(tmp_path / "A", step),
        save(tmp_path / "B", {name: 2 * base[name] - x for name, x in step.items()}),
        save(tmp_path / "BASE", base),
    ]
    recipe = {"merge_method": "model_stock", "models": entries(*folders[:2]), "base_model": str(folders[2])}
    check_equal(merged(recipe), base)


@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_goes_as_far_as_the_angles_say(world, merged, suffix, filter_wise):
    got = merged(world.recipe("model_stock", "ABC", base="BASE", suffix=suffix, filter_wise=filter_wise))
    check(got, world.expect(oracles.model_stock, "ABC", base="BASE", suffix=suffix, filter_wise=filter_wise))


# Task vectors


@pytest.mark.parametrize("suffix", ["", "16"])
def test_task_arithmetic_adds_and_subtracts(world, merged, suffix):
    for options in ({}, {"lambda": 0.7}, {"normalize": True}):
        parameters = {"weight": [0.3, -0.5], **options}
        got = merged(world.recipe("task_arithmetic", "AB", base="BASE", suffix=suffix, **parameters))
        check(got, world.expect(oracles.task_arithmetic, "AB", base="BASE", suffix=suffix, **parameters))


@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize("more", [{}, {"normalize": False}, {"rescale": True}, {"rescale": "density"}], ids=str)
def test_ties_is_its_formula(world, merged, suffix, more):
    parameters = {"weight": [1, 0.5, 0.7], "density": [0.4, 0.4, 0.4], "lambda": 0.8, **more}
    got = merged(world.recipe("ties", "ABC", base="BASE", suffix=suffix, **parameters))
    check(got, world.expect(oracles.ties, "ABC", base="BASE", suffix=suffix, **parameters))


def kept(got, base):
    """Where each tensor differs from the base."""
    return {name: (tensor != base[name]).numpy() for name, tensor in got.items()}


@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5])
def test_ties_keeps_exactly_the_asked_number_and_at_least_one(world, merged, suffix, density):
    base, model = world[f"BASE{suffix}"], world[f"A{suffix}"]
    got = merged(world.recipe("ties", "A", base="BASE", suffix=suffix, weight=[1], density=density))
    for name, mask in kept(got, base).items():
        d = oracles.delta(doubles(model[name]), doubles(base[name]))
        expected = oracles.keep_positions(d, 0, max(1, int(density * d.size)))
        assert np.array_equal(mask, expected & (d != 0)), name
        assert np.array_equal(doubles(got[name])[mask], doubles(model[name])[mask])


@pytest.mark.parametrize(("weight", "density"), [([1, 1, 1], 0.2), ([1, 0.5, 0.7], 0.4)])
@pytest.mark.parametrize("suffix", ["", "16"])
def test_ties_with_global_scope_has_one_threshold_for_the_whole_model(world, merged, suffix, weight, density):
    parameters = {"weight": weight, "density": density, "lambda": 0.8, "scope": "global"}
    got = merged(world.recipe("ties", "ABC", base="BASE", suffix=suffix, **parameters))
    models = [{n: doubles(x) for n, x in world[f"{m}{suffix}"].items()} for m in ("BASE", "A", "B", "C")]
    check(got, oracles.ties_global(models[1:], models[0], weight, density, 0.8))


def test_global_and_per_tensor_ties_differ(world, merged):
    recipe = world.recipe("ties", "ABC", base="BASE", weight=1, density=0.2)
    single = merged(recipe)
    whole = merged(recipe | {"parameters": recipe["parameters"] | {"scope": "global"}})
    assert any(not torch.equal(single[name], whole[name]) for name in single)


def test_dare_without_rescaling_keeps_entries_as_they_are(world, merged):
    got = merged(world.recipe("dare_linear", "A", base="BASE", weight=[1], density=0.3, rescale=False))
    base, model = world["BASE"], world["A"]
    for name, mask in kept(got, base).items():
        whole = base[name] + (model[name] - base[name])
        assert torch.equal(got[name][mask], whole[mask])
    share = np.concatenate([mask.ravel() for mask in kept(got, base).values()])
    assert abs(share.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / share.size)


@pytest.mark.parametrize(("rescale", "factor"), [("density", 1 / 0.3), (True, None), ("l1", None)])
def test_dare_rescales_by_density_or_to_the_same_l1_norm(world, merged, rescale, factor):
    recipe = world.recipe("dare_linear", "A", base="BASE", weight=[1], density=0.3, rescale=rescale)
    got = merged(recipe)
    for name, mask in kept(got, world["BASE"]).items():
        base, d = doubles(world["BASE"][name]), doubles(world["A"][name] - world["BASE"][name])
        scale = factor or np.abs(d).sum() / np.abs(d[mask]).sum()
        assert_close(got[name], oracles.Expected(base + scale * d * mask, np.maximum(np.abs(base), np.abs(scale * d))))


def test_masks_do_not_depend_on_threads_memory_or_the_run(world, merged):
    recipe = world.recipe("dare_ties", "ABC", base="BASE", suffix="16", weight=[1, 0.5, 0.7], density=0.5) | {"seed": 3}
    first = merged(recipe)
    for options in ({"threads": 1}, {"threads": 8}, {"threads": 2, "memory": "300MB"}):
        check_equal(merged(recipe, **options), first)
    check_equal(merged(recipe | {"seed": 4}, seed=3), first)
    other = merged(recipe | {"seed": 4})
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_masks_are_independent_of_other_tensors_and_of_each_other(world, merged):
    def masks(models, density=0.5, seed=0, weight=1):
        recipe = world.recipe("dare_linear", models, base="BASE", weight=weight, density=density, rescale=False)
        return kept(merged(recipe | {"seed": seed}), world["BASE"])

    plain = masks("A")
    filtered = masks("A", density=[[{"filter": "mlp", "value": 0.2}, {"value": 0.5}]])
    for name in plain:
        if "mlp" not in name:
            assert np.array_equal(plain[name], filtered[name])
    second, reseeded = masks("AB", weight=[0, 1]), masks("A", seed=1)
    pairs = [(plain, second), (plain, reseeded), (second, reseeded)]
    sides = [[np.concatenate([mask[name].ravel() for name in plain]) for mask in pair] for pair in pairs]
    layers = [name for name in plain if ".layers.0." in name]
    sides.append([np.concatenate([plain[n.replace(".0.", f".{i}.")].ravel() for n in layers]) for i in (0, 1)])
    for one, other in sides:
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)


@pytest.mark.parametrize("vote", [False, True])
@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize("rescale", [True, False, "density"])
def test_dare_of_several_models_given_its_masks(world, merged, vote, suffix, rescale):
    density, weight = [0.6, 0.9, 0.3], [1, -0.5, 0.7]
    alone = np.eye(3).tolist()
    masks = []
    for i in range(3):  # the mask of an input depends on its place in the recipe, not on its weight
        recipe = world.recipe("dare_linear", "ABC", base="BASE", weight=alone[i], density=density, rescale=False)
        masks.append(kept(merged(recipe), world["BASE"]))
    method = "dare_ties" if vote else "dare_linear"
    parameters = {"weight": weight, "density": density, "rescale": rescale, "lambda": 0.8}
    got = merged(world.recipe(method, "ABC", base="BASE", suffix=suffix, **parameters))
    models = [world[f"{name}{suffix}"] for name in ("BASE", "A", "B", "C")]
    for name, tensor in got.items():
        base, *xs = (doubles(model[name]) for model in models)
        oracle = getattr(oracles, method)
        assert_close(tensor, oracle(xs, base=base, mask=[mask[name] for mask in masks], **parameters))


@pytest.mark.parametrize("suffix", ["", "16"])
def test_breadcrumbs_keeps_the_middle(world, merged, suffix):
    got = merged(world.recipe("breadcrumbs", "A", base="BASE", suffix=suffix, weight=[1], density=0.5, gamma=0.1))
    norm = "model.norm.weight"
    d = oracles.delta(doubles(world[f"A{suffix}"][norm]), doubles(world[f"BASE{suffix}"][norm]))
    ascending = oracles.largest_first(d)[::-1]
    mask = np.zeros(64, bool)
    mask[ascending[26:58]] = True
    assert mask.sum() == 32
    assert np.array_equal(kept(got, world[f"BASE{suffix}"])[norm], mask & (d != 0))


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("suffix", ["", "16"])
@pytest.mark.parametrize("more", [{}, {"gamma": 0}, {"gamma": 0.2, "rescale": True, "normalize": True}], ids=str)
def test_breadcrumbs(world, merged, method, suffix, more):
    parameters = {"weight": [1, 0.5, 0.7], "density": [0.9, 0.4, 0.6], "lambda": 0.8, **more}
    got = merged(world.recipe(method, "ABC", base="BASE", suffix=suffix, **parameters))
    if "gamma" in more:
        parameters["gamma"] = [more["gamma"]] * 3
    check(got, world.expect(getattr(oracles, method), "ABC", base="BASE", suffix=suffix, **parameters))


@pytest.mark.parametrize(
    ("method", "scale"),
    [("ties", 1), ("task_arithmetic", 0.5), ("dare_linear", 0.5), ("dare_ties", 0.5), ("breadcrumbs_ties", 0.5)],
)
def test_the_methods_differ_in_normalising_by_default(world, merged, tmp_path, method, scale):
    twin = save(tmp_path / "twin", world["A"])
    for weight, expected in ((0.5, 1), (0.25, scale)):
        models = entries(world.path("A"), twin, weight=[weight, weight])
        got = merged({"merge_method": method, "models": models, "base_model": str(world.path("BASE"))})
        for name, tensor in got.items():
            base, d = doubles(world["BASE"][name]), doubles(world["A"][name] - world["BASE"][name])
            assert_close(tensor, oracles.Expected(base + expected * d, np.maximum(np.abs(base), np.abs(d))))


# Rounding


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "bfloat16"}, BF16),
        ({"dtype": "float16"}, torch.float16),
        ({"out_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, F32),
        ({"out_dtype": "float64"}, torch.float64),
    ],
    ids=str,
)
def test_every_output_dtype_is_the_float32_result_rounded_once(world, merged, keys, dtype):
    recipe = world.recipe("ties", "ABC", base="BASE", weight=[1, 0.5, 0.7], density=0.6)
    exact = merged(recipe | {"dtype": "float32"})
    check_equal(merged(recipe | keys), {n: rounded(doubles(x), dtype) for n, x in exact.items()})


def test_with_dtype_float64_the_arithmetic_is_float64(world, merged):
    parameters = {"weight": [1, 0.5, 0.7], "density": [0.6, 0.6, 0.6]}
    got = merged(world.recipe("ties", "ABC", base="BASE", **parameters) | {"dtype": "float64"})
    expected = world.expect(oracles.ties, "ABC", base="BASE", exact=True, **parameters)
    for name, tensor in got.items():
        assert tensor.dtype == torch.float64
        assert_close(tensor, expected[name], arithmetic=torch.float64)


def test_the_largest_is_found_among_equal_magnitudes_by_the_lowest_index(merged, tmp_path):
    base = {name: torch.zeros_like(x) for name, x in base_tensors().items()}
    model = {
        name: torch.where(torch.arange(x.numel()) % 2 == 0, 0.5, -0.5).reshape(x.shape) for name, x in base.items()
    }
    folders = save(tmp_path / "A", model), save(tmp_path / "BASE", base)
    recipe = {"merge_method": "ties", "models": entries(folders[0], weight=[1], density=[0.3])}
    for name, tensor in merged(recipe | {"base_model": str(folders[1])}).items():
        count = int(0.3 * tensor.numel())
        assert torch.equal(tensor.ravel()[:count], model[name].ravel()[:count])
        assert not tensor.ravel()[count:].any()
