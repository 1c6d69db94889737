"""Losses and encoded data: against transformers' own losses, formulas, and the same texts one at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_editing import tiny_model, trained_tokenizer
from helpers_tune import tiny  # noqa: F401

from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.examples import IGNORED, Examples
from mergekit_lfm.train.loop import mean_loss
from mergekit_lfm.train.losses import LOSSES, SCORES, consistent, cross_entropy, next_token, pool, ranking
from mergekit_lfm.train.texts import read_examples


def write(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_loss_of_a_language_model_is_that_of_transformers(tiny: Path) -> None:  # noqa: F811
    loaded = load_model(tiny / "llama", "lm")
    examples = read_examples(tiny / "llama.jsonl", loaded)
    for number_of, item in enumerate(examples.items):
        row = item["input_ids"][None]
        with torch.no_grad():
            expected = loaded.model(input_ids=row, labels=row).loss
            total, number = next_token(loaded.model, examples.batch([number_of]))
        assert number == row.shape[1] - 1
        assert float(total / number) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("kind", "task"), [("llama", "lm"), ("bert", "classification"), ("encoder", "embedding")])
def test_padding_changes_no_loss(kind: str, task: str, tiny: Path) -> None:  # noqa: F811
    loaded = load_model(tiny / kind, task, dtype="float64")
    examples = read_examples(tiny / f"{kind}.jsonl", loaded)
    assert len({len(item["input_ids"]) for item in examples.items}) > 2
    if task == "embedding":  # others of the batch count there: compare the vectors
        whole = {name: x for name, x in examples.batch(range(16)).items() if not name.startswith("positive_")}
        with torch.no_grad():
            together = pool(loaded.model, whole)
            alone = [pool(loaded.model, {"input_ids": item["input_ids"][None]}) for item in examples.items]
        assert torch.allclose(together, torch.cat(alone), atol=1e-12)
        return
    losses = [mean_loss(loaded.model, examples, LOSSES[task], Options(batch_size=size)) for size in (1, 5, 16)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) == pytest.approx(losses[2], rel=1e-12)


def test_a_ranking_is_the_share_of_a_text_s_own_positive() -> None:
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(6, 4).double(), dim=-1)

    class Table(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return vectors[input_ids[:, 0]]

    # the positives of the first and the third text are the same: neither counts against the other
    batch = {"input_ids": torch.tensor([[0], [1], [2]]), "positive_input_ids": torch.tensor([[3], [4], [3]])}
    total, number = ranking(Table(), batch)
    expected = 0.0
    for text, own, others in ((0, 3, [3, 4]), (1, 4, [3, 4, 3]), (2, 3, [4, 3])):
        scores = [math.exp(20 * float(vectors[text] @ vectors[other])) for other in others]
        expected -= math.log(math.exp(20 * float(vectors[text] @ vectors[own])) / sum(scores))
    assert number == 3 and float(total) == pytest.approx(expected, rel=1e-6)


def test_ignored_targets_have_no_term() -> None:
    scores = torch.randn(2, 3, 5, dtype=torch.float64)
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 4]])
    total, number = cross_entropy(scores, targets)
    by_hand = -sum(float(scores.log_softmax(-1)[i, j, targets[i, j]]) for i, j in ((0, 0), (0, 2), (1, 2)))
    assert number == 3 and float(total) == pytest.approx(by_hand, rel=1e-6)


def test_completions_alone_are_learned(tmp_path: Path, tiny: Path) -> None:  # noqa: F811
    loaded = load_model(tiny / "llama", "lm")
    line = {"prompt": "Ada Blake was born in", "completion": " Paris"}
    (item,) = read_examples(write(tmp_path / "a.jsonl", line), loaded).items
    tokenizer = trained_tokenizer()
    learned = [int(x) for x in item["labels"] if x != IGNORED]
    assert tokenizer.decode(learned) == " Paris</s>"
    assert tokenizer.decode(item["input_ids"]) == "<s>Ada Blake was born in Paris</s>"


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_words_of_the_assistant_are_learned(tmp_path: Path) -> None:
    from mergekit_lfm.runtime.load import Loaded
    from mergekit_lfm.store.checkpoint import open_checkpoint

    model, tokenizer = tiny_model("llama", torch.float32), trained_tokenizer()
    model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    tokenizer.chat_template = TEMPLATE
    loaded = Loaded(model, tokenizer, "lm", open_checkpoint(tmp_path / "m"))
    turns = [("user", "Where"), ("assistant", "Rome"), ("user", "Why"), ("assistant", "It rained")]
    line = {"messages": [{"role": role, "content": content} for role, content in turns]}
    try:
        (item,) = read_examples(write(tmp_path / "a.jsonl", line), loaded).items
    finally:
        tokenizer.chat_template = None
    whole = "<user>Where</s><assistant>Rome</s><user>Why</s><assistant>It rained</s>"
    assert tokenizer.decode(item["input_ids"]) == whole
    learned = [int(x) for x in item["labels"] if x != IGNORED]
    assert tokenizer.decode(learned) == "Rome</s>It rained</s>"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a"}], 'line 1: no "completion", or an empty one'),
        ([{"text": "a", "prompt": "b"}], "line 1: text and prompt"),
        ([{"words": "a"}], "line 1: none of text, prompt, messages"),
        ([{"prompt": "a b", "completion": "c"}, {"text": "a"}], "line 2: text; the first line has another form"),
        (
            [{"prompt": "a " * 60, "completion": "c"}],
            r"of at most 48 tokens; found\n  line 1: \d+ tokens",
        ),
        ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: no message of the assistant"),
        ([{"messages": "hello"}], 'line 1: "messages" is not a list'),
    ],
)
def test_lines_that_do_not_fit_are_named(lines: list[Any], message: str, tmp_path: Path, tiny: Path) -> None:  # noqa: F811
    loaded = load_model(tiny / "llama", "lm")
    with pytest.raises(FormatError, match=message):
        read_examples(write(tmp_path / "a.jsonl", *lines), loaded)


def test_a_classifier_needs_labels_and_an_encoder_positives(tmp_path: Path, tiny: Path) -> None:  # noqa: F811
    file = write(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(FormatError, match="found no labels"):
        read_examples(file, load_model(tiny / "bert", "classification"))
    with pytest.raises(FormatError, match='no "text" with a "positive"'):
        read_examples(file, load_model(tiny / "encoder", "embedding"))


def test_examples_of_other_inputs_are_refused() -> None:
    with pytest.raises(PlanError, match="example 1 has y; expected x"):
        Examples([{"x": torch.zeros(1)}, {"y": torch.zeros(1)}])
    with pytest.raises(PlanError, match="no example"):
        Examples([])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_consistency_is_the_mean_of_both_divergences_of_two_passes(kind: str, tiny: Path) -> None:  # noqa: F811
    """Passes that differ by noise on their scores, and rows of several lengths, whose padding does not count."""
    task = {"llama": "lm", "bert": "classification"}[kind]
    loaded = load_model(tiny / kind, task, dtype="float64")
    examples = read_examples(tiny / f"{kind}.jsonl", loaded)
    batch, scores = examples.batch([0, 1, 4]), list[torch.Tensor]()

    def disturb(_: Any, __: Any, output: Any) -> None:
        noise = torch.randn(output.logits.shape[-1], generator=torch.Generator().manual_seed(len(scores))).double()
        output.logits = output.logits + noise
        scores.append(output.logits)

    loaded.model.register_forward_hook(disturb)
    loaded.model.train()
    with torch.no_grad():
        total, number = consistent(LOSSES[task], SCORES[task], 0.3)(loaded.model, batch)
    labels = batch["labels"]
    if task == "lm":
        scores, labels = [x[:, :-1][labels[:, 1:] != IGNORED] for x in scores], labels[:, 1:][labels[:, 1:] != IGNORED]
    first, second = (x.log_softmax(-1) for x in scores)
    apart = [
        torch.nn.functional.kl_div(a, b, log_target=True, reduction="sum")
        for a, b in ((first, second), (second, first))
    ]
    own = torch.nn.functional.nll_loss(first, labels, reduction="sum")
    assert number == len(labels) and float(apart[0]) > 0.1
    assert float(total) == pytest.approx(float(own + 0.3 * (apart[0] + apart[1]) / 2), rel=1e-12)
    loaded.model.eval()
    assert len(scores) == 2 and consistent(LOSSES[task], SCORES[task], 0.3)(loaded.model, batch).number == number
