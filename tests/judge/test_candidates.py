"""Choice of data: the worth of an example by hand, copies of texts, and the order of a pool."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_tune import tiny  # noqa: F401

from mergekit_lfm import PlanError, load_model, select_examples
from mergekit_lfm.judge.candidates import change_tokens, worth
from mergekit_lfm.train.examples import seed_of

TOKENIZER: Any = SimpleNamespace(all_special_ids=[0, 1], mask_token_id=200)


def by_hand(rows: list[list[float]], entropy: float, diversity: float, majority: float) -> float:
    """The paper's sums, one probability at a time."""
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    dominant = means.index(max(means))
    kept = sorted(rows, key=lambda row: -row[dominant])[: max(1, math.ceil(majority * len(rows)))]
    total = sum(-entropy * p * math.log(p) for row in kept for p in row)
    for j, one in enumerate(kept):
        for other in kept[j + 1 :]:
            total += diversity * sum((p - q) * math.log(p / q) for p, q in zip(one, other, strict=True))
    return total


def test_worth_is_that_of_the_paper() -> None:
    """Class 0 has 0.6 on the average: of its four copies the two surest count, 0.9 and 0.8."""
    logs = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.1, 0.9], [0.8, 0.2]], dtype=torch.float64).log()
    unsure = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    apart = 0.1 * math.log(0.9 / 0.8) - 0.1 * math.log(0.1 / 0.2)
    assert worth(logs) == pytest.approx(unsure + apart, abs=1e-12)
    assert worth(logs, entropy=0.5, diversity=3) == pytest.approx(0.5 * unsure + 3 * apart, abs=1e-12)
    assert worth(logs, diversity=0, majority=0.1) == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert worth(torch.full((6, 5), -math.log(5))) == pytest.approx(3 * math.log(5))  # of copies that all say nothing
    random = torch.rand(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for entropy, diversity, majority in ((1, 1, 0.5), (0, 1, 1), (2, 0.3, 0.25)):
        wanted = by_hand(random.tolist(), entropy, diversity, majority)
        for copies in (random, random.flip(0)):
            found = worth(copies.log(), entropy=entropy, diversity=diversity, majority=majority)
            assert found == pytest.approx(wanted, abs=1e-12)


def test_copies_lack_a_share_of_the_tokens_and_keep_special_ones() -> None:
    ids, lengths = [0, *range(2, 102), 1], list[int]()
    for seed in range(50):
        short = change_tokens(ids, TOKENIZER, "delete", 0.2, seed)
        masked = change_tokens(ids, TOKENIZER, "mask", 0.2, seed)
        assert short == [a for a, b in zip(ids, masked, strict=True) if b != 200]
        assert (short[0], short[-1]) == (0, 1) == (masked[0], masked[-1])
        lengths.append(len(short) - 2)
    assert abs(sum(lengths) / 50 - 80) < 3 and len(set(lengths)) > 5  # 80 ± 0.6 for 50 draws of 100
    assert len(change_tokens(ids, TOKENIZER, "delete", 1.0, 3)) == 3  # one is spared
    assert change_tokens([0, 1], TOKENIZER, "delete", 1.0, 3) == [0, 1]


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    shutil.copytree(tiny / "bert", tmp_path / "bert")
    texts = [json.loads(line)["text"] for line in (tiny / "bert.jsonl").read_text().splitlines()]
    lines = [json.dumps({"text": text, "note": i}) + "\n" for i, text in enumerate(dict.fromkeys(texts))]
    (tmp_path / "pool.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_the_order_of_a_pool_is_that_of_copies_judged_one_by_one() -> None:
    outcome = select_examples("bert", "pool.jsonl", "out.jsonl", copies=4, share=0.4)
    loaded = load_model("bert", "classification")
    pool = [line for line in Path("pool.jsonl").read_text().splitlines() if line]
    scores: dict[str, float] = {}
    for line in pool:
        text = json.loads(line)["text"]
        assert loaded.tokenizer is not None
        rows = list[list[float]]()
        for number in range(4):
            ids = change_tokens(
                loaded.tokenizer(text)["input_ids"], loaded.tokenizer, "delete", 0.4, seed_of(0, "copy", text, number)
            )
            with torch.no_grad():
                rows.append(loaded.model(torch.tensor([ids])).logits[0].double().softmax(-1).tolist())
        scores[line] = by_hand(rows, 1, 1, 0.5)
    assert Path("out.jsonl").read_text().splitlines() == sorted(pool, key=lambda line: -scores[line])
    assert outcome.result.worth == pytest.approx(sorted(scores.values(), reverse=True), rel=1e-4)
    assert len({round(each, 6) for each in outcome.result.worth}) > 3
    assert [pool.index(line) * 2 + 1 for line in Path("out.jsonl").read_text().splitlines()] == [*outcome.result.lines]
    Path("turned.jsonl").write_text("\n".join(reversed(pool)))
    select_examples("bert", "turned.jsonl", "same.jsonl", copies=4, share=0.4, most=3)
    assert Path("same.jsonl").read_text().splitlines() == Path("out.jsonl").read_text().splitlines()[:3]


@pytest.mark.usefixtures("here")
def test_select_says_how_many_lines_there_are_and_refuses_places_and_settings() -> None:
    result = run("select", "bert", "--data", "pool.jsonl", "--most", "2", "-o", "out.jsonl")
    assert result.stdout.splitlines()[-1] == "out.jsonl" and "2 of " in result.stderr
    data = answer(run("select", "bert", "--data", "pool.jsonl", "--most", "2", "-o", "o.jsonl", "--json"))
    assert len(data["lines"]) == len(data["worth"]) == 2 < data["pool"]
    for arguments, message in (
        (("-o", "out.jsonl"), "out.jsonl exists"),
        (("-o", "pool.jsonl", "--overwrite"), "pool.jsonl"),
        (("-o", "x.txt"), "expected .jsonl, the pool's"),
        (("-o", "x.jsonl", "--change", "mask"), "no token to mask with"),
        (("-o", "x.jsonl", "--entropy", "0", "--diversity", "0"), "expected numbers from 0, one above"),
    ):
        assert message in refusal(run("select", "bert", "--data", "pool.jsonl", *arguments))
    with pytest.raises(PlanError, match=r"copies is 1; .*share is 0; .*majority is 2"):
        select_examples("bert", "pool.jsonl", "x.jsonl", copies=1, share=0, majority=2)
    assert not Path("x.jsonl").exists()
