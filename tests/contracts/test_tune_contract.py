"""The promises of every tuning method. A new one is tested without another line here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_tune import TASKS, masked, tiny  # noqa: F401
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lfm import PlanError, collect_stats, merge, plan_merge, tune_model
from mergekit_lfm.api.attachments import load_attached
from mergekit_lfm.api.tune_plans import OPTIONS as OPTIONS_OF_FILES
from mergekit_lfm.artifacts.attachment import open_attachment
from mergekit_lfm.artifacts.prompt import open_prompt
from mergekit_lfm.recipe.registry import TUNE_METHODS
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model, logits
from mergekit_lfm.runtime.prompts import with_prompt
from mergekit_lfm.runtime.quiet import quiet
from mergekit_lfm.runtime.templates import with_template
from mergekit_lfm.train.loop import mean_loss
from mergekit_lfm.train.losses import LOSSES
from mergekit_lfm.train.texts import read_examples
from mergekit_lfm.views.adapted import open_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PROMPTS = [name for name, method in TUNE_METHODS.items() if method.makes in ("prompt", "mixture")]
CASES = [  # modules beside weights do not see whether these are tied
    (name, kind)
    for name, method in TUNE_METHODS.items()
    for kind in ("llama", "tied", "bert")
    if (method.makes, kind) != ("attachment", "tied") and name not in PROMPTS and method.makes != "template"
]
OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "threads": 1}
STILL: dict[str, Any] = {"steps": 1, "learning_rate": 1e-12}
MORE: Mapping[str, Mapping[str, Any]] = {
    "ia3": {"parameters": {"targets": "q_proj,v_proj,query,value"}},
    "ln": {"parameters": {"targets": "input_layernorm,LayerNorm"}},
    "mask": {"parameters": {"share": 0.01}},
    "full": {"weight_decay": 0.1},
    "adamix": {"parameters": {"experts": 2}},
}


def tuned(name: str, kind: str, root: Path, out: Path, **more: Any) -> Any:
    """The outcome of a method on a tiny model."""
    needs: dict[str, Any] = {}
    if TUNE_METHODS[name].needs:
        stats = out.parent / f"{kind}.fisher.safetensors"
        collect_stats("fisher", root / kind, root / f"{kind}.jsonl", stats, task=TASKS[kind])  # type: ignore[arg-type]
        needs["stats"] = stats
    if TUNE_METHODS[name].files == "adapters":
        others = [out.parent / f"other{seed}.safetensors" for seed in (0, 1)]
        for seed, other in enumerate(others):
            tuned("pfeiffer", kind, root, other, seed=seed, steps=1)
        needs["parameters"] = {TUNE_METHODS[name].files: ",".join(map(str, others))}
    if name == "progressive":
        earlier = out.parent / f"{out.name}.earlier"
        tune_model(root / kind, root / f"{kind}.jsonl", earlier, task=TASKS[kind], method="prompt", steps=1)
        more["parameters"] = {**more["parameters"], "earlier": str(earlier)}
    options = {**OPTIONS, **MORE.get(name, {}), **needs, **more}
    place = out.with_suffix(".safetensors") if TUNE_METHODS[name].makes in OPTIONS_OF_FILES else out
    return tune_model(root / kind, root / f"{kind}.jsonl", place, task=TASKS[kind], method=name, **options)


def opened(name: str, base: Path, result: Path) -> Any:
    """The tuned model as a checkpoint."""
    return open_model(result if TUNE_METHODS[name].makes == "checkpoint" else f"{base}+{result}")


def started(name: str, base: Path, result: Path, kind: str) -> Any:
    """The tuned model, loaded."""
    if TUNE_METHODS[name].makes == "attachment":
        return load_attached(f"{base}+{result}", TASKS[kind])
    return load_model(opened(name, base, result), TASKS[kind])


def check_changes(name: str, kind: str, base: Path, result: Path) -> None:
    """Only what a method may change is changed, and something is."""
    if TUNE_METHODS[name].makes == "attachment":
        check_attachment(kind, base, result)
        return
    before, after = tensors(open_model(base)), tensors(opened(name, base, result))
    changed = {tensor for tensor, x in before.items() if not torch.equal(x, after[tensor])}
    assert changed and before.keys() == after.keys()
    assert [n for n in changed if not may_change(name, n, tuple(before[n].shape), kind)] == []


def check_attachment(kind: str, base: Path, result: Path) -> None:
    """A file holds modules and the head, and runs with a model whose other parameters are those of the base."""
    attachment = open_attachment(result)
    heads = {"classifier.weight", "classifier.bias"} if kind == "bert" else set[str]()
    modules = {name for name in attachment.tensors if "_adapter." in name}
    assert {*attachment.info.replaced} == heads == attachment.tensors.keys() - modules
    start = dict(load_model(base, TASKS[kind]).model.named_parameters())
    end = dict(load_attached(f"{base}+{result}", TASKS[kind]).model.named_parameters())
    assert {name for name in end if "_adapter." in name} == end.keys() - start.keys()
    assert {name for name, x in start.items() if not torch.equal(x, end[name])} == heads


def tensors(checkpoint: Any) -> dict[str, Tensor]:
    return {name: checkpoint.read(name).view(spec.shape) for name, spec in checkpoint.items()}


def may_change(name: str, tensor: str, shape: tuple[int, ...], kind: str) -> bool:
    """Whether a method may change a tensor."""
    head = kind == "bert" and tensor.startswith("classifier")
    matrix = len(shape) == 2 and "embed" not in tensor and "lm_head" not in tensor and not head
    return {
        "full": True,
        "lp_ft": True,
        "layerwise": True,
        "mask": True,
        "bitfit": tensor.endswith("bias") or head,
        "svf": matrix or head,
        "ia3": any(part in tensor for part in ("q_proj", "v_proj", "query", "value"))
        or head,  # of outputs, so of biases
        "ln": "norm" in tensor.lower() or head,
    }.get(name, matrix or head)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_changes_its_part_alone_lowers_the_loss_and_comes_back_equal(
    name: str,
    kind: str,
    tiny: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    base, data = tiny / kind, tiny / f"{kind}.jsonl"
    if name == "bitfit" and kind != "bert":
        with pytest.raises(Exception, match="has no biases"):
            tuned(name, kind, tiny, tmp_path / "out")
        return
    if (name, kind) == ("lp_ft", "tied"):
        with pytest.raises(Exception, match="has no head of its own"):
            tuned(name, kind, tiny, tmp_path / "out")
        return
    outcome = tuned(name, kind, tiny, tmp_path / "out", dev=data)
    result, dev_loss = Path(outcome), outcome.result.dev_loss
    again = Path(tuned(name, kind, tiny, tmp_path / "again", dev=data))
    files = [path for path in result.iterdir() if path.suffix == ".safetensors"] if result.is_dir() else [result]
    for file in files:
        other = again / file.name if result.is_dir() else again
        assert file.read_bytes() == other.read_bytes()
    check_changes(name, kind, base, result)
    start, end = load_model(base, TASKS[kind]), started(name, base, result, kind)
    examples = read_examples(data, start)
    losses = [mean_loss(each.model, examples, LOSSES[TASKS[kind]], Options()) for each in (start, end)]
    assert losses[1] < losses[0]
    assert losses[1] == pytest.approx(dev_loss, rel=1e-5)  # that of the model as it was trained
    lines = [
        json.loads(line) for line in (tmp_path / f"{result.name}.training" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [*range(1, outcome.result.steps + 1)]


def by_hand(name: str, result: Path, base: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The scores of one row with a prompt: by PEFT's model, of a mixture the probabilities of its definition."""
    count = inputs["input_ids"].shape[1] if TASKS["llama"] == base.task else 0  # of a classifier all
    if name != "mixture":
        with quiet():
            return peft.PeftModel.from_pretrained(base.model, result).eval()(**inputs).logits[:, -count:]
    stored = load_file(result)
    for own in stored.keys() - {"values", "weights"}:
        base.model.get_parameter(own).copy_(stored[own])
    texts = base.model.get_input_embeddings()(inputs["input_ids"])
    both = [torch.cat([rows[None], texts], 1) for rows in stored["values"]]
    parts = [base.model(inputs_embeds=each).logits[:, -count:].double().softmax(-1) for each in both]
    return sum(share * part for share, part in zip(stored["weights"].double().softmax(0), parts, strict=True))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_lowers_the_loss_and_comes_back_equal(name: str, kind: str, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    data = tiny / f"{kind}.jsonl"
    more: dict[str, Any] = {"dev": data, "batch_size": 16, "parameters": {"tokens": 4}}
    if (name, kind) == ("prefix", "bert"):
        with pytest.raises(Exception, match="does not run with prefix"):
            tuned(name, kind, tiny, tmp_path / "out", **more)
        return
    outcome = tuned(name, kind, tiny, tmp_path / "out", **more)
    result, again = Path(outcome), Path(tuned(name, kind, tiny, tmp_path / "again", **more))
    files = [each / "adapter_model.safetensors" if each.is_dir() else each for each in (result, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    head = {"classifier.weight", "classifier.bias"} if kind == "bert" else set()
    expected = {"values", "weights"} if name == "mixture" else {"prompt_embeddings"}
    assert {key.removeprefix("base_model.") for key in load_file(files[0])} == {*expected, *head}
    loaded = load_model(tiny / kind, TASKS[kind])
    examples = read_examples(data, loaded)
    put = with_prompt(loaded, open_attachment(result) if name == "mixture" else open_prompt(result))
    loss = mean_loss(put.model, examples, LOSSES[TASKS[kind]], Options())
    lines = (tmp_path / f"{result.name}.training" / "metrics.jsonl").read_text().splitlines()
    assert loss < json.loads(lines[0])["loss"]  # of the start, on all examples
    assert loss == pytest.approx(outcome.result.dev_loss, rel=1e-5)
    base = load_model(tiny / kind, TASKS[kind])
    for row in (examples.batch([number]) for number in range(3)):
        inputs = {key: x for key, x in row.items() if key != "labels"}
        with torch.no_grad():
            ours, theirs = logits(put.model(**inputs)), by_hand(name, result, base, inputs)
        if name == "mixture":
            ours = ours.double().exp()
            torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name, method in TUNE_METHODS.items() if method.makes == "template"])
def test_a_template_lowers_the_loss_and_comes_back_equal(name: str, masked: Path, tmp_path: Path) -> None:  # noqa: F811
    base, data, options = masked / "masked", masked / "a.jsonl", {**OPTIONS, "learning_rate": 0.1, "batch_size": 15}
    more: dict[str, Any] = {"dev": data, "method": name, "parameters": {"template": str(masked / "rules.yaml")}}
    files = [tmp_path / f"{name}.safetensors" for name in ("out", "again")]
    outcome, _ = (tune_model(base, data, file, task="classification", **options, **more) for file in files)
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = with_template(load_model(base, "masked_lm"), open_attachment(files[0]))
    loss = mean_loss(loaded.model, read_examples(data, loaded), LOSSES["classification"], Options())
    assert loss == pytest.approx(outcome.result.dev_loss, rel=1e-5)
    first = tune_model(base, data, tmp_path / "first.safetensors", task="classification", **options | STILL, **more)
    assert first.result.dev_loss is not None and loss < first.result.dev_loss


@pytest.mark.parametrize("name", ["full", "bitfit", "lora"])
def test_a_merge_takes_the_result(name: str, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """Halfway between the base and the tuned model, by the engine."""
    base = tiny / "bert"
    result = Path(tuned(name, "bert", tiny, tmp_path / "out"))
    entry: dict[str, Any] = {"model": str(base), "edits": [str(result)]}
    if TUNE_METHODS[name].makes == "adapter":
        entry = {"model": f"{base}+{result}"}
    elif TUNE_METHODS[name].makes == "checkpoint":
        entry = {"model": str(result)}
    recipe = {"merge_method": "linear", "models": [{"model": str(base)}, entry], "parameters": {"weight": 1}}
    merged = load_file(Path(merge(recipe, tmp_path / "merged")) / "model.safetensors")
    before, after = tensors(open_model(base)), tensors(opened(name, base, result))
    for tensor, x in merged.items():
        assert torch.allclose(x.double(), (before[tensor].double() + after[tensor].double()) / 2, atol=1e-7)
    if "edits" in entry:  # a patch beside a model and one in its name are the same
        recipe["models"] = [{"model": str(base)}, {"model": f"{base}+{result}"}]
        named = plan_merge(recipe, tmp_path / "named").result.plan
        assert [(each.kind, each.changed) for each in named.adapters] == [(f"patch by {name}", len(load_file(result)))]
        again = load_file(Path(merge(recipe, tmp_path / "named")) / "model.safetensors")
        assert all(torch.equal(again[tensor], x) for tensor, x in merged.items())
        with pytest.raises(PlanError, match="a share of a patch; expected it as a whole"):
            open_model(f"{base}+0.5*{result}")
        with pytest.raises(PlanError, match="the patch does not fit"):
            open_model(f"{tiny / 'encoder'}+{result}")
