"""Edits, scores and traces of models on a GPU equal the CPU's. On a pretended GPU, and on a real one if present."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_commands import run
from helpers_device import GPU, HEAVY, on_cpu, pretended_gpu
from helpers_editing import random_covariance, tiny_model, trained_tokenizer

from mergekit_lfm.api import prepare as stages
from mergekit_lfm.artifacts import cache as kept
from mergekit_lfm.artifacts.patch import Patch
from mergekit_lfm.edit.scores import score_facts
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.edit.trace import trace
from mergekit_lfm.edit.work import EditWork
from mergekit_lfm.errors import PlanError
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe
from mergekit_lfm.runtime import load as runtime
from mergekit_lfm.views.maps import CPU

FACTS = [
    {"prompt": "{} was born in the city of", "subject": "Ada Blake", "target_new": "Rome", "target_true": "Paris"},
    {"prompt": "{} speaks", "subject": "Mia Stone", "target_new": "glass blower"},
    {"prompt": "It is said that the job of {} is that of a", "subject": "Zoë Müller", "target_new": "baker"},
]
STATISTICS = {layer: random_covariance(48, layer) for layer in (1, 2)}
NAMES = ("gpt2", "llama", "gpt-neo", "gpt-j")
REAL = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SAME = 1e-12  # relative: attention is computed in other steps there, in float64
# With sums in reverse deltas differ by 4e-15, those of GPT-Neo by 2e-6: transformers computes its attention in float32,
# as it does Llama's norms and GPT-J's positions, which other kernels may round otherwise.
CLOSE = {"gpt2": 1e-9, "llama": 1e-4, "gpt-neo": 1e-4, "gpt-j": 1e-4}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes solves follow a model to the pretended GPU, and "cuda" its name."""
    monkeypatch.setattr(EditWork, "device", property(lambda work: work.subject.device))
    for module in (runtime, kept):
        monkeypatch.setattr(module, "find_device", {"cpu": CPU, "cuda": GPU}.__getitem__)


def edited(name: str, method: str, device: torch.device = CPU, **changes: Any) -> Patch:
    """An edit of a tiny model on a device, with statistics on the CPU."""
    layers = [1] if method == "rome" else [1, 2]
    given = {"layers": layers, "steps": 3, "covariance": {layer: STATISTICS[layer] for layer in layers}, **changes}
    return edit(tiny_model(name).to(device), trained_tokenizer(), FACTS, method=method, **given)


@cache
def on_the_cpu(name: str, method: str) -> Patch:
    """The same edit on the CPU, with which the others are compared."""
    return edited(name, method)


def gap(found: Patch, expected: Patch) -> float:
    """The largest relative difference of the changes of a tensor; their factors are on the CPU."""
    assert found.info.tensors == expected.info.tensors
    assert on_cpu(*found.tensors.values())
    changes = [(found.change(name), expected.change(name)) for name in expected.info.tensors]
    return max(float((x - y).norm() / y.norm()) for x, y in changes)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_solves_as_the_cpu_does(name: str, method: str) -> None:
    expected = on_the_cpu(name, method)
    with pretended_gpu() as gpu:
        found = edited(name, method, GPU)
    assert gap(found, expected) <= SAME
    assert found.info.options == {**expected.info.options, "device": GPU.type}
    assert gpu.there["linalg_cholesky_ex"] == gpu.there["cholesky_solve"] == (3 if method == "rome" else 2)
    assert not HEAVY & set(gpu.here)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("name", NAMES)
def test_other_rounding_changes_little(name: str, method: str) -> None:
    with pretended_gpu(backwards=True):
        found = edited(name, method, GPU)
    assert gap(found, on_the_cpu(name, method)) <= CLOSE[name]


@REAL
@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("name", NAMES)
def test_a_real_gpu_agrees_within_rounding(name: str, method: str) -> None:
    found = edited(name, method, torch.device("cuda"))
    assert gap(found, on_the_cpu(name, method)) <= CLOSE[name]
    assert found.info.options["device"] == "cuda"


@pytest.mark.usefixtures("pretended")
def test_statistics_may_lie_on_a_gpu() -> None:
    expected = on_the_cpu("gpt2", "rome")
    with pretended_gpu():
        moments = {1: STATISTICS[1].to(GPU)}
        assert gap(edited("gpt2", "rome", GPU, covariance=moments), expected) <= SAME
        assert gap(edited("gpt2", "rome", covariance=moments), expected) == 0


@pytest.mark.usefixtures("pretended")
def test_requests_refused_on_the_cpu_are_refused_on_a_gpu() -> None:
    with pretended_gpu(), pytest.raises(PlanError, match="one batch has several facts about one subject"):
        twice = [*FACTS, {**FACTS[0], "prompt": "{} is of"}]
        edit(tiny_model("gpt2").to(GPU), trained_tokenizer(), twice, layers=[1], covariance="identity")
    with pretended_gpu(), pytest.raises(PlanError, match="the second moments of layer 1 are singular"):
        edited("gpt2", "rome", GPU, covariance={1: torch.zeros(48, 48)}, ridge=0.0)


def asked(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> list[float]:
    """The scores of facts by a model on a device, and the effects of restoring its states."""
    model, tokenizer = tiny_model(name, dtype).to(device), trained_tokenizer()
    scores = score_facts(model, tokenizer, FACTS, batch=2)
    traced = trace(model, tokenizer, FACTS[:1], window=2, batch=25)
    effects = [x for kind in traced.effects.values() for row in kind.values() for x in row if x is not None]
    return [*(row.p_new for row in scores.rows), traced.clean, traced.corrupted, *effects]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in NAMES]
)
def test_scores_and_traces_are_those_of_the_cpu(name: str) -> None:
    with pretended_gpu():
        assert asked(name, GPU) == pytest.approx(asked(name, CPU), rel=1e-9, abs=SAME)
        if name == NAMES[0]:
            asked(name, GPU, torch.bfloat16)


@REAL
@pytest.mark.parametrize("name", NAMES)
def test_scores_and_traces_of_a_real_gpu(name: str) -> None:
    assert asked(name, torch.device("cuda")) == pytest.approx(asked(name, CPU), rel=1e-4, abs=1e-6)


def test_the_commands_have_a_device() -> None:
    for command in ("edit", "trace"):
        help_text = " ".join(run(command, "--help").stdout.split())
        assert "Where the model runs: cpu, cuda, cuda:1, or auto for a GPU if there is one. [default: cpu]" in help_text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, m, with a facts file."""
    tiny_model("gpt2", torch.float32).save_pretrained(tmp_path / "m")
    trained_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({"facts": FACTS[:1]}), encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices of the models that are edited, one after another."""
    seen: list[torch.device] = []

    def solved(loaded: runtime.Loaded, *given: Any, **options: Any) -> Patch:
        seen.append(next(loaded.model.parameters()).device)
        return edit(loaded, *given, **options)

    monkeypatch.setattr(stages, "edit", solved)
    monkeypatch.setattr(stages, "find_gpu", lambda _: None)  # merges have threads, which do not know the pretended GPU
    yield seen


def recipe(folder: Path, *, of_the_result: bool) -> Plan:
    facts = str(folder / "facts.yaml")
    asked = [{"facts": facts, "method": "rome", "layers": [1], "steps": 3, "covariance": "identity"}]
    model: dict[str, Any] = {"model": str(folder / "m")}
    models, rest = ([model], {"edits": asked}) if of_the_result else ([{**model, "edits": asked}], {})
    return make_plan(Recipe.parse({"merge_method": "passthrough", "models": models, **rest}))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("of_the_result", [False, True])
def test_a_recipe_is_edited_on_the_device(folder: Path, devices: list[torch.device], of_the_result: bool) -> None:
    plan, out = recipe(folder, of_the_result=of_the_result), folder / "out"
    name = "transformer.h.1.mlp.c_proj.weight"
    with pretended_gpu():
        after = {device: stages.prepare(plan, out, device=device) for device in ("cpu", "cuda")}
        for device in ("cpu", "cuda"):
            stages.prepare(plan, out, device=device)  # found in the cache
    assert devices == [CPU, GPU]
    assert not any(held.unedited for held in after.values())
    assert after["cpu"].digest == plan.digest != after["cuda"].digest == stages.note_device(plan, "cuda").digest
    if not of_the_result:
        torch.testing.assert_close(*(held.models[0].read(name) for held in after.values()), rtol=1e-4, atol=1e-6)
