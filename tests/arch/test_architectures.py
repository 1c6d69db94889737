"""Merges and stacks of every line of architectures.py: tensors by the formula, models that load and run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture
from helpers_merges import Tensors, average, load_all, load_complete
from models import save_checkpoint
from oracles import Expected, assert_close, doubles
from torch import Tensor

from mergekit_lfm import merge

STACKED = [name for name, line in ARCHITECTURES.items() if line.stack]
LAYER = re.compile(r"((?:^|.*?\.)(?:layers|layer|h|block|blocks|resblocks)\.)(\d+)(\..*)")
PROMPT = torch.tensor([[1, 7, 8, 9, 10, 11], [1, 12, 13, 14, 15, 16]])
Run = Callable[[Any], Tensor]


def build(line: Architecture, seed: int) -> Any:
    """A random model; biases and norms differ from their first values, too."""
    kind = getattr(transformers, line.kind)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**deepcopy(dict(line.config)))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += torch.rand(buffer.shape)
    return model


@pytest.fixture
def pair(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """A folder with two models of an architecture, saved in `a` and `b`."""
    name: str = request.param
    line = ARCHITECTURES[name]

    def save(folder: Path) -> None:
        for seed, model in enumerate("ab"):
            if line.shapes:
                draw = torch.Generator().manual_seed(seed)
                tensors = {name: torch.randn(shape, generator=draw) for name, shape in line.shapes.items()}
                save_checkpoint(folder / model, tensors, line.config)
            else:
                build(line, seed).save_pretrained(folder / model)

    return made_once(f"architecture-{re.sub(r'[^a-zA-Z0-9]', '-', name)}", save)


def recipe_of(pair: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(pair / "a"), "parameters": {"weight": 1}}]
    models += [{"model": str(pair / "b"), "parameters": {"weight": 3}}]
    return {"merge_method": "linear", "models": models, **more}


def outputs(model: Any) -> Tensor:
    """All that a model returns for an input of every kind that it takes, as one vector."""
    with torch.no_grad():
        found = model(**dict(inputs_of(model)))
    return torch.cat([x.float().flatten() for x in leaves(found.to_tuple())])


def inputs_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The arguments of a forward pass."""
    draw = torch.Generator().manual_seed(0)
    config, main = model.config, model.main_input_name
    pixels = torch.randn(2, 3, 32 if "ResNet" in type(model).__name__ else 8, 8, generator=draw)
    prompt = PROMPT.clone()
    if main == "input_ids":
        image = getattr(config, "image_token_id", None)
        if hasattr(config, "vision_start_token_id"):  # images in patches: one token for four of them
            prompt[:, 2] = config.image_token_id
            yield "mm_token_type_ids", prompt.eq(config.image_token_id).int()
            yield "image_grid_thw", torch.tensor([[1, 2, 2]] * 2)
            yield "pixel_values", torch.randn(8, 96, generator=draw)
        elif hasattr(config, "vision_config"):
            if image is not None:
                prompt[:, 1:5] = image
            if "Gemma" in type(model).__name__:
                yield "token_type_ids", prompt.eq(config.image_token_id).long()
            yield "pixel_values", pixels
    shape = {"input_features": (2, 4, 16), "input_values": (2, 200)}.get(main)
    given = torch.randn(shape, generator=draw) if shape else pixels if main == "pixel_values" else prompt
    yield main, given
    if getattr(config, "is_encoder_decoder", False):
        yield "decoder_input_ids", PROMPT


def leaves(found: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and dicts."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, list | tuple | Mapping):
        for part in found.values() if isinstance(found, Mapping) else found:
            yield from leaves(part)


def layout_of(folder: Path) -> dict[str, list[tuple[str, Any, torch.dtype]]]:
    """The names of a checkpoint's files, and of each tensor the name, shape and dtype, in the order of the file."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = [(name, (x := file.get_tensor(name)).shape, x.dtype) for name in file.offset_keys()]
    return found


@pytest.mark.parametrize(("pair", "name"), [(name, name) for name in ARCHITECTURES], indirect=["pair"])
def test_a_merge_is_the_formula_s_in_the_layout_of_its_inputs(pair: Path, name: str, tmp_path: Path) -> None:
    line, out = ARCHITECTURES[name], Path(merge(recipe_of(pair), tmp_path / "out"))
    assert layout_of(out) == layout_of(pair / "a")
    merged = load_all(out)
    for tensor, expected in average_of_states(load_all(pair / "a"), load_all(pair / "b")).items():
        torch.testing.assert_close(merged[tensor], expected, rtol=2e-7, atol=2e-7)
    if not line.shapes:
        expected_model, other = build(line, 0), build(line, 1)
        expected_model.load_state_dict(average_of_states(expected_model.state_dict(), other.state_dict()))
        wanted = outputs(expected_model)
        assert wanted.isfinite().all() and not torch.allclose(wanted, outputs(other), atol=1e-3)
        torch.testing.assert_close(outputs(load_complete(line.kind, out)), wanted, rtol=1e-4, atol=1e-5)


def average_of_states(a: Tensors, b: Tensors) -> Tensors:
    """(a + 3 b) / 4 of all that floats; counters and the like as they are in a."""
    merged = average(a, b, torch.float32)
    return {name: merged[name] if x.is_floating_point() else x for name, x in a.items()}


@pytest.mark.parametrize("pair", ["Llama", "BERT", "Mixtral", "CLIP"], indirect=True)
def test_a_merge_in_bfloat16(pair: Path, tmp_path: Path) -> None:
    merged = load_all(Path(merge(recipe_of(pair, dtype="bfloat16"), tmp_path / "out")))
    a, b = load_all(pair / "a"), load_all(pair / "b")
    for name, x in a.items():
        value = (doubles(x) + 3 * doubles(b[name])) / 4
        assert_close(merged[name], Expected(value, np.maximum(abs(doubles(x)), abs(doubles(b[name])))))


@pytest.mark.parametrize(("pair", "name"), [(name, name) for name in STACKED], indirect=["pair"])
def test_a_stack_has_its_sources_tensors_loads_and_runs(pair: Path, name: str, tmp_path: Path) -> None:
    line, a, out = ARCHITECTURES[name], pair / "a", tmp_path / "out"
    merge(stack_of(line, str(a)), out)
    tensors, merged = load_all(a), load_all(out)
    expected = dict(stacked(line, tensors))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[new], tensors[old]) for new, old in expected.items())
    assert outputs(load_complete(line.kind, out)).isfinite().all()


def stack_of(line: Architecture, model: str) -> dict[str, Any]:
    """The recipe of a stack: all layers, and behind them those from `again` on once more."""
    slices = {
        module: [{"sources": [{"model": model, "layer_range": [first, count]}]} for first in (0, line.again)]
        for module, count in line.stack.items()
    }
    if "" in slices:
        return {"merge_method": "passthrough", "slices": slices[""]}
    modules = {module: {"slices": each} for module, each in slices.items()}
    return {"merge_method": "passthrough", "base_model": model, "modules": modules}


def stacked(line: Architecture, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The tensors of a stack by name, and the names of their sources."""
    for name in tensors:
        match = LAYER.match(name)
        counts = [n for module, n in line.stack.items() if belongs(name, module)]
        yield name, name
        if match and counts and int(match[2]) >= line.again:
            yield f"{match[1]}{int(match[2]) + counts[0] - line.again}{match[3]}", name


def belongs(name: str, module: str) -> bool:
    """Whether a tensor is in a module; the language model is all but what sees."""
    if module == "language_model":
        return not re.search("visual|vision|projector", name)
    return not module or f".{module}." in f".{name}"
