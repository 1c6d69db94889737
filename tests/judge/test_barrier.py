"""Lines between models: losses, accuracies and barriers against independent loops and formulas."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers_text import bert_config, byte_tokenizer, llama_config, save_model, transformers, write_lines
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lfm.arch import Units, find_symmetries, read_table
from mergekit_lfm.artifacts.transform import HeadsElement, Transform, TransformInfo, UnitsElement
from mergekit_lfm.commands.barrier import barrier as command
from mergekit_lfm.commands.show.plots import plot_lines
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.judge.barrier import Interpolation, Point, barrier
from mergekit_lfm.judge.evaluate import accuracy, perplexity
from mergekit_lfm.runtime.batches import as_batches
from mergekit_lfm.runtime.batchnorm import reset_batchnorm
from mergekit_lfm.runtime.data import read_data
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.rewritten import rewrite


class Constant(nn.Module):
    """Two classes; the scores are (0, theta) whatever the input: the loss is a known function of theta."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), self.theta.expand(len(x))], dim=1)


def classifier(seed: int, normed: bool = False) -> Any:
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(7)] if normed else []
    model: Any = nn.Sequential(nn.Linear(5, 7), *norm, nn.ReLU(), nn.Linear(7, 3)).double()
    for name, x in model.named_buffers():
        if not name.endswith("tracked"):
            x.copy_(torch.rand_like(x) + 0.5)
    return model.eval()


def batches(seed: int = 1, sizes: tuple[int, ...] = (6, 4, 9)) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 5, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (sum(sizes),), generator=draw)
    ends = np.cumsum([0, *sizes]).tolist()
    return [(x[a:b], y[a:b]) for a, b in pairwise(ends)]


def mixed(a: dict[str, Tensor], b: dict[str, Tensor], t: float) -> dict[str, Tensor]:
    """(1 - t) a + t b in float64; whole numbers are a's."""
    return {n: (1 - t) * x.double() + t * b[n].double() if x.is_floating_point() else x for n, x in a.items()}


def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean of -log p of the label, and the share of labels that are the most likely, one example at a time."""
    nll, right = [], []
    for x, y in data:
        for row, label in zip(x, y, strict=True):
            with torch.no_grad():
                p = model(row[None])[0].double().exp()
            nll.append(-math.log(p[label] / p.sum()))
            right.append(float(p.argmax() == label))
    return float(np.mean(nll)), float(np.mean(right))


def test_a_convex_loss_has_no_barrier_and_its_values_are_known() -> None:
    ones = [(torch.zeros(4, 1, dtype=torch.float64), torch.ones(4, dtype=torch.long))]
    line = barrier(Constant(-3.0), Constant(5.0), ones, task="classification", points=5)
    thetas = [-3.0, -1.0, 1.0, 3.0, 5.0]
    assert [point.t for point in line.points] == [0, 0.25, 0.5, 0.75, 1]
    assert [point.loss for point in line.points] == pytest.approx([math.log1p(math.exp(-x)) for x in thetas], rel=1e-6)
    assert [point.accuracy for point in line.points] == [0, 0, 1, 1, 1]
    assert line.predictions == 4
    assert line.loss_barrier.height == 0
    # at t = 1/4 the ends alone would be right in a quarter of the cases
    assert (line.accuracy_barrier.height, line.accuracy_barrier.t) == (0.25, 0.25)


def test_barriers_by_hand() -> None:
    made = Interpolation((Point(0, 1.0, 0.8), Point(0.5, 4.0, 0.5), Point(0.75, 3.0, 0.1), Point(1, 2.0, 0.6)), 10)
    assert (made.loss_barrier.height, made.loss_barrier.t) == (2.5, 0.5)
    assert made.accuracy_barrier.height == pytest.approx(0.55)
    assert made.accuracy_barrier.t == 0.75
    broken = Interpolation((Point(0, 1.0, 0.8), Point(0.5, math.nan, 0.0), Point(1, 2.0, 0.6)), 10)
    assert (broken.loss_barrier.height, broken.loss_barrier.t) == (math.inf, 0.5)


@pytest.mark.parametrize("normed", [False, True])
def test_the_line_of_modules_is_that_of_an_independent_loop(normed: bool) -> None:
    one, other, data = classifier(0, normed), classifier(1, normed), batches()
    before = [{name: x.clone() for name, x in model.state_dict().items()} for model in (one, other)]
    seen: list[tuple[int, int]] = []
    line = barrier(one, other, data, task="classification", points=4, progress=lambda a, b: seen.append((a, b)))
    probe = classifier(2, normed)
    for point, t in zip(line.points, (0, 1 / 3, 2 / 3, 1), strict=True):
        probe.load_state_dict(mixed(before[0], before[1], t))
        assert (point.loss, point.accuracy) == pytest.approx(losses(probe, data), rel=1e-6)
    assert line.points[0].accuracy == accuracy(one, data).accuracy
    assert line.points[-1].accuracy == accuracy(other, data).accuracy
    assert seen == [(i, 4) for i in range(1, 5)]
    for model, kept in zip((one, other), before, strict=True):
        assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())


def test_a_model_and_itself() -> None:
    model, data = classifier(0), batches()
    line = barrier(model, model, data, task="classification", points=3)
    assert len({(point.loss, point.accuracy) for point in line.points}) == 1


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_a_reset_equals_torchs_own_estimate(kind: Any) -> None:
    spatial = {nn.BatchNorm2d: (2, 3), nn.BatchNorm3d: (2, 1, 2)}.get(kind, ())
    torch.manual_seed(0)
    ours = nn.Sequential(kind(4), nn.Tanh(), kind(4)).eval()
    theirs = nn.Sequential(*(type(m)(4) if isinstance(m, kind) else nn.Tanh() for m in ours))
    inputs = [torch.randn(n, 4, *spatial) * 3 + 1 for n in (5, 8, 3)]
    reset_batchnorm(ours, as_batches(inputs))
    if kind is nn.SyncBatchNorm:  # torch runs these on other devices only, unless they are not in training mode
        theirs = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4))
    torch.optim.swa_utils.update_bn(inputs, theirs)
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], x, msg=name)
    assert [m.momentum for m in ours if isinstance(m, kind)] == [0.1, 0.1]
    assert not any(m.training for m in ours)


def test_a_line_with_batchnorm_reset_is_that_of_an_independent_loop() -> None:
    one, other, data = classifier(0, True), classifier(1, True), batches()
    before = [{name: x.clone() for name, x in model.state_dict().items()} for model in (one, other)]
    fresh = batches(5)
    line = barrier(one, other, data, task="classification", points=3, reset_batchnorm=fresh)
    probe = classifier(2, True)
    probe.load_state_dict(mixed(before[0], before[1], 0.5))
    torch.optim.swa_utils.update_bn([x for x, _ in fresh], probe)
    assert (line.points[1].loss, line.points[1].accuracy) == pytest.approx(losses(probe.eval(), data), rel=1e-6)
    for point, kept in ((line.points[0], before[0]), (line.points[2], before[1])):
        probe.load_state_dict(kept)
        assert point.loss == pytest.approx(losses(probe, data)[0], rel=1e-6)
    assert all(torch.equal(x, before[0][name]) for name, x in one.state_dict().items())


# ------------------------------------------------------------------ models in folders


def pair(folder: Path, kind: str, config: Any) -> tuple[Path, Path]:
    """Two models that differ in all their tensors, also in gains and biases."""
    paths = []
    for i, name in enumerate("ab"):
        path = save_model(folder / name, kind, config, byte_tokenizer(special=kind.startswith("Bert")))
        draw = torch.Generator().manual_seed(i)
        old = load_file(path / "model.safetensors")
        new = {n: x + 0.3 * torch.randn(x.shape, generator=draw) for n, x in sorted(old.items())}
        save_file(new, path / "model.safetensors", {"format": "pt"})
        paths.append(path)
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(tmp_path_factory.mktemp("llamas"), "LlamaForCausalLM", llama_config())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents, one longer than the models' window of 32 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    return write_lines(folder / "x.jsonl", {"text": "A long text, of more than one window: " * 3}, {"text": "short"})


def midpoint(folders: tuple[Path, Path], out: Path, t: float = 0.5) -> Path:
    """A folder with (1 - t) a + t b, made from the files."""
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    tensors = mixed(first, second, t)
    out.mkdir()
    for file in folders[0].iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    save_file({n: x.float().contiguous() for n, x in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def test_losses_of_language_models_are_the_logarithms_of_their_perplexities(
    llamas: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    for window in (None, 7):
        line = barrier(*llamas, texts, task="lm", points=3, window=window, batch_size=2)
        judged = [perplexity(path, documents, window=window) for path in llamas]
        between = midpoint(llamas, tmp_path / f"mid{window}")
        judged.insert(1, perplexity(between, documents, window=window))
        assert [point.loss for point in line.points] == pytest.approx([x.nll / x.tokens for x in judged], rel=1e-5)
        assert line.predictions == judged[0].tokens


def test_accuracy_of_language_models_is_that_of_the_next_token(llamas: tuple[Path, Path], tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 258, (6, 9), generator=draw)
    with torch.no_grad():  # so that some are right
        model = transformers.LlamaForCausalLM.from_pretrained(midpoint(llamas, tmp_path / "mid"))
        ids[:3, 8] = model(ids[:3]).logits[:, 7].argmax(-1)
        log_p = model(ids).logits.double().log_softmax(-1)
    nll = [-float(log_p[i, j, ids[i, j + 1]]) for i in range(6) for j in range(8)]
    right = [bool(log_p[i, j].argmax() == ids[i, j + 1]) for i in range(6) for j in range(8)]
    np.savez(tmp_path / "x.npz", input_ids=ids.numpy())
    for data in ([{"input_ids": ids[:4]}, {"input_ids": ids[4:]}], tmp_path / "x.npz"):
        point = barrier(*llamas, data, task="lm", points=3).points[1]
        assert point.loss == pytest.approx(np.mean(nll), rel=1e-5)
        assert point.accuracy == np.mean(right) > 0


def test_a_line_of_classifiers(tmp_path: Path) -> None:
    folders = pair(tmp_path, "BertForSequenceClassification", bert_config(num_labels=3))
    data = write_lines(tmp_path / "x.jsonl", *({"text": "abcdefgh"[: 1 + i % 5], "label": i % 3} for i in range(11)))
    line = barrier(*folders, data, task="classification", points=3, batch_size=3)
    for path, point in zip((folders[0], midpoint(folders, tmp_path / "mid"), folders[1]), line.points, strict=True):
        loaded = load_model(path, "classification")
        nll, count = 0.0, 0
        for batch in read_data(data, "classification", loaded.tokenizer):
            with torch.no_grad():
                output = loaded.model(**batch.kwargs, labels=batch.labels)
            nll, count = nll + float(output.loss) * len(batch), count + len(batch)
        assert point.loss == pytest.approx(nll / count, rel=1e-5)
        assert point.accuracy == accuracy(path, data).accuracy


# ------------------------------------------------------------------ with a transform


def planted(path: Path) -> Transform:
    """Permutations, factors and a rotation, of random numbers, for a Llama of helpers_text."""
    symmetries = find_symmetries(open_checkpoint(path))
    draw = torch.Generator().manual_seed(7)
    signs = (torch.randint(2, (16,), generator=draw) * 2 - 1).double()
    elements: dict[str, Any] = {"residual": UnitsElement(order=torch.randperm(16, generator=draw), scale=signs)}
    for layer in range(2):
        elements[f"ffn.{layer}"] = UnitsElement(order=torch.randperm(24, generator=draw))
        elements[f"heads.{layer}"] = HeadsElement(queries=torch.tensor([[1, 0]]))
    return Transform(symmetries, elements, TransformInfo("planted", models=(open_checkpoint(path).content,)))


def test_with_a_transform_the_second_end_is_the_same_function_and_the_middle_is_not(
    llamas: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    transform = planted(llamas[1])
    transform.save(tmp_path / "t.safetensors")
    naive = barrier(*llamas, texts, task="lm", points=3)
    by_file = barrier(*llamas, texts, task="lm", points=3, transform=tmp_path / "t.safetensors")
    given = [load_model(path, "lm") for path in llamas]
    by_value = barrier(given[0], given[1], texts, task="lm", points=3, transform=transform)
    assert by_file == by_value
    assert by_file.points[0] == naive.points[0]
    assert by_file.points[2].loss == pytest.approx(naive.points[2].loss, rel=1e-5)
    assert abs(by_file.points[1].loss - naive.points[1].loss) > 1e-2
    rewritten = rewrite(load_file(llamas[1] / "model.safetensors"), transform)
    folder = midpoint((llamas[1], llamas[1]), tmp_path / "rewritten")
    save_file(rewritten, folder / "model.safetensors", {"format": "pt"})
    again = barrier(llamas[0], folder, texts, task="lm", points=3)
    assert [p.loss for p in again.points] == pytest.approx([p.loss for p in by_file.points], rel=1e-6)


def test_a_transform_that_undoes_a_permutation_leaves_a_level_line() -> None:
    """For modules: b is a with its hidden units in another order."""
    one, data, order = classifier(0), batches(), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    other = classifier(0)
    with torch.no_grad():
        other[0].weight.copy_(one[0].weight[order])
        other[0].bias.copy_(one[0].bias[order])
        other[2].weight.copy_(one[2].weight[:, order])
    groups = {"hidden": Units(7)}
    table = "0.weight hidden input\n0.bias hidden\n2.weight class hidden'\n2.bias class"
    symmetries = read_table(table, groups, one.state_dict())
    back = Transform(symmetries, {"hidden": UnitsElement(order=order.argsort())}, TransformInfo("undo"))
    naive = barrier(one, other, data, task="classification", points=3).points
    assert naive[2].loss == pytest.approx(naive[0].loss)
    assert abs(naive[1].loss - naive[0].loss) > 1e-2
    line = barrier(one, other, data, task="classification", transform=back)
    assert {point.loss for point in line.points} == {line.points[0].loss}


def test_a_transform_to_another_width_gives_the_second_the_first_ones_shapes() -> None:
    one, data = classifier(0), batches()
    torch.manual_seed(4)
    wide: Any = nn.Sequential(nn.Linear(5, 14), nn.ReLU(), nn.Linear(14, 3)).double()
    with torch.no_grad():  # every unit of the first, twice, at half the strength
        wide[0].weight.copy_(one[0].weight.repeat_interleave(2, 0))
        wide[0].bias.copy_(one[0].bias.repeat_interleave(2, 0))
        wide[2].weight.copy_(one[2].weight.repeat_interleave(2, 1) / 2)
        wide[2].bias.copy_(one[2].bias)
    table = "0.weight hidden input\n0.bias hidden\n2.weight class hidden'\n2.bias class"
    symmetries = read_table(table, {"hidden": Units(14)}, wide.state_dict())
    mean = torch.eye(7, dtype=torch.float64).repeat_interleave(2, 1) / 2
    joined = Transform(symmetries, {"hidden": UnitsElement(matrix=mean, dual=mean * 2)}, TransformInfo("ot", False))
    line = barrier(one, wide, data, task="classification", points=3, transform=joined)
    assert [p.loss for p in line.points] == pytest.approx([line.points[0].loss] * 3, rel=1e-9)


# ------------------------------------------------------------------ refusals


def test_models_without_a_line_between_them() -> None:
    other = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 3)).double()
    with pytest.raises(PlanError) as refused:
        barrier(classifier(0), other, batches(), task="classification")
    message = str(refused.value)
    assert "0.weight is [7, 5] in the first, [6, 5] in the second" in message
    assert "3.weight is only in the second" in message and "one architecture" in message


def test_models_whose_configs_make_other_functions_of_the_same_tensors(
    llamas: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    other = midpoint(llamas, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 10.0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"compare their config\.json"):
        barrier(llamas[0], other, texts, task="lm")


def test_models_with_different_tokens(llamas: tuple[Path, Path], texts: Path, tmp_path: Path) -> None:
    other = midpoint(llamas, tmp_path / "other")
    text = (other / "tokenizer.json").read_text().replace('"a"', '"@@"', 1)
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(PlanError, match="different tokens in their tokenizers"):
        barrier(llamas[0], other, texts, task="lm")


def test_a_transform_of_another_model(llamas: tuple[Path, Path], texts: Path) -> None:
    with pytest.raises(PlanError, match="rewrites another model"):
        barrier(*llamas, texts, task="lm", transform=planted(llamas[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "embedding"}, "the task 'embedding' has no barrier"),
        ({"points": 2}, "points is 2; expected at least 3"),
        ({"data": [torch.zeros(2, 5, dtype=torch.float64)]}, "the data have no labels"),
        ({"data": [(torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 3]))]}, "classes from 0 to 3"),
        ({"reset_batchnorm": batches()}, "has no BatchNorm layer"),
        ({"task": "lm"}, "not token sequences"),
        ({"task": "lm", "data": [torch.zeros(2, 1, dtype=torch.long)]}, "nothing to predict"),
        ({"task": "lm", "data": "x.txt"}, "a module has no tokenizer"),
    ],
)
def test_models_that_cannot_be_judged(change: dict[str, Any], message: str) -> None:
    given = {"data": batches(), "task": "classification"} | change
    with pytest.raises(PlanError, match=message):
        barrier(classifier(0), classifier(1), **given)


def test_a_failure_between_the_ends_leaves_the_model_as_it_was() -> None:
    one, kept = classifier(0), classifier(0).state_dict()

    def fail_at_three(done: int, _: int) -> None:
        1 // (3 - done)

    with pytest.raises(ZeroDivisionError):
        barrier(one, classifier(1), batches(), task="classification", progress=fail_at_three)
    assert all(torch.equal(x, kept[name]) for name, x in one.state_dict().items())


# ------------------------------------------------------------------ the command and the plot


def test_the_command_prints_the_line(llamas: tuple[Path, Path], texts: Path, tmp_path: Path) -> None:
    line = barrier(*llamas, texts, task="lm", points=3)
    options = [*map(str, llamas), "--data", str(texts), "--task", "lm", "--points", "3"]
    result = CliRunner(catch_exceptions=False).invoke(command, [*options, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert [point["loss"] for point in found["points"]] == [point.loss for point in line.points]
    assert found["loss"] == {"barrier": line.loss_barrier.height, "t": line.loss_barrier.t}
    pytest.importorskip("matplotlib")
    table = CliRunner(catch_exceptions=False).invoke(command, [*options, "--plot", str(tmp_path / "x.png")]).stdout
    assert [row.split() for row in table.splitlines()[:2]] == [
        ["t", "loss", "accuracy"],
        ["0", f"{line.points[0].loss:.4f}", f"{line.points[0].accuracy:.4f}"],
    ]
    assert f"barrier of the loss: {line.loss_barrier.height:.4f}" in table
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    by_text = [*options[:2], "--text", str(texts), "--points", "3", "--json"]
    again = json.loads(CliRunner().invoke(command, by_text).stdout)
    assert all(again[name] == found[name] for name in found if name not in ("seconds", "peak_memory"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --text FILE, or --data FILE with --task"),
        (["--data", "x"], "Give --task with --data"),
        (["--text", "x", "--task", "classification"], "--text is for language models"),
        (["--text", "x", "--plot", "x.pdf"], "ends with .png"),
        (["--text", "x"], "no config.json"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(command, [str(tmp_path / "a"), str(tmp_path / "b"), *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    line = Interpolation((Point(0, 1.0, 0.5), Point(1, 1.0, 0.5)), 1)
    with pytest.raises(PlanError, match=r"pip install \"mergekit_lfm\[plots\]\""):
        plot_lines({"one": line}, tmp_path / "x.png")


def test_a_plot_of_several_lines_is_the_same_again_and_accepts_nan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = {
        "naive": Interpolation((Point(0, 1.0, 0.8), Point(0.5, math.nan, 0.1), Point(1, 1.2, 0.7)), 1),
        "aligned": Interpolation((Point(0, 1.0, 0.8), Point(0.5, 1.3, 0.7), Point(1, 1.2, 0.7)), 1),
    }
    for name in ("x", "y"):
        plot_lines(lines, tmp_path / f"{name}.png", ends=("first", "second"))
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    with pytest.raises(PlanError, match="found no lines to draw"):
        plot_lines({}, tmp_path / "z.png")


def test_a_folder_that_is_not_a_model(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FormatError, match=r"config\.json"):
        barrier(tmp_path / "a", tmp_path / "a", texts, task="lm")
