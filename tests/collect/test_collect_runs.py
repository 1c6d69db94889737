"""Runs of collect: passes within a memory, interruptions, what is refused, and models left as they were."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_collect import Tied, arrays, mlp, texts, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.collect.moments import GramStatistic
from mergekit_lfm.collect.passes import run_passes
from mergekit_lfm.collect.request import Collector, StatisticsRequest
from mergekit_lfm.collect.run import collect
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.pauses import Pauses, delay_interrupts
from mergekit_lfm.machine.resources import default_memory
from mergekit_lfm.methods.kinds import StatisticMethod
from mergekit_lfm.runtime.subject import make_subject

SIZES = [3, 4, 1]
HELPER = Path(__file__).parents[1] / "helpers_collect.py"


@pytest.mark.parametrize("kind", ["gram", "cross", "fisher"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_memory_changes_no_byte(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, data = transformer("llama").to(dtype), texts(6)(SIZES)
    other: dict[str, Any] = {"other": transformer("llama", seed=8).to(dtype)} if kind == "cross" else {}
    found, told = [], []
    for memory in (None, 12_000, 5_500):
        out = tmp_path / str(memory)
        seen: list[tuple[int, int]] = []
        collect(
            kind, model, data, out, task="lm", memory=memory, progress=lambda *x, seen=seen: seen.append(x), **other
        )
        found.append(out.read_bytes())
        told.append(seen)
    assert found[0] == found[1] == found[2]
    assert told[0] == [(3, 8), (7, 8), (8, 8)]
    assert len(told[1]) > 3
    assert len(told[2]) > len(told[1])
    examples = told[2][-1][1]
    assert told[2][-1] == (examples, examples)
    assert [done for done, _ in told[2]] == sorted({done for done, _ in told[2]})


def test_a_layer_larger_than_the_memory_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"memory of 200 B, expected room .*\n  0: 392 B\n  2: 512 B\n.*more memory"):
        collect("gram", mlp(6, 7, 3), arrays(6)(SIZES), tmp_path / "gram", memory=200)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "step"),
    [("gram", 11), *(pytest.param(kind, 3, marks=pytest.mark.slow) for kind in ("gram", "cross", "fisher"))],
)
def test_a_killed_run_goes_on_to_the_same_bytes(kind: str, step: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(HELPER.parents[1])}
    command = [sys.executable, str(HELPER), kind, str(tmp_path), str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["calls"] > 50
    assert report["wrong"] == []


def interrupting(at: int, seen: list[int]) -> Callable[[int, int], None]:
    """Records progress, and presses Ctrl-C when so many examples are done."""

    def tell(done: int, _total: int) -> None:
        seen.append(done)
        if done == at:
            os.kill(os.getpid(), signal.SIGINT)

    return tell


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[nn.Module, list[Any], Path]:
    """A model, data, and the folder of a run that was interrupted after 7 of 8 examples."""
    model, data, out = mlp(6, 7, 3), arrays(6)(SIZES), tmp_path / "gram"
    with pytest.raises(KeyboardInterrupt):
        collect("gram", model, data, out, progress=interrupting(7, []))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not out.exists()
    return model, data, out


def test_an_interrupted_run_goes_on_where_it_was(interrupted: tuple[nn.Module, list[Any], Path]) -> None:
    model, data, out = interrupted
    seen: list[int] = []
    collect("gram", model, data, out, progress=interrupting(-1, seen))
    assert seen == [8]
    collect("gram", model, data, out.with_name("whole"))
    assert out.read_bytes() == out.with_name("whole").read_bytes()
    assert {path.name for path in out.parent.iterdir()} == {"gram", "whole"}


@pytest.mark.parametrize("changed", ["data", "model", "layers", "resume"])
def test_other_work_starts_over(interrupted: tuple[nn.Module, list[Any], Path], changed: str) -> None:
    model, data, out = interrupted
    options: dict[str, Any] = {}
    if changed == "data":
        data = arrays(6, seed=9)(SIZES)
    if changed == "model":
        model = mlp(6, 7, 3, seed=2)
    if changed == "layers":
        options = {"layers": ["0"]}
    if changed == "resume":
        options = {"resume": False}
    seen: list[int] = []
    collect("gram", model, data, out, progress=interrupting(-1, seen), **options)
    assert seen == [3, 7, 8]
    options.pop("resume", None)
    collect("gram", model, data, out.with_name("fresh"), **options)
    assert out.read_bytes() == out.with_name("fresh").read_bytes()


def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), delay_interrupts() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("every_s", "expected"), [(30, []), (0, [1, 2, 3])])
def test_sums_are_kept_from_time_to_time(every_s: float, expected: list[int]) -> None:
    pauses = Pauses(every_s=every_s, saving_share=inf, clock=lambda: 7.0)
    kept: list[int] = []
    partial: Any = SimpleNamespace(
        load_sums=lambda _: 0,
        save_sums=lambda _, batches: kept.append(batches),
        write=lambda *_: None,
    )
    subject = make_subject(mlp(6, 7, 3))
    request = StatisticsRequest((subject,), arrays(6)(SIZES), "classification", (), default_memory())
    statistic = GramStatistic(request)
    run_passes(statistic, request, [list(statistic.units)], partial, pauses, lambda *_: None)
    assert kept == expected


def test_slow_saves_are_further_apart() -> None:
    now = 7.0
    pauses = Pauses(every_s=0, saving_share=0.5, clock=lambda: now)
    assert pauses.due
    with pauses.taken():
        now = 9.0
    assert not pauses.due  # for as long as the save took, and as long again
    now = 12.9
    assert not pauses.due
    now = 13.0
    assert pauses.due


def test_existing_statistics_are_not_made_again(tmp_path: Path) -> None:
    model, data, out = mlp(6, 7, 3), arrays(6)(SIZES), tmp_path / "sub" / "gram.safetensors"
    first = collect("gram", model, data, out)
    (tmp_path / "sub" / "gram.safetensors.partial").mkdir()
    seen: list[int] = []
    again = collect("gram", model, data, out, progress=interrupting(-1, seen))
    assert seen == []
    assert again.info == first.info == open_statistics(out).info
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_another_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model, data, out = mlp(6, 7, 3), arrays(6)(SIZES), tmp_path / "gram"
    collect("gram", model, data, out)
    with pytest.raises(PlanError, match=r"gram exists and differs: kind, options; .*overwrite"):
        collect("fisher", model, data, out)
    with pytest.raises(PlanError, match=r"gram exists and differs: models, data"):
        collect("gram", mlp(6, 7, 3, seed=4), data[:2], out)
    assert collect("fisher", model, data, out, overwrite=True).info.kind == "fisher"
    out.write_bytes(b"notes")
    with pytest.raises(PlanError, match="gram exists and differs: it is not a complete statistics file"):
        collect("gram", model, data, out)
    assert out.read_bytes() == b"notes"


def test_a_run_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "gram.partial").mkdir()
    fd = os.open(tmp_path / "gram.partial", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(PlanError, match="another run is writing"):
        collect("gram", mlp(6, 7, 3), arrays(6)(SIZES), tmp_path / "gram")
    os.close(fd)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "gram.partial").mkdir()
    (tmp_path / "gram.partial" / "notes").write_text("mine")
    with pytest.raises(PlanError, match=r"gram\.partial exists and is not an unfinished statistics file; move it away"):
        collect("gram", mlp(6, 7, 3), arrays(6)(SIZES), tmp_path / "gram")


def test_outputs_that_would_harm_inputs_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    transformer("llama").save_pretrained(folder)  # type: ignore[operator]
    data = texts(6)([2])
    with pytest.raises(PlanError, match=r"lies in the input .*llama, which is only read"):
        collect("gram", folder, data, folder / "gram.safetensors", task="lm")
    with pytest.raises(PlanError, match="is a folder, expected the name of a file"):
        collect("gram", folder, data, tmp_path, task="lm")
    model = mlp(6, 3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match=r"lies in the input .*model\.safetensors"):
        collect(
            "gram",
            model,
            arrays(6)([2]),
            tmp_path / "model.safetensors",
            checkpoint=tmp_path / "model.safetensors",
            overwrite=True,
        )
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hessian", {}, "found the kind 'hessian', expected one of cross, fisher, gram"),
        ("cross", {}, "cross takes two models"),
        ("gram", {"other": nn.Linear(6, 3)}, "gram takes one model"),
        ("fisher", {"samples": 0}, "stats.samples: found 0, expected a whole number of at least 1"),
        ("gram", {"seed": 1}, "stats.seed: gram has no such parameter"),
        ("fisher", {"seed": -1}, "stats.seed: found -1, expected a whole number of at least 0"),
        ("fisher", {"seed": 2**64}, "stats.seed: found 18446744073709551616, expected .* at most 18446744073709551615"),
        ("gram", {"task": "vision"}, "found the task 'vision', expected one of lm, classification, embedding"),
        ("gram", {"window": 5}, "window and max_examples are for data files"),
        ("gram", {"memory": "much"}, "found 'much', expected a size"),
    ],
)
def test_impossible_requests_are_refused(kind: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        collect(kind, mlp(6, 3), arrays(6)([3]), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="ReLU has no parameters"):
        collect("gram", nn.ReLU(), arrays(6)([3]), tmp_path / "out")


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"0\.weight, 0\.bias, .* and 1 more of Sequential: on the meta device"):
        collect("gram", mlp(6, 5, 4, 3).to("meta"), arrays(6)([3]), tmp_path / "out")


def test_texts_need_one_vocabulary_for_both_models(tmp_path: Path) -> None:
    import transformers
    from helpers_text import bert_config, byte_tokenizer

    def folder(name: str, *more: str) -> Path:
        transformers.BertForSequenceClassification(bert_config()).save_pretrained(tmp_path / name)
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(list(more))
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    one, same, other = folder("one"), folder("same"), folder("other", "zzz")
    (tmp_path / "data.txt").write_text("abc\n")
    with pytest.raises(PlanError, match=r"one and .*other have different tokens.*one vocabulary"):
        collect("cross", one, tmp_path / "data.txt", tmp_path / "out", other=other)
    assert collect("cross", one, tmp_path / "data.txt", tmp_path / "out", other=same).info.examples == 1


def test_a_full_disk_shows_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_lfm.collect.run.free_space", lambda _: 1000)
    with pytest.raises(PlanError, match=r"has 1\.00 KB free, expected .* for the file"):
        collect("gram", mlp(6, 7, 3), arrays(6)(SIZES), tmp_path / "gram")


@pytest.mark.parametrize("kind", ["gram", "fisher"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(kind: Any, broken: bool, tmp_path: Path) -> None:
    model = Tied()
    model.train()
    model.norm.eval()
    model.block.bias.requires_grad_(False)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    if broken:
        with torch.no_grad():
            model.block.weight[0, 0] = float("inf")

    def state() -> tuple[Any, ...]:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return [m.training for m in model.modules()], hooks, flags, torch.is_grad_enabled()

    before, weights = state(), {name: x.clone() for name, x in model.state_dict().items()}
    try:
        with torch.no_grad():
            collect(kind, model, texts(6)(SIZES), tmp_path / "out", task="lm")
        assert not broken
    except FormatError as error:
        assert broken and "NaN or infinite after 3 examples" in str(error)
    assert state() == before
    assert model.embed.weight.grad is not None and bool((model.embed.weight.grad == 1).all())
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_dropout_is_off(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).train()
    stats = collect("gram", model, [torch.ones(4, 6)], tmp_path / "gram")
    assert torch.equal(stats.read("1"), torch.ones(7, 7))


class Means:
    """A statistic that a user might add: the mean of the first input."""

    def __init__(self, request: StatisticsRequest) -> None:
        self.units: dict[str, dict[str, tuple[int, ...]]] = {"x": {"gram/x": (6,)}}
        self.skipped: dict[str, str] = {}
        self.examples = request.examples

    def add(self, batch: Any, sums: Any) -> None:
        sums["gram/x"] += batch.args[0].sum(0)

    def finish(self, unit: str, sums: Any) -> tuple[dict[str, Tensor], int]:
        return {f"gram/{unit}": sums["gram/x"] / self.examples}, self.examples

    def layers(self, counts: Any) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def norm(self, squares: float) -> None:  # noqa: ARG002
        return None


def test_a_statistic_is_a_declaration_and_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means: Collector = StatisticMethod("gram", "-", "the mean of the inputs", "-", (), Means)
    monkeypatch.setattr("mergekit_lfm.collect.run.STATISTIC_METHODS", {"gram": means})
    data = arrays(6)(SIZES)
    stats = collect("gram", mlp(6, 3), data, tmp_path / "out")
    expected = torch.cat([batch.args[0] for batch in data]).mean(0)
    torch.testing.assert_close(stats.tensors.read("gram/x"), expected.float())


def test_data_and_models_from_files(tmp_path: Path) -> None:
    import numpy as np

    folder = tmp_path / "bert"
    transformer("bert").float().save_pretrained(folder)  # type: ignore[operator]
    ids = np.random.default_rng(0).integers(0, 29, (7, 5))
    np.savez(tmp_path / "data.npz", input_ids=ids, labels=np.arange(7) % 3)
    stats = collect(
        "fisher", folder, tmp_path / "data.npz", tmp_path / "a", labels="true", batch_size=3, max_examples=5
    )
    assert stats.info.examples == 5
    assert stats.info.options == {
        "task": "classification",
        "layers": [],
        "dtype": ["float32"],
        "labels": "true",
    }
    batch = {"input_ids": torch.from_numpy(ids[:5]), "labels": torch.arange(5) % 3}
    model = transformer("bert").float()
    same = collect("fisher", model, [batch], tmp_path / "b", labels="true", checkpoint=folder)
    assert same.info.models == stats.info.models
    for name in stats.tensors:
        torch.testing.assert_close(stats.tensors.read(name), same.tensors.read(name), rtol=1e-3, atol=1e-7)


def test_default_memory_is_used(tmp_path: Path) -> None:
    assert default_memory() > 10_000
    seen: list[tuple[int, int]] = []
    collect("gram", mlp(6, 3), arrays(6)([3]), tmp_path / "a", progress=lambda *x: seen.append(x))
    assert seen == [(3, 3)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The promise of equal bytes holds for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
