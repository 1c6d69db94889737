"""R4F: heads of spectral norm 1, against singular values by numpy, R3F's loss on a divided head, and Euler's rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import refusal, run
from helpers_training import Killed, numbers
from helpers_tune import BERT, tiny, transformers  # noqa: F401

from mergekit_lfm import collect_stats, tune_model
from mergekit_lfm.errors import PlanError
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.loop import fit, mean_loss
from mergekit_lfm.train.losses import LOSSES
from mergekit_lfm.train.terms import build_loss
from mergekit_lfm.train.texts import read_examples
from mergekit_lfm.train.unit_norms import UnitNorms
from mergekit_lfm.tune.heads import normalise_head
from mergekit_lfm.tune.work import Prepared, TuneWork
from mergekit_lfm.views.adapted import open_model

PATCHES = ("bitfit", "svf")
HOW: dict[str, Any] = {"task": "classification", "loss": {"r4f": 1.0}, "steps": 6, "batch_size": 8, "threads": 1}


def norm(matrix: torch.Tensor) -> float:
    """The largest singular value, in float64."""
    return float(np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)[0])


@pytest.mark.parametrize("method", ["full", "lp_ft", "layerwise", "bitfit", "svf"])
def test_the_saved_head_has_norm_1_and_is_that_which_was_judged(method: str, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    data, base = tiny / "bert.jsonl", tiny / "bert"
    out = tmp_path / ("out.safetensors" if method in PATCHES else "out")
    tuned = tune_model(base, data, out, method=method, dev=data, learning_rate=3e-3, **HOW)
    assert norm(load_model(base, "classification").model.get_parameter("classifier.weight")) < 0.9  # before
    loaded = load_model(open_model(f"{base}+{out}") if method in PATCHES else out, "classification")
    assert norm(loaded.model.get_parameter("classifier.weight")) == pytest.approx(1, abs=1e-6)
    loss = mean_loss(loaded.model, read_examples(data, loaded), LOSSES["classification"], Options())
    assert loss == pytest.approx(tuned.result.dev_loss, rel=1e-6)


def started(folder: Path, dtype: str = "float64") -> tuple[Any, UnitNorms]:
    """A classifier and the norms of its head, begun."""
    loaded = load_model(folder, "classification", dtype=dtype)
    loaded.model.train()
    norms = UnitNorms([loaded.model.get_submodule("classifier")])  # type: ignore[list-item]
    return loaded, norms


def test_the_loss_is_that_of_r3f_on_the_divided_head(tiny: Path) -> None:  # noqa: F811
    """Its gradient is that of Miyato et al., equation 12, and the outputs stay when the norms are put in place."""
    (loaded, norms), (divided, _) = started(tiny / "bert"), started(tiny / "bert")
    batch = read_examples(tiny / "bert.jsonl", loaded).batch(range(6))
    weight, other = (x.model.get_parameter("classifier.weight") for x in (loaded, divided))
    u, s, v = np.linalg.svd(other.detach().numpy(), full_matrices=False)
    with torch.no_grad():
        other.div_(s[0])
    norms.begin({})
    totals = []
    for model, name in ((loaded.model, "r4f"), (divided.model, "r3f")):
        torch.manual_seed(1)
        total, number = build_loss("classification", {name: 2.0}, {})(model, batch)
        (total / number).backward()  # type: ignore[no-untyped-call]
        totals.append(float(total.detach()))
    assert totals[0] == pytest.approx(totals[1], rel=1e-12) and weight.grad is not None and other.grad is not None
    first = torch.from_numpy(np.outer(u[:, 0], v[0]))
    expected = (other.grad - (other.grad * other.detach()).sum() * first) / s[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        before = loaded.model(input_ids=batch["input_ids"]).logits
        norms.fold()
        after = loaded.model(input_ids=batch["input_ids"]).logits
    assert loaded.model.get_parameter("classifier.weight") is weight and torch.equal(before, after)


def test_killed_it_goes_on_to_the_same_head(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    loss, heads = build_loss("classification", {"r4f": 1.0}, {}), []
    options = Options(steps=4, batch_size=5, learning_rate=0.01)

    def kill(done: int, *_: object) -> None:
        if done == 3:
            raise Killed

    how: dict[str, Any] = {"request": "r", "pauses": Pauses(every_s=0, saving_share=math.inf)}
    for place, tell in ((tmp_path / "whole", None), (tmp_path / "cut", kill), (tmp_path / "cut", None)):
        loaded, norms = started(tiny / "bert", "float32")
        examples = read_examples(tiny / "bert.jsonl", loaded)
        if tell is not None:
            with pytest.raises(Killed):
                fit(loaded.model, examples, loss, options, hooks=(norms,), place=place, tell=tell, **how)
            continue
        fit(loaded.model, examples, loss, options, hooks=(norms,), place=place, **how)
        norms.fold()
        heads.append(numbers(loaded.model))
    assert torch.equal(*heads)


def test_all_matrices_of_a_head_are_divided_and_others_refused(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    config = transformers.RobertaConfig(**BERT, num_labels=3)
    model = transformers.RobertaForSequenceClassification(config)
    work = TuneWork(model, "classification", {}, 1, "roberta")
    prepared = normalise_head(Prepared(model), work, "full")
    prepared.hooks[0].begin({})
    prepared.fold()
    for layer in (model.classifier.dense, model.classifier.out_proj):
        assert norm(layer.weight) == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        model.classifier.dense.weight.zero_()
    with pytest.raises(PlanError, match=r"classifier.dense.weight is 0; make a head"):
        normalise_head(Prepared(model), work, "full")
    model.classifier.out_proj = torch.nn.Conv1d(3, 3, 1)
    with pytest.raises(PlanError, match="has Linear, Conv1d; choose r3f"):
        normalise_head(Prepared(model), TuneWork(model, "classification", {}, 1, "roberta"), "full")
    stats = tmp_path / "f.safetensors"
    collect_stats("fisher", tiny / "bert", tiny / "bert.jsonl", stats, task="classification")
    with pytest.raises(PlanError, match=r"mask does not train all of classifier.weight"):
        tune_model(tiny / "bert", tiny / "bert.jsonl", tmp_path / "p.safetensors", method="mask", stats=stats, **HOW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora"], "loss.r4f: found a method that makes an adapter"),
        (["--train", "*encoder*"], "full does not train all of classifier.weight; choose a method and parts that do"),
        (["--loss", "r3f=1"], "loss: found r3f and r4f, expected one of them"),
        (["--task", "lm"], "loss.r4f: found the task lm, expected classification"),
    ],
)
def test_r4f_where_no_head_is_trained_is_refused(
    arguments: list[str],
    message: str,
    tiny: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    common = ["--task", "classification", "--loss", "r4f=1", "-o", str(tmp_path / "out")]
    found = refusal(run("tune", str(tiny / "bert"), "--data", str(tiny / "bert.jsonl"), *common, *arguments))
    assert message in found and not (tmp_path / "out.training").exists()
