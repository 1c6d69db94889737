"""Texts that a model writes: those of transformers, in data files, and resumed to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_commands import answer, refusal, run
from helpers_text import byte_tokenizer, llama_config, save_model, transformers, write_lines

from mergekit_lfm import FormatError, PlanError, generate_texts, load_model, run_recipe
from mergekit_lfm.api.generate_batches import write_batch
from mergekit_lfm.train.texts import read_examples

pytestmark = pytest.mark.filterwarnings("ignore:.*texts were cut:mergekit_lfm.api.outcome.Finding")
PROMPTS = ["Ada", "Leo is", "a cook", "Oslo i", "It"]
CHAT = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<a>{% endif %}"
HOW: dict[str, Any] = {"threads": 1, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def made(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A Llama with a chat template, a T5, an encoder, and prompts."""

    def make(folder: Path) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT
        save_model(folder / "llama", "LlamaForCausalLM", llama_config(), tokenizer)
        save_model(folder / "mute", "LlamaForCausalLM", llama_config())
        sizes = {"vocab_size": 258, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        t5 = transformers.T5Config(**sizes, decoder_start_token_id=0, initializer_factor=8.0)
        save_model(folder / "t5", "T5ForConditionalGeneration", t5, tokenizer)
        bert = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        bert |= {"num_hidden_layers": 1, "max_position_embeddings": 32}
        save_model(folder / "bert", "BertForMaskedLM", transformers.BertConfig(**bert), tokenizer)
        write_lines(folder / "prompts.jsonl", *({"prompt": text, "completion": "old"} for text in PROMPTS))
        talks = [[{"role": "user", "content": text}] for text in PROMPTS[:2]]
        talks[1].append({"role": "assistant", "content": "old"})
        write_lines(folder / "talks.jsonl", *({"messages": talk} for talk in talks))

    return made_once("generate", make)


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]


def greedy(name: str, task: str, ids: list[int]) -> str:
    """The words by transformers alone."""
    loaded = load_model(Path(name), task)
    model: Any = loaded.model
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    whole = model.generate(given, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=1)[0].tolist()
    assert loaded.tokenizer is not None
    words = whole[len(ids) :] if task == "lm" else whole
    return str(loaded.tokenizer.decode(words, skip_special_tokens=True))


def test_greedy_texts_are_those_of_transformers() -> None:
    outcome = generate_texts("llama", "prompts.jsonl", "out.jsonl", temperature=0, batch_size=2, **HOW)
    tokenizer = load_model(Path("llama"), "lm").tokenizer
    assert tokenizer is not None
    starts = [[0, *tokenizer(text)["input_ids"]] for text in PROMPTS]
    wanted = [greedy("llama", "lm", ids) for ids in starts]
    assert lines("out.jsonl") == [
        {"prompt": text, "completion": words} for text, words in zip(PROMPTS, wanted, strict=True)
    ]
    assert (outcome.result.texts, outcome.result.prompts, outcome.result.blank) == (5, 5, 0)
    generate_texts("llama", "talks.jsonl", "talk.jsonl", temperature=0, **HOW)
    for text, line in zip(PROMPTS, lines("talk.jsonl"), strict=False):
        asked = tokenizer(f"<u>{text}</s><a>")["input_ids"]
        words = greedy("llama", "lm", asked)
        assert line == {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": words}]
        }  # words that were there are written anew


def test_the_words_of_an_encoder_with_a_decoder_are_those_of_transformers() -> None:
    generate_texts("t5", "prompts.jsonl", "out.jsonl", task="seq2seq", temperature=0, **HOW)
    tokenizer = load_model(Path("t5"), "seq2seq").tokenizer
    assert tokenizer is not None
    wanted = [greedy("t5", "seq2seq", tokenizer(text)["input_ids"]) for text in PROMPTS]
    assert [line["completion"] for line in lines("out.jsonl")] == wanted and len({*wanted}) > 1


def test_a_text_depends_on_the_seed_and_its_numbers_alone() -> None:
    how = {**HOW, "seed": 4, "top_p": 0.95}
    generate_texts("llama", "prompts.jsonl", "one.jsonl", batch_size=1, **how)
    generate_texts("llama", "prompts.jsonl", "all.jsonl", batch_size=16, **how)
    assert Path("one.jsonl").read_bytes() == Path("all.jsonl").read_bytes()
    generate_texts("llama", "prompts.jsonl", "more.jsonl", count=3, **how)
    assert lines("more.jsonl")[::3] == lines("one.jsonl")
    assert len({line["completion"] for line in lines("more.jsonl")}) == 15
    generate_texts("llama", "prompts.jsonl", "other.jsonl", **{**how, "seed": 5})
    assert all(a != b for a, b in zip(lines("other.jsonl"), lines("one.jsonl"), strict=True))


def test_a_line_that_the_models_positions_cut_is_read_again() -> None:
    """The words of this model are mostly halves of characters, which are more tokens when they are read."""
    for data in ("prompts.jsonl", "talks.jsonl"):
        out = f"cut-{data}"
        generate_texts("llama", data, out, max_new_tokens=99, threads=1, seed=2)
        loaded = load_model(Path("llama"), "lm")
        sizes = [len(item["input_ids"]) for item in read_examples(Path(out), loaded).items]
        assert loaded.positions == 32 and 28 < max(sizes) <= 32


class Killed(BaseException):
    pass


def test_an_interrupted_run_goes_on_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {**HOW, "count": 7, "batch_size": 2, "temperature": 0.8}
    generate_texts("llama", None, "whole.jsonl", **how)
    assert len(lines("whole.jsonl")) == 7 and all(line.keys() == {"text"} for line in lines("whole.jsonl"))
    calls = list[int]()

    def stop_at(last: int) -> None:
        def count(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) > last:
                raise Killed
            return write_batch(*arguments)

        calls.clear()
        monkeypatch.setattr("mergekit_lfm.api.generate.write_batch", count)

    stop_at(2)
    with pytest.raises(Killed):
        generate_texts("llama", None, "out.jsonl", **how)
    parts = Path("out.jsonl.partial/parts.jsonl")
    assert not Path("out.jsonl").exists() and len(parts.read_text().splitlines()) == 3
    with parts.open("a") as file:
        file.write('[{"text": "half a')  # as a kill leaves it
    stop_at(9)
    again = generate_texts("llama", None, "out.jsonl", **how)
    assert len(calls) == 2 and Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not again.already_there and not Path("out.jsonl.partial").exists()
    assert generate_texts("llama", None, "out.jsonl", **how).already_there and len(calls) == 2
    Path("out.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(PlanError, match=r"out.jsonl exists; choose another output, or use --overwrite"):
        generate_texts("llama", None, "out.jsonl", **how)
    generate_texts("llama", None, "out.jsonl", **how, overwrite=True)
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_student_is_tuned_on_the_texts_of_its_teacher() -> None:
    """Two documents, and a third that judges on the texts: `data` names the stage."""
    tune = {"job": "tune", "model": "llama", "data": "answers", "task": "lm", "steps": 2, "batch_size": 2}
    job = {"job": "generate", "max_new_tokens": 6}
    stages = [
        {"name": "answers", **job, "model": "llama", "data": "prompts.jsonl", "count": 2},
        {"name": "student", **tune, "dev": "answers"},
        {"name": "own", **job, "model": "student", "count": 3},
        {"job": "eval", "models": ["llama", "student"], "data": "own", "task": "lm"},
    ]
    Path("recipe.yaml").write_text(yaml.safe_dump_all(stages, sort_keys=False))
    outcome = run_recipe("recipe.yaml", "out.json", threads=1)
    assert {path.name for path in Path("out.stages").iterdir()} > {"answers.jsonl", "student", "own.jsonl"}
    scores = outcome.result
    assert scores["student"]["own"].tokens == scores["llama"]["own"].tokens > 0
    assert run_recipe("recipe.yaml", "out.json", threads=1, drop_stages=True).already_there
    assert [path.name for path in Path("out.stages").iterdir()] == ["student.training"]  # the course of its training


def test_the_command_writes_and_tells() -> None:
    command = ("generate", "llama", "--data", "prompts.jsonl", "--max-new-tokens", "5", "--threads", "1")
    found = run(*command, "-o", "out.jsonl", "--json")
    data = json.loads(found.stdout)
    assert found.exit_code == 0 and (data["texts"], data["prompts"]) == (5, 5) and data["tokens"] <= 25
    assert any("texts were cut before their end" in line for line in data["warnings"])
    result = run(*command, "-o", "out.jsonl")
    assert result.exit_code == 0 and "already there" in result.output
    report = refusal(run("generate", "llama", "--temperature", "0", "--count", "2", "-o", "x.jsonl"))
    assert "count: found 2, expected none at temperature 0" in report
    assert run(*command[:4], "--count", "2", "-q", "-o", "more.jsonl").output.splitlines()[-1] == "more.jsonl"
    plan = {"job": "generate", "model": "llama", "data": "prompts.jsonl"}
    Path("recipe.yaml").write_text(yaml.safe_dump(plan))
    assert answer(run("plan", "recipe.yaml", "out.jsonl", "--json"))


def test_requests_that_cannot_be_met_are_refused_and_leave_nothing() -> None:
    write_lines(Path("texts.jsonl"), {"text": "Ada"}, {"prompt": ""}, {"messages": []})
    write_lines(Path("long.jsonl"), {"prompt": "Ada"}, {"prompt": "a" * 30})
    Path("plain.txt").write_text("Ada\n")
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (PlanError, "BertForMaskedLM, is not a causal language model", ("bert", None, "x.jsonl"), {}),
        (PlanError, "the model has no tokenizer", ("mute", None, "x.jsonl"), {}),
        (
            PlanError,
            "temperature: found -1.0, expected greater than or equal to 0",
            ("llama", None, "x.jsonl"),
            {"temperature": -1.0},
        ),
        (PlanError, "task: found seq2seq without data", ("t5", None, "x.jsonl"), {"task": "seq2seq"}),
        (PlanError, "give a name that ends in .jsonl", ("llama", None, "x"), {}),
        (PlanError, "window is 99; expected 1 to 32", ("llama", None, "x.jsonl"), {"window": 99}),
        (PlanError, "top_p: found 0.5, expected none", ("llama", None, "x.jsonl"), {"temperature": 0, "top_p": 0.5}),
        (
            FormatError,
            r"line 1: no prompt or messages, but text\n.*line 2: \"prompt\" is",
            ("llama", "texts.jsonl"),
            {},
        ),
        (FormatError, r"leave room for an answer within 32 tokens.*\n.*line 2: 31 tokens", ("llama", "long.jsonl"), {}),
        (FormatError, "found the suffix .txt; expected .jsonl", ("llama", "plain.txt"), {}),
    ]
    before = {path.name for path in Path().iterdir()}
    for kind, message, arguments, how in cases:
        with pytest.raises(kind, match=message):
            generate_texts(*arguments, *["x.jsonl"][len(arguments) - 2 :], **how)
        assert {path.name for path in Path().iterdir()} == before
