"""Prompts: their losses and values against definitions, `eval --prompt`, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_editing import LLAMA, trained_tokenizer
from helpers_tune import tiny, transformers  # noqa: F401
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lfm import evaluate_models, tune_model
from mergekit_lfm.artifacts.prompt import open_prompt
from mergekit_lfm.output.request import result_of
from mergekit_lfm.runtime.load import load_model, start_token
from mergekit_lfm.runtime.prompts import with_prompt
from mergekit_lfm.train.losses import SCALE, classes, next_token, ranking
from mergekit_lfm.train.texts import read_examples

pytest.importorskip("peft")
FILE = "adapter_model.safetensors"
STILL = 1e-12  # a rate at which values stay, to eight digits
NUMBERS = (0, 5, 2, 9)  # of examples of several lengths


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The tiny models, a decoder for three classes, and a prompt of three tokens for each but that, KIND.prompt."""
    root = tmp_path_factory.mktemp("prompts")
    for path in tiny.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, root / path.name)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, num_labels=3)
    transformers.LlamaForSequenceClassification(config).save_pretrained(root / "decoder")
    trained_tokenizer("ended").save_pretrained(root / "decoder")
    for kind, task in (("llama", "lm"), ("bert", "classification"), ("encoder", "embedding")):
        make("prompt", kind, task, root, root / f"{kind}.prompt")
    return root


def make(method: str, kind: str, task: str, root: Path, out: Path, **more: Any) -> Any:
    options: dict[str, Any] = {"steps": 2, "batch_size": 8, "learning_rate": 0.1, "threads": 1}
    parameters = {"tokens": 3, **more.pop("parameters", {})}
    data = root / f"{'bert' if kind == 'decoder' else kind}.jsonl"
    return tune_model(root / kind, data, out, task=task, method=method, parameters=parameters, **options | more)


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def states_behind(model: Any, rows: Tensor, ids: Tensor) -> Any:
    """The output of a model for the embeddings of one text behind rows."""
    return model(inputs_embeds=torch.cat([rows, model.get_input_embeddings()(ids)])[None])


def texts_of(batch: Mapping[str, Tensor], prefix: str = "") -> list[Tensor]:
    """The rows of a batch without what lengthens them."""
    sides = (batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"])
    return [ids[mask.bool()] for ids, mask in zip(*sides, strict=True)]


def lm_by_hand(model: Any, rows: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    terms = list[Tensor]()
    for ids in texts_of(batch):
        scores = states_behind(model, rows, ids).logits[0, len(rows) : -1].log_softmax(-1)
        terms.append(-scores.gather(-1, ids[1:, None]).sum())
    return torch.stack(terms).sum()


def classes_by_hand(model: Any, rows: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    scores = torch.cat([states_behind(model, rows, ids).logits for ids in texts_of(batch)]).log_softmax(-1)
    return -scores.gather(-1, batch["labels"][:, None]).sum()


def ranking_by_hand(model: Any, rows: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    means = [
        torch.cat([states_behind(model, rows, ids).last_hidden_state[:, len(rows) :].mean(1) for ids in side])
        for side in (texts_of(batch), texts_of(batch, "positive_"))
    ]
    mine, others = (torch.nn.functional.normalize(each, dim=-1) for each in means)
    return -(SCALE * mine @ others.T).log_softmax(-1).diagonal().sum()


@pytest.mark.parametrize(
    ("kind", "task", "loss", "by_hand"),
    [
        ("llama", "lm", next_token, lm_by_hand),
        ("bert", "classification", classes, classes_by_hand),
        ("encoder", "embedding", ranking, ranking_by_hand),
    ],
)
def test_the_loss_of_a_padded_batch_is_that_of_each_text_behind_the_prompt(
    kind: str, task: str, loss: Any, by_hand: Any, made: Path
) -> None:
    """In float64, by the embeddings of each text alone: of tokens, of classes, and of means over the text's tokens."""
    loaded = load_model(made / kind, task, dtype="float64")
    rows = load_file(made / f"{kind}.prompt" / FILE)["prompt_embeddings"].double()
    batch = read_examples(made / f"{kind}.jsonl", loaded).batch(NUMBERS)
    assert len({len(ids) for ids in texts_of(batch)}) > 1
    with torch.no_grad():
        found = loss(with_prompt(loaded, open_prompt(made / f"{kind}.prompt")).model, batch)
        expected = by_hand(loaded.model, rows, batch)
    assert float(found.total) == pytest.approx(float(expected), rel=1e-12)


def test_a_decoder_that_classifies_finds_the_last_token_behind_a_prompt(made: Path, tmp_path: Path) -> None:
    """The scores of a batch, whose rows are lengthened, are those of each row alone."""
    make("prompt", "decoder", "classification", made, tmp_path / "out")
    loaded = load_model(made / "decoder", "classification", dtype="float64")
    examples = read_examples(made / "bert.jsonl", loaded)
    loaded.model.config.pad_token_id = 0  # type: ignore[union-attr]
    model = with_prompt(loaded, open_prompt(tmp_path / "out")).model
    with torch.no_grad():
        whole, *alone = (
            float(classes(model, examples.batch(part)).total) for part in (NUMBERS, *([i] for i in NUMBERS))
        )
    assert whole == pytest.approx(sum(alone), rel=1e-12)


def test_no_text_is_too_long_for_a_model_that_counts_positions_from_two(tmp_path: Path) -> None:
    """RoBERTa's 26 positions have room for 24 tokens: 20 of a text behind 4."""
    sizes = {"vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(**sizes, num_attention_heads=4, max_position_embeddings=26, num_labels=3)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    trained_tokenizer().save_pretrained(tmp_path / "roberta")
    (tmp_path / "roberta.jsonl").write_text(json.dumps({"text": "the cat " * 30, "label": 1}) + "\n")
    make("prompt", "roberta", "classification", tmp_path, tmp_path / "out", parameters={"tokens": 4})
    loaded = with_prompt(load_model(tmp_path / "roberta", "classification"), open_prompt(tmp_path / "out"))
    assert loaded.positions == 20


def test_the_start_is_a_text_an_earlier_prompt_or_random_tokens(made: Path, tmp_path: Path) -> None:
    table = load_file(made / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    tokenizer: Any = load_model(made / "llama", "lm").tokenizer
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    starts: dict[str, dict[str, Any]] = {
        "text": {"start": "the cat", "tokens": 2 * len(ids) + 1},
        "earlier": {"earlier": str(made / "llama.prompt")},
        "random": {},
    }
    values = {}
    for name, parameters in starts.items():
        make("prompt", "llama", "lm", made, tmp_path / name, parameters=parameters, learning_rate=STILL)
        values[name] = load_file(tmp_path / name / FILE)["prompt_embeddings"]
    torch.testing.assert_close(values["text"], table[[*ids, *ids, ids[0]]], atol=1e-8, rtol=0)
    earlier = load_file(made / "llama.prompt" / FILE)["prompt_embeddings"]
    torch.testing.assert_close(values["earlier"], earlier, atol=1e-8, rtol=0)
    assert all(float((table - row).abs().max(1).values.min()) < 1e-8 for row in values["random"])


def test_progressive_leaves_earlier_prompts_and_puts_the_newest_first(made: Path, tmp_path: Path) -> None:
    first = load_file(made / "llama.prompt" / FILE)["prompt_embeddings"]
    make("p_tuning", "llama", "lm", made, tmp_path / "second", parameters={"tokens": 2})
    second = load_file(tmp_path / "second" / FILE)["prompt_embeddings"]
    both = {"earlier": f"{made / 'llama.prompt'},{tmp_path / 'second'}"}
    outcome = make("progressive", "llama", "lm", made, tmp_path / "third", parameters=both)
    third = load_file(tmp_path / "third" / FILE)["prompt_embeddings"]
    assert third.shape == (3 + 2 + 3, 32) and outcome.result.trained == 3 * 32
    assert torch.equal(third[3:], torch.cat([second, first]))


def test_hard_prompts_are_rows_of_the_embedding_and_their_text_is_that_of_the_tokens(
    made: Path, tmp_path: Path
) -> None:
    outcome = make(
        "pez", "llama", "lm", made, tmp_path / "out", steps=8, learning_rate=1.0, parameters={"start": "the cat sat"}
    )
    loaded = load_model(made / "llama", "lm")
    tokenizer: Any = loaded.tokenizer
    facts = outcome.result.facts
    values = load_file(tmp_path / "out" / FILE)["prompt_embeddings"]
    table = load_file(made / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(values, table[facts["token ids"]])
    assert facts["token ids"] != tokenizer("the cat sat", add_special_tokens=False)["input_ids"][:3]  # it has moved
    assert not set(facts["token ids"]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(facts["token ids"]) == facts["text"]
    assert result_of(tmp_path / "out")["facts"] == facts
    again = make(
        "pez", "llama", "lm", made, tmp_path / "out", steps=8, learning_rate=1.0, parameters={"start": "the cat sat"}
    )
    assert again.already_there and again.result == outcome.result


@pytest.mark.usefixtures("here")
def test_eval_counts_the_same_tokens_behind_a_prompt() -> None:
    """The perplexity is that of the text's tokens behind the prompt, by their embeddings."""
    text = "the cat sat on the mat"
    Path("x.txt").write_text(text)
    plain = answer(run("eval", "llama", "--text", "x.txt", "--json"))
    data = answer(run("eval", "llama", "--text", "x.txt", "--prompt", "llama.prompt", "--json"))
    scores = [each["models"][0]["texts"][0] for each in (plain, data)]
    loaded = load_model("llama", "lm", dtype="float64")
    tokenizer: Any = loaded.tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = load_file(f"llama.prompt/{FILE}")["prompt_embeddings"].double()
    with torch.no_grad():
        output = states_behind(loaded.model, rows, torch.tensor([start_token(tokenizer), *tokens]))
    ours = output.logits[0, len(rows) : -1].log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
    assert scores[0]["tokens"] == scores[1]["tokens"] == len(tokens)
    assert scores[1]["perplexity"] == pytest.approx(math.exp(-float(ours.mean())), rel=1e-5)
    assert scores[0]["perplexity"] != scores[1]["perplexity"]
    data = answer(run("eval", "bert", *CLASSIFY, "--prompt", "bert.prompt", "--json"))
    assert data["models"][0]["files"][0]["examples"] == 16
    with pytest.warns(UserWarning, match="trained on a model of other content than tied"):
        evaluate_models("tied", text="x.txt", prompt="llama.prompt")


CLASSIFY = ("--data", "bert.jsonl", "--task", "classification")
EMBED = ("--data", "encoder.jsonl", "--task", "embedding")
TUNE = ("tune", "llama", "--data", "llama.jsonl", "--task", "lm", "-o", "out", "--threads", "1", "--method")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TUNE, "prompt", "--tokens", "30", "--window", "40"], "70 tokens in the 48 positions of llama"),
        ([*TUNE, "prompt", "--tokens", "47"], "47 virtual tokens leave no room for a text in the 48 positions"),
        ([*TUNE, "prompt", "--earlier", "llama.prompt"], "found tokens 20 beside earlier prompts of 3 tokens"),
        ([*TUNE, "prompt", "--earlier", "llama.prompt", "-o", "llama.prompt", "--overwrite"], "lie in one another"),
        ([*TUNE, "progressive"], "parameters.earlier: found '', expected files with commas"),
        ([*TUNE, "progressive", "--earlier", "lora"], "is LORA, expected a prompt"),
        ([*TUNE, "prefix", "--checkpointing"], "a prefix stands in the cache"),
        (["eval", "llama+llama.prompt", "--text", "x.txt"], "`mergekit-lfm eval MODEL --prompt llama.prompt`"),
        (["eval", "encoder", *EMBED, "--prompt", "llama.prompt"], "is for lm"),
        (["eval", "llama", "--text", "x.txt", "--prompt", "lora"], "name an adapter as MODEL+lora"),
        (["eval", "llama", "--text", "x.txt", "--prompt", "none"], "none is not a folder"),
        (["eval", "llama", "--text", "x.txt", "--prompt", "wide"], "of 16 numbers, LlamaForCausalLM takes 32"),
        (["eval", "llama", "--text", "x.txt", "--prompt", "mixed.safetensors"], "the mixture is for classification"),
        (["eval", "bert+mixed.safetensors", *CLASSIFY], "is a mixture of prompts"),
        (
            ["tune", "bert", "--data", "long.npz", "--task", "classification", "--method", "prompt", "-o", "out"],
            "a text of 40 tokens behind 20 virtual ones, expected at most 48 in all",
        ),
        (["tune", "encoder", *EMBED, "--method", "mixture"], "which embedding has not"),
    ],
)
@pytest.mark.usefixtures("others")
def test_one_message_for_prompts_that_do_not_fit(arguments: list[str], message: str, here: Path) -> None:
    more = [] if "-o" in arguments or arguments[0] == "eval" else ["-o", "out.safetensors"]
    assert message in refusal(run(*arguments, *more))
    assert not (here / "out").exists()


@pytest.fixture(scope="module")
def others(made: Path) -> None:
    """Beside the prompts an adapter, a mixture, a prompt of another width, and texts as arrays."""
    (made / "x.txt").write_text("the cat")
    tune_model(made / "llama", made / "llama.jsonl", made / "lora", task="lm", method="lora", steps=1, threads=1)
    make("mixture", "bert", "classification", made, made / "mixed.safetensors", steps=1)
    shutil.copytree(made / "llama.prompt", made / "wide")
    from safetensors.torch import save_file

    save_file({"prompt_embeddings": torch.zeros(3, 16)}, made / "wide" / FILE)
    config = json.loads((made / "wide" / "adapter_config.json").read_text())
    (made / "wide" / "adapter_config.json").write_text(json.dumps(config | {"token_dim": 16}))
    np.savez(made / "long.npz", input_ids=np.ones((4, 40), np.int64), labels=np.zeros(4, np.int64))
