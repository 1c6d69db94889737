"""Masked tokens, answers of decoders, numbers of texts: read, trained and judged, against transformers' losses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_editing import TEXTS, trained_tokenizer
from helpers_training import Killed, numbers
from helpers_tune import BERT, transformers

from mergekit_lfm import PlanError, add_head, tune_model
from mergekit_lfm.artifacts.patch import open_patch
from mergekit_lfm.errors import FormatError
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.examples import IGNORED
from mergekit_lfm.train.loop import fit, mean_loss
from mergekit_lfm.train.losses import LOSSES
from mergekit_lfm.train.texts import read_examples
from mergekit_lfm.views.adapted import open_model
from mergekit_lfm.views.patched import patched_view

WORDS = [text for line in TEXTS for text in line.split(" . ")]
T5 = {"vocab_size": 344, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {"vocab_size": 344, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 48}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1, "decoder_start_token_id": 1}


def write(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def made(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Tiny models: `masked`, `t5`, `bart`, `score`; and data for each."""

    def make(folder: Path) -> None:
        torch.manual_seed(4)
        tokenizer = copy.deepcopy(trained_tokenizer("ended"))
        tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
        config = transformers.BertConfig(**{**BERT, "vocab_size": 344})
        models = {
            "masked": transformers.BertForMaskedLM(config),
            "bert": transformers.BertModel(config),
            "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
            "bart": transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
        }
        for name, model in models.items():
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        add_head(folder / "bert", folder / "score", labels=1)
        write(folder / "masked.jsonl", [{"text": word} for word in WORDS])
        pairs = [{"prompt": word, "completion": " ".join(word.split()[:2])} for word in WORDS]
        for name in ("t5", "bart"):
            write(folder / f"{name}.jsonl", pairs)
        write(folder / "score.jsonl", [{"text": word, "label": len(word) / 20} for word in WORDS])

    return made_once("tiny-forms", make)


KINDS = {"masked": "masked_lm", "t5": "seq2seq", "bart": "seq2seq", "score": "regression"}


@pytest.mark.parametrize("kind", ["masked", "t5", "bart"])
def test_the_loss_is_that_of_transformers_and_padding_changes_it_not(kind: str, made: Path) -> None:
    loaded = load_model(made / kind, KINDS[kind], dtype="float64")
    examples = read_examples(made / f"{kind}.jsonl", loaded)
    total = number = 0.0
    for batch in examples.in_order(1):
        shown = {name: x for name, x in batch.items() if not name.startswith("decoder_")}  # shifted by the model itself
        with torch.no_grad():
            theirs = loaded.model(**shown).loss
        counted = int((batch["labels"] != IGNORED).sum())
        total, number = total + counted * float(theirs), number + counted
    for size in (1, 3, 16):
        assert mean_loss(loaded.model, examples, LOSSES[loaded.task], Options(batch_size=size)) == pytest.approx(
            total / number, rel=1e-9
        )


def test_masks_are_those_of_bert_and_depend_on_draw_and_number_alone(made: Path, tmp_path: Path) -> None:
    loaded = load_model(made / "masked", "masked_lm")
    text = " ".join(WORDS)
    file = write(tmp_path / "long.jsonl", [{"text": f"{text} {text}"}] * 60)
    examples = read_examples(file, loaded)
    tokenizer: Any = loaded.tokenizer
    whole = tokenizer(f"{text} {text}", add_special_tokens=False)["input_ids"]
    pieces = [item["input_ids"].tolist() for item in examples.items[: len(examples) // 60]]
    assert [token for piece in pieces for token in piece[1:-1]] == whole  # nothing is cut off
    assert all(len(piece) <= 48 and (piece[0], piece[-1]) == (0, 1) for piece in pieces)
    batch = examples.batch(range(len(examples)), draw=7)
    rows = [item["input_ids"] for item in examples.items]
    before = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=examples.pad["input_ids"])
    chosen = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][chosen], before[chosen])
    assert torch.equal(batch["input_ids"][~chosen], before[~chosen])
    for row, number in zip(chosen, batch["attention_mask"].sum(1) - 2, strict=True):
        assert int(row.sum()) == max(1, round(0.15 * int(number)))
    count, now = int(chosen.sum()), batch["input_ids"][chosen]
    masked = int((now == tokenizer.mask_token_id).sum()) / count
    same = int((now == before[chosen]).sum()) / count
    for share, found in ((0.8, masked), (0.1, same)):  # within four standard errors, with the few equal by chance
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / count) + 1 / 300
    again = examples.batch([5, 2], draw=7)["labels"]
    assert torch.equal(again[0][again[0] != IGNORED], batch["labels"][5][batch["labels"][5] != IGNORED])
    assert not torch.equal(examples.batch([2], draw=8)["labels"], examples.batch([2], draw=7)["labels"])


def test_a_killed_training_goes_on_with_the_masks_of_its_steps(made: Path, tmp_path: Path) -> None:
    loaded = [load_model(made / "masked", "masked_lm") for _ in range(2)]
    examples = read_examples(made / "masked.jsonl", loaded[0])
    options = Options(steps=4, batch_size=3, learning_rate=0.01, evaluate_every=2)
    loss = LOSSES["masked_lm"]
    how: dict[str, Any] = {"dev": examples, "request": "r"}
    whole = fit(loaded[0].model, examples, loss, options, **how)

    def kill(done: int, *_: object) -> None:
        if done == 3:
            raise Killed

    always = Pauses(every_s=0, saving_share=math.inf)
    with pytest.raises(Killed):
        fit(loaded[1].model, examples, loss, options, place=tmp_path, pauses=always, tell=kill, **how)
    again = load_model(made / "masked", "masked_lm")
    found = fit(again.model, examples, loss, options, place=tmp_path, **how)
    assert [line["loss"] for line in found.record] == [line["loss"] for line in whole.record]
    assert len({line["loss"] for line in whole.record}) == 4 and found.best == whole.best
    assert torch.equal(numbers(again.model), numbers(loaded[0].model))


CASES = [
    ("masked", "full"),
    ("masked", "lora"),
    ("masked", "bitfit"),
    ("t5", "full"),
    ("t5", "lora"),
    ("bart", "lora"),
    ("score", "lora"),
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_tuned_model_comes_back_with_the_loss_it_had(kind: str, method: str, made: Path, tmp_path: Path) -> None:
    data, task = made / f"{kind}.jsonl", KINDS[kind]
    suffix = ".safetensors" if method == "bitfit" else ""
    how: dict[str, Any] = {"method": method, "task": task, "dev": data, "steps": 12, "batch_size": 4, "threads": 1}
    out = tmp_path / f"out{suffix}"
    one = tune_model(made / kind, data, out, learning_rate=0.01, **how)
    tuned = {
        "full": lambda: open_model(out),
        "lora": lambda: open_model(f"{made / kind}+{out}"),
        "bitfit": lambda: patched_view(open_model(made / kind), open_patch(out)),
    }[method]()
    losses = []
    for source in (made / kind, tuned):
        loaded = load_model(source, task)
        losses.append(mean_loss(loaded.model, read_examples(data, loaded), LOSSES[task], Options()))
    assert losses[1] < losses[0] and losses[1] == pytest.approx(one.result.dev_loss, rel=1e-5)


def test_models_are_judged_by_the_same_losses(made: Path) -> None:
    for kind, task in KINDS.items():
        found = answer(run("eval", str(made / kind), "--data", str(made / f"{kind}.jsonl"), "--task", task, "--json"))
        (score,) = found["models"][0]["files"]
        loaded = load_model(made / kind, task, dtype="float64")
        examples = read_examples(made / f"{kind}.jsonl", loaded)
        loss = mean_loss(loaded.model, examples, LOSSES[task], Options())
        assert score["examples"] == len(WORDS)
        assert score["error" if kind == "score" else "loss"] == pytest.approx(loss, rel=1e-5)
        if kind == "score":
            import numpy as np

            with torch.no_grad():
                rows = [loaded.model(input_ids=item["input_ids"][None]).logits.item() for item in examples.items]
            wanted = np.corrcoef(rows, [float(item["labels"]) for item in examples.items])[0, 1]
            assert score["correlation"] == pytest.approx(wanted, abs=1e-4)
        else:
            assert score["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_models_and_data_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    for kind, task, message in (
        ("t5", "lm", "its decoder needs inputs of its own"),
        ("masked", "seq2seq", "has no encoder with a decoder"),
        ("t5", "masked_lm", "its decoder needs inputs of its own"),
        ("bert", "masked_lm", "the files do not hold the masked language model"),
        ("bert", "regression", "its head has 2 outputs, expected one for regression"),
    ):
        with pytest.raises((PlanError, FormatError), match=message):
            load_model(made / kind, task)
    with pytest.raises(FormatError, match=r"of at most 48 tokens; found\n  line 1: \d+ tokens"):
        line = [{"prompt": "a", "completion": "b c " * 60}]
        read_examples(write(tmp_path / "a.jsonl", line), load_model(made / "bart", "seq2seq"))
    with pytest.raises(FormatError, match='line 1: "label" is "a", not a number'):
        read_examples(
            write(tmp_path / "b.jsonl", [{"text": "a", "label": "a"}]), load_model(made / "score", "regression")
        )
    file = write(tmp_path / "c.jsonl", [{"text": "a", "label": 0}])
    more = ["-o", str(tmp_path / "x"), "--data", str(file)]
    found = refusal(run("tune", str(made / "score"), "--task", "classification", *more))
    assert "the head of the model has one output; expected one for each class" in found
    found = refusal(run("tune", str(made / "masked"), "--task", "masked_lm", "--method", "mask", "--stats", "a", *more))
    assert "for which there are statistics; or another method" in found
    for command in ("stats", "repair"):
        arguments = {"stats": ("gram", "m"), "repair": ("m", "a", "b")}[command]
        result = run(command, *arguments, "--data", "x.txt", "--task", "seq2seq", "-o", "o")
        assert result.exit_code == 2 and "'seq2seq' is not one of 'lm', 'classification', 'embedding'" in result.stderr
