"""Gram and cross moments against numpy's, from recorded inputs of the layers, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_collect import arrays, mlp, texts, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lfm.collect import moments
from mergekit_lfm.collect.run import collect
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.batches import Batch

Inputs = dict[str, np.ndarray]


def inputs_of(model: nn.Module, batches: Sequence[Batch]) -> Inputs:
    """The inputs of every linear layer, [tokens, in + 1] with a 1 at the end, recorded by hooks."""
    seen: dict[str, list[np.ndarray]] = {}

    def look(name: str) -> None:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].detach().double().numpy()
            rows = x.reshape(-1, x.shape[-1])
            seen.setdefault(name, []).append(np.concatenate([rows, np.ones((len(rows), 1))], axis=1))

        handles.append(module.register_forward_pre_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            look(name)
    with torch.no_grad():
        for batch in batches:
            model(*batch.args, **batch.kwargs)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def gram(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.T @ x / len(x))


def assert_close(found: Tensor, expected: np.ndarray, rtol: float = 2e-7) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2", "bert", "encoder"])
def test_grams_are_the_mean_products_of_inputs(kind: str, tmp_path: Path) -> None:
    model = mlp(6, 9, 7, 3) if kind == "mlp" else transformer(kind).eval()
    batches = (arrays(6) if kind == "mlp" else texts(9))([3, 4, 1])
    stats = collect("gram", model, batches, tmp_path / "gram.safetensors")
    expected = inputs_of(model, batches)
    tied = {"lm_head"} if kind == "gpt2" else set()
    assert stats.info.layers.keys() == expected.keys() - tied
    assert stats.info.skipped.keys() == tied
    for name, layer in stats.info.layers.items():
        assert_close(stats.read(name), gram(expected[name]))
        assert torch.equal(stats.read(name), stats.read(name).T)
        assert_close(stats.read(name)[-1], expected[name].mean(0))
        assert layer.count == len(expected[name])
        assert layer.inputs == expected[name].shape[1] - 1
        state = model.state_dict()
        assert state[layer.weight].shape[layer.axis] == layer.inputs
        assert (layer.bias is None) == (f"{name}.bias" not in state)
    assert stats.info.examples == 8
    assert load_file(stats.path).keys() == stats.tensors.keys()


def test_layers_of_one_input_are_stored_once(tmp_path: Path) -> None:
    model = transformer("llama")
    stats = collect("gram", model, texts(5)([4]), tmp_path / "gram.safetensors")
    block = "model.layers.1"
    entries = {name.removeprefix(block): x.entry for name, x in stats.info.layers.items() if block in name}
    attention, mlp = f"{block}.self_attn", f"{block}.mlp"
    assert entries == {
        ".self_attn.q_proj": f"{attention}.q_proj",
        ".self_attn.k_proj": f"{attention}.q_proj",
        ".self_attn.v_proj": f"{attention}.q_proj",
        ".self_attn.o_proj": f"{attention}.o_proj",
        ".mlp.gate_proj": f"{mlp}.gate_proj",
        ".mlp.up_proj": f"{mlp}.gate_proj",
        ".mlp.down_proj": f"{mlp}.down_proj",
    }
    assert len(stats.tensors) == 2 * 4 + 1


def test_many_tokens_and_wide_layers_are_multiplied_in_pieces(tmp_path: Path) -> None:
    size, count = 2 * moments.COLUMNS + 3, moments.TOKENS + 5
    model, batches = mlp(size, 3), arrays(size)([count, 2])
    stats = collect("gram", model, batches, tmp_path / "gram.safetensors")
    cross = collect("cross", model, batches, tmp_path / "cross.safetensors", other=mlp(size, 3, seed=1))
    ((name, x),) = inputs_of(model, batches).items()
    assert len(x) == count + 2
    assert_close(stats.read(name), gram(x))
    assert_close(cross.read(name), gram(x))  # both models read the data


def test_batches_change_a_gram_by_rounding_only(tmp_path: Path) -> None:
    model = mlp(6, 9, 3).float()
    one, many = (collect("gram", model, arrays(5, 6)(sizes), tmp_path / f"{len(sizes)}") for sizes in ([60], [1] * 60))
    for name in one.info.layers:
        assert_close(one.read(name), many.read(name).numpy(), rtol=1e-6)


def test_the_error_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Added one by one in float32, these would be off by 7 in a thousand: the sum is rounded to eighths."""
    x = torch.rand(1 << 16, 1, generator=torch.Generator().manual_seed(0)) / 100 + 1
    data = [x] * 20
    stats = collect("gram", nn.Sequential(nn.Linear(1, 1)), data, tmp_path / "gram.safetensors")
    assert stats.read("0")[0, 0] == pytest.approx(float(x.double().square().mean()), rel=3e-7)


class Reused(nn.Module):
    """Calls one layer twice, one never, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.named = nn.Linear(4, 4)
        self.again = self.named

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.twice(input=torch.tanh(self.twice(x))))
        return out


def test_all_calls_of_a_layer_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reused().double()
    (batch,) = arrays(4)([6])
    stats = collect("gram", model, [batch], tmp_path / "gram.safetensors")
    x = batch.args[0]
    with torch.no_grad():
        both = torch.cat([x, torch.tanh(model.twice(x))])
    rows = np.concatenate([both.numpy(), np.ones((12, 1))], axis=1)
    assert_close(stats.read("twice"), gram(rows))
    assert stats.info.layers["twice"].count == 12
    assert stats.info.layers.keys() == {"twice", "named", "again"}
    named, again = (stats.info.layers[name] for name in ("named", "again"))
    assert (again.weight, again.bias, again.entry) == ("again.weight", "again.bias", named.entry)
    assert (named.weight, named.bias, named.count) == ("named.weight", "named.bias", again.count)
    assert stats.info.skipped == {"never": "not called while the model ran on the data"}


class Routed(nn.Module):
    """Sends an example to one of two layers, by its first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.left if x[0, 0] < 0 else self.right)(x)
        return out


def test_a_layer_that_is_called_late_is_not_missed(tmp_path: Path) -> None:
    model, x = Routed(), torch.ones(3, 4)
    stats = collect("gram", model, [-x, -x, 2 * x], tmp_path / "gram.safetensors")
    assert {name: layer.count for name, layer in stats.info.layers.items()} == {"left": 6, "right": 3}
    assert stats.read("right")[0, 0] == 4


class Fickle(nn.Module):
    """Two layers that read one tensor, unless its first entry is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.two(x + 1 if x[0, 0] < 0 else x)
        return out


def test_sharing_that_ends_is_an_error(tmp_path: Path) -> None:
    x = torch.ones(3, 4)
    with pytest.raises(FormatError, match=r"two: read the same inputs.*by themselves \(`layers`\)"):
        collect("gram", Fickle(), [x, -x], tmp_path / "gram.safetensors")
    alone = collect("gram", Fickle(), [x, -x], tmp_path / "two.safetensors", layers=["two"])
    assert alone.info.skipped.keys() == {"one"}


class Changing(nn.Module):
    """Two layers that read one tensor object, changed in place in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        first = self.one(x)
        x.add_(1)
        out: Tensor = first + self.two(x)
        return out


def test_a_tensor_changed_in_place_is_another_input(tmp_path: Path) -> None:
    stats = collect("gram", Changing(), [torch.ones(3, 4)], tmp_path / "gram.safetensors")
    assert stats.read("one")[0, 0] == 1
    assert stats.read("two")[0, 0] == 4


def test_cross_moments_pair_the_tokens_of_two_models(tmp_path: Path) -> None:
    first, second = mlp(6, 9, 4, 3, seed=1), mlp(6, 5, 8, 3, seed=2)
    batches = arrays(5, 6)([3, 1])
    stats = collect("cross", first, batches, tmp_path / "cross.safetensors", other=second)
    one, two = inputs_of(first, batches), inputs_of(second, batches)
    for name, layer in stats.info.layers.items():
        assert_close(stats.read(name), one[name].T @ two[name] / len(one[name]))
        for part, x in (("first", one[name]), ("second", two[name])):
            power = stats.tensors.read(f"power/{part}/{layer.entry}")
            assert_close(power, (x**2).mean(0))
        assert (layer.inputs, layer.count) == (one[name].shape[1] - 1, len(one[name]))
    assert stats.info.models[0] != stats.info.models[1]


def test_cross_moments_of_a_model_with_itself_are_its_grams(tmp_path: Path) -> None:
    model, batches = transformer("llama"), texts(6)([4, 2])
    cross = collect("cross", model, batches, tmp_path / "cross.safetensors", other=model)
    grams = collect("gram", model, batches, tmp_path / "gram.safetensors")
    assert cross.info.layers == grams.info.layers
    for name in grams.info.layers:
        assert_close(cross.read(name), grams.read(name).numpy())


def test_models_with_other_layers_have_no_cross_moments(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"4: only in the second model\n.*\(`layers`\)"):
        collect("cross", mlp(6, 5, 3), arrays(6)([3]), tmp_path / "cross", other=mlp(6, 5, 4, 3))
    stats = collect("cross", mlp(6, 5, 3), arrays(6)([3]), tmp_path / "cross", other=mlp(6, 5, 4, 3), layers=["0", "2"])
    assert stats.info.layers.keys() == {"0", "2"}


class Shortened(nn.Module):
    """Drops the last token before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[:, :-1])
        return out


class Straight(Shortened):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Silent(Shortened):
    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 1 else super().forward(x)


def test_cross_moments_need_as_many_tokens(tmp_path: Path) -> None:
    batches = arrays(5, 6)([3, 1])
    with pytest.raises(PlanError, match="layer: the first model read 15 tokens where the second read 12"):
        collect("cross", Straight(), batches, tmp_path / "cross", other=Shortened())
    with pytest.raises(PlanError, match="layer: the first model read 4 tokens where the second read 0"):
        collect("cross", Shortened(), batches, tmp_path / "cross", other=Silent())


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no linear layer with 'q_proj' in the name; there are 0, 2"):
        collect("gram", mlp(6, 5, 3), arrays(6)([3]), tmp_path / "gram", layers=["0", "q_proj"])
    with pytest.raises(PlanError, match="no linear layer in the model"):
        collect("gram", nn.Sequential(nn.LayerNorm(6)), arrays(6)([3]), tmp_path / "gram")


def test_nan_names_the_layer_and_leaves_no_file(tmp_path: Path) -> None:
    model: Any = mlp(6, 5, 3)
    with torch.no_grad():
        model[0].bias[2] = float("nan")
    with pytest.raises(FormatError, match=r"gram/2: NaN or infinite after 3 examples"):
        collect("gram", model, arrays(6)([3, 3]), tmp_path / "gram")
    assert not (tmp_path / "gram").exists()


class Experts(nn.Module):
    """Sends every token to one of two layers by the sign of its first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = x[:, 0] < 0
        return torch.cat([self.left(x[left]), self.right(x[~left])])


def test_a_layer_that_no_token_reaches_is_not_called(tmp_path: Path) -> None:
    model, x = Experts(), torch.ones(3, 4)
    stats = collect("gram", model, [-x, -x], tmp_path / "one")
    assert stats.info.layers.keys() == {"left"}
    assert stats.info.skipped == {"right": "not called while the model ran on the data"}
    late = collect("gram", model, [-x, 2 * x], tmp_path / "both")
    assert {name: layer.count for name, layer in late.info.layers.items()} == {"left": 3, "right": 3}
    assert late.read("right")[0, 0] == 4


def test_a_shared_bias_belongs_to_no_layer(tmp_path: Path) -> None:
    model = mlp(4, 4, 4, 3)
    model[2].bias = model[0].bias
    stats = collect("gram", model, arrays(4)([3]), tmp_path / "gram")
    assert stats.info.layers.keys() == {"4"}
    assert stats.info.skipped == dict.fromkeys(("0", "2"), "another module uses its bias too (tied weights)")


class Fused(nn.Module):
    """Weights that do not belong to a linear layer: fused ones, a table, a convolution, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(29, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.out = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.conv(self.table(input_ids).mT).mT * self.scale
        out: Tensor = self.out((x @ self.experts.sum(0)).mean(1))
        return out


@pytest.mark.parametrize("kind", ["gram", "cross"])
def test_matrices_that_are_not_covered_are_named(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Fused()
    save_file({f"body.{name}": x for name, x in model.state_dict().items()}, tmp_path / "model.safetensors")
    place: dict[str, Any] = {"checkpoint": tmp_path / "model.safetensors"}
    if kind == "cross":
        place |= {"other": model, "other_checkpoint": tmp_path / "model.safetensors"}
    stats = collect(kind, model, texts(5)([3]), tmp_path / "out", **place)
    assert stats.info.skipped == {"body.experts": "not the weight of a Linear layer"}
