"""Adapters merged among themselves, against PEFT, and against the papers' formulas on dense matrices in numpy."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_adapters import logits, tiny_model, with_adapter
from helpers_lora import Array, changes, save_lora, sum_of
from safetensors.torch import load_file, save_file

from mergekit_lfm import PlanError, extract_lora, merge_adapters
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.views.adapted import open_model

pytestmark = pytest.mark.filterwarnings("ignore:.* does not change .* modules:mergekit_lfm.Finding")
FULL = 8  # the largest sum of ranks, and the smaller side of v_proj: PEFT's `svd` fails at a larger rank
PEFT_SUMS: dict[str, dict[str, Any]] = {
    "cat": {"method": "cat"},
    "svd": {"method": "svd", "rank": FULL},
    "ties_svd": {"method": "ties", "density": 0.4, "rank": FULL},
    "dare_linear_svd": {"method": "dare_linear", "density": 1.0, "rank": FULL},
    "magnitude_prune_svd": {"method": "breadcrumbs", "density": 0.4, "gamma": 0.0, "rank": FULL},
}


def by_peft(folders: Sequence[Path], weights: list[float], kind: str, **options: Any) -> dict[str, Array]:
    """The changes of PEFT's merged adapter."""
    import peft
    from peft.tuners.lora import LoraLayer

    names = [folder.name for folder in folders]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(tiny_model("llama"), str(folders[0]), adapter_name=names[0])
        for folder in folders[1:]:
            model.load_adapter(str(folder), adapter_name=folder.name)
        model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            change = layer.get_delta_weight("merged").detach().double().numpy()
            found[name] = change.T if "embed" in name else change
    return found


def assert_same(found: dict[str, Array], expected: dict[str, Array], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, rtol=0, atol=tolerance * np.abs(change).max(), err_msg=name)


@pytest.mark.parametrize("kind", PEFT_SUMS)
def test_peft_gives_the_same_products(kind: str, trio: list[Path], tmp_path: Path) -> None:
    """The weights are 1 for TIES: PEFT divides by the number of terms, we by their weights."""
    options = {"density": PEFT_SUMS[kind]["density"]} if "density" in PEFT_SUMS[kind] else {}
    weights = [1.0, 1.0, 1.0] if "ties" in kind else [1.0, 0.5, -2.0]
    rank = {} if kind == "cat" else {"svd_rank": FULL}
    expected = by_peft(trio, weights, kind, **options, **rank)
    merge_adapters(trio, tmp_path / "out", weights=weights, **PEFT_SUMS[kind])
    assert_same(changes(tmp_path / "out"), expected, 2e-6)


def test_the_linear_of_peft_is_not_the_sum_of_the_products(trio: list[Path], tmp_path: Path) -> None:
    """It adds the A and the B apart, which gives each B times the A of others, too."""
    pair, weights = [trio[0], trio[2]], [0.7, 0.3]
    theirs = by_peft(pair, weights, "linear")
    merge_adapters(pair, tmp_path / "out", weights=weights)
    ours = changes(tmp_path / "out")
    assert_same(ours, sum_of(pair, weights))
    assert_same(by_peft(pair, weights, "cat"), sum_of(pair, weights))
    name = "model.layers.0.self_attn.q_proj"
    assert np.linalg.norm(theirs[name] - ours[name]) > 0.5 * np.linalg.norm(ours[name])
    sides = {"lora_A": np.zeros((3, 16)), "lora_B": np.zeros((16, 3))}
    for folder, weight in zip(pair, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for side in sides:
            own = tensors[f"base_model.model.{name}.{side}.weight"].double().numpy()
            sides[side] = sides[side] + np.sqrt(weight * config["lora_alpha"] / config["r"]) * own
    np.testing.assert_allclose(theirs[name], sides["lora_B"] @ sides["lora_A"], atol=1e-5)


@pytest.mark.parametrize("space", ["product", "knots", "core"])
def test_a_linear_merge_is_the_mean_of_the_products_in_every_space(
    space: str, trio: list[Path], tmp_path: Path
) -> None:
    merge_adapters(trio, tmp_path / "out", weights=[2, 1, 1], space=space)
    assert_same(changes(tmp_path / "out"), sum_of(trio, [0.5, 0.25, 0.25]))


def test_svd_has_the_largest_rank_of_the_adapters_unless_told(trio: list[Path], tmp_path: Path) -> None:
    merged = merge_adapters(trio, tmp_path / "out", method="svd").result
    assert [module.rank for module in merged.modules] == [3, 3, 3, 3, 4, 4, 3]
    exact = sum_of(trio, [1, 1, 1])
    for module in merged.modules:
        u, s, v = np.linalg.svd(exact[module.name], full_matrices=False)
        best = (u[:, : module.rank] * s[: module.rank]) @ v[: module.rank]
        np.testing.assert_allclose(changes(tmp_path / "out")[module.name], best, atol=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "model_stock"])
def test_a_method_that_is_a_weighted_sum_needs_no_matrix(method: str, trio: list[Path], tmp_path: Path) -> None:
    """It is exact at the sum of the ranks, as `linear` is."""
    merged = merge_adapters(trio, tmp_path / "out", method=method).result
    assert [module.rank for module in merged.modules] == [8, 6, 8, 6, 4, 4, 3]
    if method != "model_stock":
        assert_same(changes(tmp_path / "out"), sum_of(trio, [1, 1, 1]))


def ties(terms: Sequence[Array], density: float) -> Array:
    """Source: Yadav et al. 2023, algorithm 1, with one threshold for each matrix."""
    trimmed = []
    for x in terms:
        flat = np.zeros(x.size)
        order = np.argsort(-np.abs(x.ravel()), kind="stable")[: max(1, int(density * x.size))]
        flat[order] = x.ravel()[order]
        trimmed.append(flat.reshape(x.shape))
    sign = np.where(np.sum(trimmed, 0) >= 0, 1, -1)
    agreeing = [np.where(np.sign(x) == sign, x, 0) for x in trimmed]
    count = np.sum([x != 0 for x in agreeing], 0)
    return np.asarray(np.sum(agreeing, 0) / np.maximum(count, 1))


def dense_of(trio: list[Path], module: str) -> list[Array]:
    each = [changes(folder).get(module) for folder in trio]
    shape = next(x.shape for x in each if x is not None)
    return [np.zeros(shape) if x is None else x for x in each]


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_ties_in_knots_is_the_papers_formula(module: str, trio: list[Path], tmp_path: Path) -> None:
    """Arithmetic on the dense matrices side by side, with half of each S V_i^T."""
    merge_adapters(trio, tmp_path / "out", method="ties", density=0.5, space="knots")
    matrices = dense_of(trio, module)
    u, s, v = np.linalg.svd(np.concatenate(matrices, 1), full_matrices=False)
    rank = int((s > 1e-5).sum())
    parts = np.split(s[:rank, None] * v[:rank], 3, 1)
    parts = [np.where(np.abs(part) < 1e-12, 0, part) for part in parts]  # of modules that an adapter leaves alone
    np.testing.assert_allclose(changes(tmp_path / "out")[module], u[:, :rank] @ ties(parts, 0.5), atol=1e-5)


def test_ties_in_the_core_space_is_the_papers_formula(trio: list[Path], tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    merge_adapters(trio, tmp_path / "out", method="ties", density=0.5, space="core")
    b, a = [], []
    for folder in trio:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        r = config["r"]
        scale = config["lora_alpha"] / (np.sqrt(r) if config["use_rslora"] else r)
        b.append(scale * tensors[f"base_model.model.{module}.lora_B.weight"].double().numpy())
        a.append(tensors[f"base_model.model.{module}.lora_A.weight"].double().numpy())
    left = np.linalg.svd(np.concatenate(b, 1), full_matrices=False)[0]
    right = np.linalg.svd(np.concatenate(a, 0), full_matrices=False)[2]
    cores = [left.T @ y @ x @ right.T for y, x in zip(b, a, strict=True)]
    np.testing.assert_allclose(changes(tmp_path / "out")[module], left @ ties(cores, 0.5) @ right, atol=1e-5)


def test_ties_on_products_is_the_best_of_its_rank(trio: list[Path], tmp_path: Path) -> None:
    """By default the largest rank of the adapters; the kept share is that of the dense result."""
    merged = merge_adapters(trio, tmp_path / "out", method="ties", density=0.5).result
    for module in merged.modules:
        u, s, v = np.linalg.svd(ties(dense_of(trio, module.name), 0.5), full_matrices=False)
        best = (u[:, : module.rank] * s[: module.rank]) @ v[: module.rank]
        np.testing.assert_allclose(changes(tmp_path / "out")[module.name], best, atol=1e-5)
        assert module.kept == pytest.approx((s[: module.rank] ** 2).sum() / (s**2).sum(), abs=1e-6)
    assert {module.name: module.rank for module in merged.modules}["model.layers.0.mlp.down_proj"] == 4


def test_adapters_of_several_dtypes_are_merged_in_the_widest(trio: list[Path], tmp_path: Path) -> None:
    wide = tmp_path / "two"
    wide.mkdir()
    (wide / "adapter_config.json").symlink_to(trio[1] / "adapter_config.json")
    tensors = load_file(trio[1] / "adapter_model.safetensors")
    save_file({name: x.double() for name, x in tensors.items()}, wide / "adapter_model.safetensors")
    for space in ("product", "knots", "core"):
        how: dict[str, Any] = {"method": "ties", "density": 0.5, "space": space}
        merge_adapters(trio, tmp_path / f"{space}-plain", **how)
        merge_adapters([trio[0], wide, trio[2]], tmp_path / f"{space}-wide", dtype="float64", **how)
        assert_same(changes(tmp_path / f"{space}-wide"), changes(tmp_path / f"{space}-plain"), 1e-5)


def test_a_share_of_energy_chooses_each_modules_rank(trio: list[Path], tmp_path: Path) -> None:
    merged = merge_adapters(trio, tmp_path / "out", energy=0.9).result
    exact = sum_of(trio, [1 / 3] * 3)
    for module in merged.modules:
        squares = np.linalg.svd(exact[module.name], compute_uv=False) ** 2
        assert module.rank == 1 + int((squares.cumsum() < 0.9 * squares.sum()).sum())
        assert module.kept == pytest.approx(squares[: module.rank].sum() / squares.sum(), abs=1e-6)
    assert 0.9 <= merged.kept < 1


@pytest.mark.parametrize(
    "how", [{"method": "cat"}, {"method": "ties", "density": 0.5, "space": "knots"}, {"method": "ties"}]
)
def test_peft_loads_the_result_and_computes_with_it(how: dict[str, Any], trio: list[Path], tmp_path: Path) -> None:
    """No model is on the disk. The logits are those of the weights with the changes added."""
    base = tiny_model("llama")
    merge_adapters(trio, tmp_path / "out", **how)
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for name, change in changes(tmp_path / "out").items():
            weight = changed.get_parameter(f"{name}.weight")
            weight += torch.from_numpy(change.T if "embed" in name else change).float()
    found, expected = logits(with_adapter(base, tmp_path / "out")), logits(changed)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(base), atol=0.1)


def test_a_scale_is_a_share_of_an_adapters_changes(trio: list[Path], tmp_path: Path) -> None:
    merge_adapters_by_recipe(
        tmp_path / "out", [{"adapter": str(trio[0]), "scale": -0.5}, {"adapter": str(trio[0]), "scale": 2}]
    )
    assert_same(changes(tmp_path / "out"), sum_of([trio[0]], [1.5]))


def merge_adapters_by_recipe(out: Path, adapters: list[dict[str, Any]], **keys: Any) -> Any:
    from mergekit_lfm import merge_adapter_recipe

    data = {"job": "adapters", "merge_method": "cat", "adapters": adapters, "parameters": {"weight": 1}, **keys}
    return merge_adapter_recipe(data, out).result


def test_parameters_of_single_modules_and_layers(trio: list[Path], tmp_path: Path) -> None:
    """Filters and gradients are those of merges: the weight of `two` for q_proj, that of `one` growing by the layer."""
    lines = [
        {"adapter": str(trio[0]), "parameters": {"weight": [0, 1]}},
        {"adapter": str(trio[1]), "parameters": {"weight": [{"filter": "q_proj", "value": 3}, {"value": 1}]}},
    ]
    merge_adapters_by_recipe(tmp_path / "out", lines)
    found = changes(tmp_path / "out")
    for layer, own in ((0, 0), (1, 1)):
        q, v, down = (
            f"model.layers.{layer}.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        )
        expected = sum_of([trio[0], trio[1]], [own, 3])
        np.testing.assert_allclose(found[q], expected[q], atol=1e-5)
        np.testing.assert_allclose(found[v], expected[v], atol=1e-5)
        np.testing.assert_allclose(found[down], sum_of([trio[1]], [1])[down], atol=1e-5)


def test_a_random_merge_depends_on_the_seed_alone(trio: list[Path], tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge_adapters(trio, tmp_path / name, method="dare_ties", density=0.5, seed=seed)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_experts_are_merged_one_by_one(tmp_path: Path) -> None:
    """PEFT's A and B of all experts hold those of each, in another order of either."""
    model = tiny_model("mixtral")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"target_modules": [], "target_parameters": parameters, "lora_alpha": 4}
    folders = [save_lora(model, tmp_path / f"{r}", r, r=r, **config) for r in (2, 3)]
    merged = merge_adapters(folders, tmp_path / "out", weights=[0.25, 0.75]).result
    assert {(module.shape, module.rank) for module in merged.modules} == {((4, 48, 16), 5), ((4, 16, 24), 5)}
    both = [with_adapter(model, folder).merge_and_unload() for folder in folders]
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, x in expected.named_parameters():
            one, two = (each.get_parameter(name) for each in both)
            x.copy_(0.25 * one + 0.75 * two)
    assert torch.allclose(logits(with_adapter(model, tmp_path / "out")), logits(expected), atol=1e-4)


def test_layers_that_are_stored_turned_keep_their_biases(tmp_path: Path) -> None:
    """GPT-2's layers are Conv1D. PEFT saves a bias beside the matrices, under a name of its wrapper's."""
    model = tiny_model("gpt2")
    config = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "bias": "lora_only", "r": 2}
    folders = [save_lora(model, tmp_path / f"{seed}", seed, **config) for seed in (1, 2)]
    for i, folder in enumerate(folders, 1):
        tensors = load_file(folder / "adapter_model.safetensors")
        biases = {name: x + i for name, x in tensors.items() if name.endswith("bias")}
        assert len(biases) == 4
        save_file(tensors | biases, folder / "adapter_model.safetensors")
    merge_adapters(folders, tmp_path / "out", method="cat", weights=[1, 3])
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in sum_of(folders, [1, 3]).items():
            expected.get_parameter(f"{name}.weight").add_(torch.from_numpy(change.T).float())
            expected.get_parameter(f"{name}.bias").add_(1.75)
    assert torch.allclose(logits(with_adapter(model, tmp_path / "out")), logits(expected), rtol=1e-3, atol=1e-3)


def heads(tmp_path: Path, seeds: Sequence[int] = (1, 2)) -> tuple[Any, list[Path]]:
    """A classifier, and adapters that save its head whole, and the biases of their layers."""
    model = tiny_model("bert")
    config = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "r": 2}
    return model, [save_lora(model, tmp_path / f"head{seed}", seed, **config) for seed in seeds]


def saved(folder: Path, name: str = "classifier.weight") -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}"]


def test_saved_tensors_become_their_weighted_mean(tmp_path: Path) -> None:
    model, folders = heads(tmp_path)
    merge_adapters(folders, tmp_path / "out", method="cat", weights=[3, 1])
    mean = 0.75 * saved(folders[0]) + 0.25 * saved(folders[1])
    assert torch.allclose(saved(tmp_path / "out"), mean, atol=1e-6)
    own = with_adapter(model, tmp_path / "out").base_model.model.classifier.modules_to_save["default"].weight
    assert torch.allclose(own, mean, atol=1e-6)


def test_saved_tensors_are_merged_as_changes_to_a_base(tmp_path: Path) -> None:
    model, folders = heads(tmp_path)
    model.save_pretrained(tmp_path / "base")
    merge_adapters(folders, tmp_path / "out", method="ties", density=0.5, base=tmp_path / "base")
    base = model.classifier.weight.detach().double().numpy()
    deltas = [saved(folder).double().numpy() - base for folder in folders]
    np.testing.assert_allclose(saved(tmp_path / "out").numpy(), base + ties(deltas, 0.5), atol=1e-6)


def test_equal_saved_tensors_are_kept(tmp_path: Path) -> None:
    _, (one, two) = heads(tmp_path)
    tensors = load_file(two / "adapter_model.safetensors")
    tensors |= {name: x for name, x in load_file(one / "adapter_model.safetensors").items() if "classifier" in name}
    save_file(tensors, two / "adapter_model.safetensors")
    merge_adapters([one, two], tmp_path / "out", method="ties")
    assert torch.equal(saved(tmp_path / "out"), saved(one))


def test_saved_tensors_that_need_a_base_are_refused_without(tmp_path: Path) -> None:
    model, folders = heads(tmp_path)
    with pytest.raises(
        PlanError, match=r"classifier\.bias is saved whole, with other values.*\n.*classifier\.weight is"
    ):
        merge_adapters(folders, tmp_path / "out", method="ties")
    plain = save_lora(model, tmp_path / "plain", 3, target_modules=["query"])
    with pytest.raises(PlanError, match=r"saved in .*head1 alone: give `base_model`, whose value the others keep"):
        merge_adapters([folders[0], plain], tmp_path / "out")
    model.save_pretrained(tmp_path / "base")
    merge_adapters([folders[0], plain], tmp_path / "out", base=tmp_path / "base")
    mean = (saved(folders[0]) + model.classifier.weight.detach()) / 2
    assert torch.allclose(saved(tmp_path / "out"), mean, atol=1e-6)


class Pixels(torch.nn.Module):
    """A convolution, for adapters whose matrices have four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(x)
        return result


def test_convolutions_keep_their_kernels(tmp_path: Path) -> None:
    import peft

    model = Pixels()
    folders = [save_lora(model, tmp_path / f"{r}", r, r=r, target_modules=["conv"]) for r in (1, 2)]
    merge_adapters(folders, tmp_path / "out", method="cat")
    assert_same(changes(tmp_path / "out"), sum_of(folders, [1, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "out"))
    change = torch.from_numpy(sum_of(folders, [1, 1])["conv"]).float().view(6, 4, 3, 3)
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.conv2d(x, model.conv.weight + change, model.conv.bias)
    assert torch.allclose(wrapped(x), expected, atol=1e-4)


def test_notices_name_modules_that_some_leave_alone_and_other_bases(trio: list[Path], tmp_path: Path) -> None:
    for i, folder in enumerate(trio[:2]):
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": f"org/base{i}"}
        copied = tmp_path / folder.name
        copied.mkdir()
        (copied / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
        (copied / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(Finding) as told:
        merge_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    texts = [str(each.message) for each in told]
    assert "two does not change 2 of 6 modules, such as model.layers.0.self_attn.v_proj and 1 more; there" in texts[2]
    assert "one on org/base0" in texts[0] and "two on org/base1" in texts[0]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base0"


def test_adapters_extracted_from_a_model_with_a_tied_head_are_merged_and_applied_to_it(tmp_path: Path) -> None:
    """The head follows the embedding, whose change is the sum of those of both."""
    models = Path(__file__).parents[2] / "recipes" / "quickstart"
    adapters = [tmp_path / name for name in ("docs", "code")]
    for adapter in adapters:
        extract_lora(models / adapter.name, models / "base", adapter, rank=8)
    merge_adapters(adapters, tmp_path / "both", method="task_arithmetic", base=models / "base", weight=1.0)
    merged = open_model(f"{models / 'base'}+{tmp_path / 'both'}")
    base, docs, code = (
        load_file(models / name / "model.safetensors")["model.embed_tokens.weight"].double()
        for name in ("base", "docs", "code")
    )
    name = "model.embed_tokens.weight"
    found = merged.read(name).view(merged[name].shape).double()
    torch.testing.assert_close(found, docs + code - base, rtol=1e-2, atol=1e-3)
    assert "lm_head.weight" not in merged
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["ensure_weight_tying"]


def test_weights_beyond_float32_get_one_message(tmp_path: Path) -> None:
    models = Path(__file__).parents[2] / "recipes" / "quickstart"
    extract_lora(models / "docs", models / "base", tmp_path / "docs", rank=4, include=["mlp"])
    with pytest.raises(PlanError, match="too large"):
        merge_adapters([tmp_path / "docs"], tmp_path / "out", method="cat", weights=[1e39], rank=2)
    with pytest.raises(PlanError, match="expected a list of adapters"):
        merge_adapters(str(tmp_path / "docs"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
