"""Terms of losses: against float64 formulas, at the points where they vanish, and through `tune`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import refusal, run
from helpers_editing import LLAMA, TEXTS, trained_tokenizer
from helpers_tune import tiny, transformers  # noqa: F401
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lfm import tune_model
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.losses import LOSSES, SCORES, towards
from mergekit_lfm.train.terms import build_loss, contrast, smooth, trunk_of, with_language
from mergekit_lfm.train.texts import read_examples

WORDS = [text for line in TEXTS for text in line.split(" . ")]
PAIRS = [{"prompt": " ".join(word.split()[:3]), "chosen": " " + word.split()[-1], "rejected": " a"} for word in WORDS]


@pytest.fixture(scope="module")
def decoder(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A tied decoder for three classes, `decoder`."""

    def make(folder: Path) -> None:
        torch.manual_seed(2)
        config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1}, num_labels=3, tie_word_embeddings=True)
        transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "decoder")
        trained_tokenizer().save_pretrained(folder / "decoder")

    return made_once("tied-decoder", make) / "decoder"


def write(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def loaded_in_training(folder: Path, task: str) -> Any:
    """The model in float64, as it is while it is trained."""
    loaded = load_model(folder, task, dtype="float64")
    loaded.model.train()
    return loaded


def gradient(model: Any, total: Tensor) -> Tensor:
    parameters = [x for x in model.parameters() if x.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])


@pytest.mark.parametrize(("kind", "task"), [("llama", "lm"), ("bert", "classification")])
def test_smoothness_is_the_symmetric_divergence_and_0_without_noise(kind: str, task: str, tiny: Path) -> None:  # noqa: F811
    loaded = loaded_in_training(tiny / kind, task)
    batch = read_examples(tiny / f"{kind}.jsonl", loaded).batch(range(5))
    plain = LOSSES[task](loaded.model, batch)
    assert smooth(SCORES[task], 3.0, noise=0.0)(loaded.model, batch) == plain
    torch.manual_seed(1)
    total, number = smooth(SCORES[task], 3.0, noise=0.1)(loaded.model, batch)
    torch.manual_seed(1)
    embedding = loaded.model.get_input_embeddings()
    vectors = embedding(batch["input_ids"])
    vectors = vectors + 0.1 * torch.randn_like(vectors)
    outputs = [
        loaded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        loaded.model(inputs_embeds=vectors, attention_mask=batch["attention_mask"]).logits,
    ]
    odds = [x.softmax(-1) for x in outputs]
    each = ((odds[0] * (odds[0] / odds[1]).log()) + (odds[1] * (odds[1] / odds[0]).log())).sum(-1)
    counted = batch["attention_mask"][:, 1:] if task == "lm" else 1
    divergence = float(((each[:, :-1] if task == "lm" else each) * counted).sum().detach())
    assert number == plain.number and divergence > 1e-4
    assert float(total.detach()) == pytest.approx(float(plain.total.detach()) + 3 * divergence, rel=1e-9)
    loaded.model.eval()
    assert smooth(SCORES[task], 3.0, noise=0.1)(loaded.model, batch) == plain


def test_an_added_language_model_is_that_of_gpt(decoder: Path, tiny: Path) -> None:  # noqa: F811
    loaded = loaded_in_training(decoder, "classification")
    examples = read_examples(tiny / "bert.jsonl", loaded)
    batch = examples.batch(range(4))
    plain, number = LOSSES["classification"](loaded.model, batch)
    total, same = with_language(LOSSES["classification"], 0.5)(loaded.model, batch)
    expected, trunk = float(plain.detach()), trunk_of(loaded.model)
    for item in examples.items[:4]:
        ids = item["input_ids"]
        with torch.no_grad():
            states = trunk(input_ids=ids[None]).last_hidden_state[0]
        odds = (states @ trunk.embed_tokens.weight.detach().T).softmax(-1)
        expected -= 0.5 * sum(math.log(odds[i, ids[i + 1]]) for i in range(len(ids) - 1)) / (len(ids) - 1)
    assert number == same == 4 and float(total.detach()) == pytest.approx(expected, rel=1e-9)


def test_the_gradient_of_a_penalty_is_the_distance_and_it_counts_in_training_alone(tiny: Path) -> None:  # noqa: F811
    loaded = loaded_in_training(tiny / "bert", "classification")
    model, batch = loaded.model, read_examples(tiny / "bert.jsonl", loaded).batch([0, 1])
    start = {name: x.detach() + torch.randn_like(x) for name, x in model.named_parameters()}
    del start["classifier.bias"]
    held = towards(LOSSES["classification"], start, 0.3)
    totals = [loss(model, batch) for loss in (held, LOSSES["classification"])]
    added = gradient(model, totals[0].total / 2) - gradient(model, totals[1].total / 2)
    wanted = [0.3 * (x.detach() - start.get(name, x.detach())).flatten() for name, x in model.named_parameters()]
    assert torch.allclose(added, torch.cat(wanted), atol=1e-9)
    model.eval()
    assert held(model, batch) == LOSSES["classification"](model, batch)


def test_preferences_are_those_of_the_paper(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """Equation 7, one answer and one token at a time, by a policy that is not the base."""
    base, policy = (loaded_in_training(tiny / "llama", "lm") for _ in range(2))
    examples = read_examples(write(tmp_path / "a.jsonl", PAIRS), base)
    torch.manual_seed(0)
    with torch.no_grad():
        for x in policy.model.parameters():
            x.add_(0.02 * torch.randn_like(x))
    from mergekit_lfm.train.terms import with_reference

    judged = with_reference(base.model, examples, 3)
    total, number = build_loss("lm", {"dpo": 0.4}, {})(policy.model, judged.batch(range(len(PAIRS))))
    tokenizer, expected = trained_tokenizer(), 0.0

    def log_p(model: Any, prompt: str, answer: str) -> float:
        before = [0, *tokenizer(prompt)["input_ids"]]
        after = [*tokenizer(answer)["input_ids"], 1]
        scores = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return float(sum(scores[len(before) - 1 + i, token] for i, token in enumerate(after)))

    with torch.no_grad():
        for pair in PAIRS:
            rises = [
                log_p(policy.model, pair["prompt"], pair[key]) - log_p(base.model, pair["prompt"], pair[key])
                for key in ("chosen", "rejected")
            ]
            expected += math.log(1 + math.exp(-0.4 * (rises[0] - rises[1])))
    assert number == len(PAIRS) and float(total.detach()) == pytest.approx(expected, rel=1e-6)
    same, _ = build_loss("lm", {"dpo": 0.4}, {})(base.model, judged.batch(range(len(PAIRS))))
    assert float(same.detach()) == pytest.approx(len(PAIRS) * math.log(2), rel=1e-9)


def test_tune_takes_terms_and_the_result_is_theirs(tiny: Path, decoder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Held to its start a model moves less; preferences are learned by an adapter; the same terms, the same bytes."""
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    how: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 3e-3, "threads": 1}
    drifts = []
    for weight in (None, 10.0):
        loss = {} if weight is None else {"l2sp": weight}
        out = Path(
            tune_model(tiny / "llama", tiny / "llama.jsonl", tmp_path / f"{weight}", task="lm", loss=loss, **how)
        )
        pairs = [load_file(folder / "model.safetensors") for folder in (tiny / "llama", out)]
        drifts.append(math.sqrt(sum(float((pairs[1][name] - x).square().sum()) for name, x in pairs[0].items())))
    assert drifts[1] < 0.9 * drifts[0]
    tuned = tune_model(
        tiny / "llama", file, tmp_path / "dpo", task="lm", method="lora", loss={"dpo": 0.5}, dev=file, **how
    )
    assert tuned.result.dev_loss is not None and tuned.result.dev_loss < math.log(2) - 0.01
    for name in ("a", "b"):
        arguments = [
            "--task",
            "classification",
            "--loss",
            "r3f=1",
            "--loss",
            "aux_lm=0.5",
            "--steps",
            "2",
            "--threads=1",
        ]
        assert (
            run(
                "tune", str(decoder), "--data", str(tiny / "bert.jsonl"), *arguments, "-o", str(tmp_path / name)
            ).exit_code
            == 0
        )
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("llama", ["lm", "--loss", "l2spp=1"], "did you mean l2sp"),
        ("llama", ["lm", "--loss", "l2sp=0"], "loss.l2sp: found 0.0, expected a number above 0"),
        (
            "llama",
            ["lm", "--loss", "aux_lm=1"],
            "loss.aux_lm: found the task lm, expected classification or regression",
        ),
        (
            "llama",
            ["lm", "--loss", "l2sp=1", "--method", "lora"],
            "expected one that trains the model's own parameters",
        ),
        ("llama", ["lm", "--loss", "dpo=1", "--loss", "r3f=1"], "found dpo and r3f, expected one of them"),
        ("llama", ["lm", "--loss", "dpo=1"], "found no rejected answers; expected some for the loss dpo"),
        ("pairs", ["lm"], "found chosen and rejected answers; expected the loss dpo"),
        (
            "bert",
            ["classification", "--loss", "supcon=1", "--accumulate", "2"],
            "expected 1 for a loss",
        ),
        ("bert", ["classification", "--loss", "aux_lm=1"], "aux_lm is for decoders, and Bert"),
    ],
)
def test_terms_that_do_not_fit_are_refused(
    model: str,
    arguments: list[str],
    message: str,
    tiny: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS) if model == "pairs" else tiny / f"{model}.jsonl"
    folder = tiny / ("llama" if model == "pairs" else model)
    found = refusal(run("tune", str(folder), "--data", str(data), "--task", *arguments, "-o", str(tmp_path / "out")))
    assert message in found and not (tmp_path / "out.training").exists()


def contrast_by_hand(vectors: Tensor, labels: list[int]) -> list[float]:
    units = [x / x.norm() for x in vectors.double()]
    found = []
    for i, own in enumerate(units):
        others = [j for j in range(len(units)) if j != i]
        whole = sum(math.exp(float(own @ units[j]) / 0.1) for j in others)
        same = [j for j in others if labels[j] == labels[i]]
        terms = [-math.log(math.exp(float(own @ units[j]) / 0.1) / whole) for j in same]
        found.append(sum(terms) / len(terms) if terms else 0.0)
    return found


def test_contrast_is_the_formula_and_0_for_one_alone() -> None:
    vectors = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = [0, 1, 0, 2, 1, 0, 3]
    found = contrast(vectors, torch.tensor(labels))
    assert found.tolist() == pytest.approx(contrast_by_hand(vectors.detach(), labels), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: contrast(x, torch.tensor(labels)), (vectors,))
    (slope,) = torch.autograd.grad(contrast(vectors[:1], torch.tensor([0])).sum(), vectors)
    assert not slope.any()


@pytest.mark.parametrize("kind", ["bert", "decoder"])
def test_contrast_is_of_the_vectors_that_the_head_reads(kind: str, tiny: Path, decoder: Path) -> None:  # noqa: F811
    folder = decoder if kind == "decoder" else tiny / kind
    loaded = loaded_in_training(folder, "classification")
    loaded.model.eval()
    classes = loaded.model.config.num_labels
    lines = [{"text": word, "label": i % min(classes, 2)} for i, word in enumerate(WORDS[:6])]
    batch = read_examples(write(folder.parent / f"{kind}-contrast.jsonl", lines), loaded).batch(range(6))
    plain = LOSSES["classification"](loaded.model, batch)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if kind == "decoder":
        states = trunk_of(loaded.model)(**inputs).last_hidden_state
        vectors = torch.stack(
            [row[int(mask.sum()) - 1] for row, mask in zip(states, inputs["attention_mask"], strict=True)]
        )
    else:
        vectors = loaded.model.bert(**inputs).pooler_output
    loaded.model.train()
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    total, number = build_loss("classification", {"supcon": 0.5}, {})(loaded.model, batch)
    expected = float(plain.total.detach()) + 0.5 * sum(contrast_by_hand(vectors.detach(), batch["labels"].tolist()))
    assert number == 6 and float(total.detach()) == pytest.approx(expected, rel=1e-9)
    loaded.model.eval()
    judged = build_loss("classification", {"supcon": 0.5}, {})(loaded.model, batch)
    assert float(judged.total.detach()) == pytest.approx(float(plain.total.detach()), rel=1e-12)
