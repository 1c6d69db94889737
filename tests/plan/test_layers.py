"""The layer of a tensor, by the names of many kinds of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from models import save_checkpoint
from safetensors.torch import load_file

from mergekit_lfm import merge
from mergekit_lfm.commands.app import main
from mergekit_lfm.plan.layers import find_layers


def names(pattern: str, *ranges: int) -> list[str]:
    """The pattern with every number of a range in place of each #, one after the other."""
    found = [pattern]
    for size in ranges:
        found = [name.replace("#", str(i), 1) for name in found for i in range(size)]
    return found


LLAMA = [*names("model.layers.#.self_attn.q_proj.weight", 3), *names("model.layers.#.input_layernorm.weight", 3)]
T5 = [
    *names("decoder.block.#.layer.0.SelfAttention.q.weight", 2),
    *names("decoder.block.#.layer.2.DenseReluDense.wo.weight", 2),
    *names("decoder.block.#.layer.#.layer_norm.weight", 2, 3),
]
RESNET = [
    *names("layer2.#.conv1.weight", 2),
    *names("layer2.#.bn1.weight", 2),
    *names("layer2.#.bn1.bias", 2),
    *names("layer2.0.downsample.#.weight", 2),
    "layer2.0.downsample.1.bias",
]
TOWERS = [
    *names("#.encoder.layer.#.output.dense.weight", 2, 2),
    *names("#.embeddings.word_embeddings.weight", 2),
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (LLAMA, {"model.layers.2.self_attn.q_proj.weight": (2, 3), "model.layers.0.input_layernorm.weight": (0, 3)}),
        (
            [*LLAMA, *names("model.layers.#.mlp.experts.#.w1.weight", 3, 8), *names("model.layers.#.mlp.#.w", 3, 2)],
            {"model.layers.1.mlp.experts.7.w1.weight": (1, 3), "model.layers.1.mlp.0.w": (1, 3)},
        ),
        (
            [
                *names("0.auto_model.encoder.layer.#.output.dense.weight", 3),
                "0.auto_model.embeddings.word_embeddings.weight",
            ],
            {
                "0.auto_model.encoder.layer.1.output.dense.weight": (1, 3),
                "0.auto_model.embeddings.word_embeddings.weight": None,
            },
        ),
        (TOWERS, {"1.encoder.layer.0.output.dense.weight": (0, 2), "1.embeddings.word_embeddings.weight": None}),
        (T5, {"decoder.block.1.layer.0.layer_norm.weight": (1, 2), T5[2]: (0, 2)}),
        (RESNET, {"layer2.1.conv1.weight": (1, 2), "layer2.0.downsample.1.weight": (0, 2)}),
        (names("#.weight", 4), {"3.weight": (3, 4)}),
        (["model.layers.0.mlp.weight", "model.norm.weight"], {"model.layers.0.mlp.weight": (0, 1)}),
        (
            [*names("encoder.layers.#.w", 2), *names("decoder.layers.#.w", 4)],
            {"encoder.layers.1.w": (1, 2), "decoder.layers.1.w": (1, 4)},
        ),
        (["layer1.w", "w2", "embed.weight"], {}),
    ],
    ids=["llama", "experts", "container", "towers", "t5", "resnet", "sequence", "one", "two stacks", "no numbers"],
)
def test_the_layer_is_the_number_that_takes_the_most_values(
    given: list[str], expected: dict[str, tuple[int, int] | None]
) -> None:
    found = find_layers(given)
    assert {name: found.get(name) for name in expected} == expected
    assert bool(found) == any(expected.values())
    assert find_layers(reversed(given)) == found


def test_a_gradient_runs_over_the_layers_in_a_container(tmp_path: Path) -> None:
    made = [*names("0.auto_model.encoder.layer.#.weight", 3), "0.auto_model.embeddings.weight"]
    models = [
        save_checkpoint(tmp_path / f"m{i}", {name: torch.full((2,), float(i)) for name in made}, {}) for i in range(2)
    ]
    entries = [
        {"model": str(model), "parameters": {"weight": w}} for model, w in zip(models, ([1, 0], [0, 1]), strict=True)
    ]
    recipe = {"merge_method": "linear", "models": entries}
    merged = load_file(Path(merge(recipe, tmp_path / "out")) / "model.safetensors")
    assert [float(merged[name][0]) for name in made] == [0, 0.5, 1, 0]


def test_the_verbose_plan_lists_layers_and_values(tmp_path: Path) -> None:
    made = [*names("0.encoder.layer.#.weight", 3), "0.embeddings.weight"]
    for i in range(2):
        save_checkpoint(tmp_path / f"m{i}", {name: torch.full((2,), float(i)) for name in made}, {})
    (tmp_path / "r.yaml").write_text(
        f"merge_method: slerp\nbase_model: {tmp_path / 'm0'}\nmodels: [{{model: {tmp_path / 'm0'}}}, "
        f"{{model: {tmp_path / 'm1'}}}]\nparameters: {{t: [0, 0.25]}}\n"
    )
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "-v"])
    rows = {line.split()[0]: " ".join(line.split()) for line in result.stdout.splitlines() if line.startswith("0.")}
    assert rows == {
        "0.embeddings.weight": "0.embeddings.weight [2] float32 slerp - t 0",
        "0.encoder.layer.0.weight": "0.encoder.layer.0.weight [2] float32 slerp 0 of 0-2 t 0",
        "0.encoder.layer.1.weight": "0.encoder.layer.1.weight [2] float32 slerp 1 of 0-2 t 0.125",
        "0.encoder.layer.2.weight": "0.encoder.layer.2.weight [2] float32 slerp 2 of 0-2 t 0.25",
    }
