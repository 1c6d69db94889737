"""The examples that come with mergekit, in form: on stand-ins for their models they give what the formulas say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from helpers_merges import Tensors, load_all
from helpers_public import PUBLIC, put, save_stand_in
from helpers_text import transformers
from oracles import Array, Expected, assert_close, doubles

from mergekit_lfm import merge

pytestmark = pytest.mark.filterwarnings("ignore::mergekit_lfm.api.outcome.Finding")

LAYERS = 40
ORCA, WIZARD, PLATYPUS, LLAMA = (
    "beta/orca_mini_v3_13b",
    "beta/WizardMath-13B",
    "gamma/Platypus2-13B",
    "alpha/Llama-2-13B",
)
MISTRAL, INSTRUCT, BIO = "alpha/Mistral-7B-v0.1", "alpha/Mistral-7B-Instruct", "delta/bio-7B"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def gradient(points: Sequence[float], name: str, layers: int = LAYERS) -> float:
    """The value for a tensor: between the points, from the first layer to the last; the first outside of the layers."""
    parts = name.split(".")
    at = int(parts[parts.index("layers") + 1]) / (layers - 1) if "layers" in parts else 0.0
    return float(np.interp(at, np.linspace(0, 1, len(points)), points))


def slerped(name: str, one: Array, other: Array) -> Expected:
    """gradient-slerp.yml."""
    points = [0, 0.5, 0.3, 0.7, 1] if "self_attn" in name else [1, 0.5, 0.7, 0.3, 0] if "mlp" in name else [0.5]
    return oracles.slerp([one, other], gradient(points, name))


def tied_with_gradients(name: str, base: Array, *xs: Array) -> Expected:
    """ties.yml."""
    weights = [1.0, gradient([0, 0.3, 0.7, 1], name), 0.5 if "mlp" in name else 0.0]
    return oracles.ties(xs, weights, base, [gradient([1, 0.7, 0.1], name), 0.5, 0.33])


EXAMPLES: dict[str, tuple[list[str], Callable[..., Expected]]] = {
    "linear_three": ([ORCA, WIZARD, PLATYPUS], lambda _, *xs: oracles.linear(xs, [1.0, 0.3, 0.5])),
    "ties_gradients": ([LLAMA, ORCA, PLATYPUS, WIZARD], tied_with_gradients),
    "ties_bio": (
        [MISTRAL, INSTRUCT, BIO],
        lambda _, base, *xs: oracles.ties(xs, [0.5, 0.5], base, [0.5, 0.5], normalize=False),
    ),
    "slerp_13b": ([ORCA, PLATYPUS], slerped),
    "arcee_fusion_pair": (
        ["beta/Qwen2.5-14B-Tuned", "gamma/Qwen2.5-14B-Code"],
        lambda _, base, x: oracles.arcee_fusion([base, x]),
    ),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples(example: str, root: Path, tmp_path: Path) -> None:
    names, formula = EXAMPLES[example]
    merged = load_all(Path(merge(put(PUBLIC / f"{example}.yaml", root), tmp_path / "out")))
    inputs = [load_all(root / name) for name in names]
    assert merged.keys() == inputs[0].keys()
    for name, x in merged.items():
        assert_close(x, formula(name, *(doubles(each[name]) for each in inputs)))


CAPTIONS, SCREENS = "alpha/Qwen2-VL-7B-Captioner", "beta/Qwen2-VL-7B-Screens"
VISION = "alpha/Qwen2-VL-7B-Instruct"


def gradient_in_parts(points: Sequence[float], name: str) -> float:
    """The value for a tensor of a model of images and text, of 4 and 28 layers; in a stack of one it is the last."""
    if ".mlp.0." in name:
        return points[-1]
    return gradient(points, name.replace("blocks", "layers"), 4 if "visual" in name else 28)


def tied_in_parts(name: str, base: Array, *xs: Array) -> Expected:
    """vlm-ties.yml: the base is listed, too, but subtracted."""
    density = gradient_in_parts([1, 0.7, 0.1], name)
    return oracles.ties(xs[:1], [1.0], base, [density])


VISION_EXAMPLES: dict[str, tuple[str, list[str], Callable[..., Expected]]] = {
    "vlm-linear": (
        f"""
models:
  - model: {VISION}
    parameters: {{weight: 1.0}}
  - model: {CAPTIONS}
    parameters: {{weight: 1.0}}
merge_method: linear
dtype: float32
""",
        [VISION, CAPTIONS],
        lambda _, *xs: oracles.linear(xs, [1.0, 1.0]),
    ),
    "vlm-ties": (
        f"""
models:
  - model: {SCREENS}
    parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}
  - model: {VISION}
    parameters: {{density: 0.5, weight: [0, 0.3, 0.7, 1]}}
merge_method: ties
base_model: {VISION}
parameters: {{normalize: true, int8_mask: true}}
dtype: float16
""",
        [VISION, SCREENS],
        tied_in_parts,
    ),
}


@pytest.mark.parametrize("example", VISION_EXAMPLES)
def test_examples_of_images_and_text(example: str, root: Path, tmp_path: Path) -> None:
    text, names, formula = VISION_EXAMPLES[example]
    for name in names:
        save_stand_in(root, name)
    (root / f"{example}.yml").write_text(text)
    merged = load_all(Path(merge(root / f"{example}.yml", tmp_path / "out")))
    inputs = [load_all(root / name) for name in names]
    assert merged.keys() == inputs[0].keys() and sum("visual.blocks" in name for name in merged) == 12
    for name, x in merged.items():
        assert_close(x, formula(name, *(doubles(each[name]) for each in inputs)))


def test_mega_takes_the_rounded_result_of_its_first_stage(root: Path, tmp_path: Path) -> None:
    merged = load_all(Path(merge(put(PUBLIC / "stages_mega.yaml", root), tmp_path / "out")))
    first = load_all(tmp_path / "out.stages" / "gradient-slerp")
    orca, platypus, wizard, base = (load_all(root / name) for name in (ORCA, PLATYPUS, WIZARD, LLAMA))
    assert merged.keys() == first.keys() == base.keys()
    for name, x in merged.items():
        assert_close(first[name], slerped(name, doubles(orca[name]), doubles(platypus[name])))
        xs = [doubles(first[name]), doubles(wizard[name])]
        weights, densities = [1.0, 0.5 if "mlp" in name else 0.0], [gradient([1, 0.7, 0.1], name), 0.33]
        assert_close(x, oracles.ties(xs, weights, doubles(base[name]), densities))


def write(folder: Path, *slices: Sequence[tuple[str, int, int]], **more: Any) -> Path:
    """A recipe of slices in a folder of stand-ins."""
    lines = ["slices:"]
    for sources in slices:
        lines += ["  - sources:"]
        for model, first, last in sources:
            lines += [f"    - model: {model}", f"      layer_range: [{first}, {last}]"]
    path = folder / "example.yml"
    path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in more.items())]))
    return path


def test_orcamini_platy_44layer(root: Path, tmp_path: Path) -> None:
    for name in (ORCA, PLATYPUS):
        save_stand_in(root, name)
    path = write(root, [(ORCA, 0, 24)], [(PLATYPUS, 20, 40)], merge_method="passthrough", dtype="float16")
    merged = load_all(Path(merge(path, tmp_path / "out")))
    orca, platypus = load_all(root / ORCA), load_all(root / PLATYPUS)
    expected: Tensors = {}
    for name, x in orca.items():
        expected |= {name: x} if ".layers." not in name or int(name.split(".")[2]) < 24 else {}
    for name, x in platypus.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= 20:
            expected[".".join(["model", "layers", str(int(parts[2]) + 4), *parts[3:]])] = x
        elif name in ("model.norm.weight", "lm_head.weight"):
            expected[name] = x
    assert merged.keys() == expected.keys() and sum("q_proj" in name for name in merged) == 44
    assert [name for name, x in expected.items() if not torch.equal(merged[name], x.half())] == []


def test_gpt2_small_is_cut(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=12, n_head=2, n_layer=12, vocab_size=20, n_positions=8)
    transformers.set_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    path = write(tmp_path, [("gpt2", 0, 8)], merge_method="passthrough", dtype="float16")
    merged, source = load_all(Path(merge(path, tmp_path / "out"))), load_all(tmp_path / "gpt2")
    late = tuple(f"transformer.h.{i}." for i in range(8, 12))
    expected = {name: x.half() for name, x in source.items() if not name.startswith(late)}
    assert merged.keys() == expected.keys() and len(merged) == 8 * 12 + 4
    assert [name for name, x in expected.items() if not torch.equal(merged[name], x)] == []
