"""Records of published data sets as facts: each layout as its authors publish it, with texts made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_lfm.artifacts.facts import Fact, as_facts, read_facts_file
from mergekit_lfm.artifacts.statement import Statement
from mergekit_lfm.errors import PlanError

REWRITE: dict[str, Any] = {
    "prompt": "{} plays the",
    "relation_id": "P1303",
    "target_new": {"str": "flute", "id": "Q1"},
    "target_true": {"str": "piano", "id": "Q2"},
    "subject": "Ada Blake",
    "question": "What does Ada Blake play?",
}
OTHER = REWRITE | {"subject": "Leo Wagner", "question": "What does Leo Wagner play?"}
MQUAKE: dict[str, Any] = {
    "case_id": 1,
    "requested_rewrite": [REWRITE, OTHER],
    "questions": ["Who makes the instrument that Ada Blake plays?"],
    "answer": "Stone",
    "answer_alias": [],
    "new_answer": "Moreau",
    "new_answer_alias": [],
    "single_hops": [{"question": "What?", "cloze": "Ada plays", "answer": "piano", "answer_alias": []}],
    "new_single_hops": [],
    "orig": {"triples": []},
}
ZSRE: dict[str, Any] = {
    "subject": "Watts Tower",
    "src": "Which company built Watts Tower?",
    "pred": "Stone",
    "rephrase": "By which company was Watts Tower built?",
    "alt": "Moreau",
    "answers": ["Hayes & Sons", "Hayes"],
    "loc": "nq question: who sings the song of the sea",
    "loc_ans": "Mia Stone",
    "cond": "Stone >> Moreau || Which company built Watts Tower?",
}
EASYEDIT: dict[str, Any] = {
    "case_id": 0,
    "prompt": "The instrument of Ada Blake is the",
    "subject": "Ada Blake",
    "target_new": "flute",
    "ground_truth": "piano",
    "rephrase_prompt": "Ada Blake performs on the",
    "locality_prompt": "Leo Wagner plays the",
    "locality_ground_truth": "piano",
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Ada Blake",
    "prompt": "The place of birth of Ada Blake is",
    "target_new": "Paris",
    "ground_truth": ["Rome"],
    "portability": {"Reasoning": [{"prompt": "Ada Blake was born in the country", "ground_truth": [["France"]]}]},
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The job of Ada Blake is", "ground_truth": [["baker", "a baker"]]},
            {"prompt": "The job of Leo Wagner is", "ground_truth": [["pilot"]]},
        ],
        "Forgetfulness": [{"prompt": ["Ada Blake also lived in"], "ground_truth": ["Oslo"]}],
    },
}
WIKIBIO = {"concept": "Ada Blake", "text": "This is about Ada Blake. She", "labels": "bakes.", "locality": {}}


def test_mquake_has_several_facts_in_a_record_and_repeats_them() -> None:
    facts = as_facts([MQUAKE, MQUAKE | {"case_id": 2, "requested_rewrite": [OTHER]}]).facts
    assert facts == (
        Fact("{} plays the", "Ada Blake", "flute", "piano", question="What does Ada Blake play?"),
        Fact("{} plays the", "Leo Wagner", "flute", "piano", question="What does Leo Wagner play?"),
    )


def test_two_targets_in_two_records_are_refused() -> None:
    drum = {**REWRITE, "target_new": {"str": "drum"}}
    with pytest.raises(PlanError, match=r"facts\[1\]: 'Ada Blake plays the' has two targets, here and in facts\[0\]"):
        as_facts([MQUAKE, MQUAKE | {"requested_rewrite": [drum]}])


def test_zsre_teaches_its_alternative() -> None:
    facts = as_facts([ZSRE])
    assert facts.facts == (
        Fact("Which company built {}?", "Watts Tower", "Moreau", "Hayes & Sons", (ZSRE["rephrase"],)),
    )
    assert facts.unedited == (Statement("who sings the song of the sea?", "Mia Stone"),)


@pytest.mark.parametrize("lacking", [{"loc": None}, {"loc_ans": []}, {"loc_ans": " "}])
def test_zsre_without_an_unrelated_answer_has_no_unedited_fact(lacking: dict[str, Any]) -> None:
    assert as_facts([ZSRE | lacking]).unedited == ()


def test_zsre_without_an_alternative_teaches_the_answer() -> None:
    (fact,) = as_facts([{key: value for key, value in ZSRE.items() if key not in ("alt", "loc")}]).facts
    assert (fact.target_new, fact.target_true) == ("Hayes & Sons", None)


def test_easyedit_has_the_subject_in_its_prompt() -> None:
    facts = as_facts([EASYEDIT])
    instrument = "The instrument of {} is the"
    assert facts.facts == (Fact(instrument, "Ada Blake", "flute", "piano", ("Ada Blake performs on the",)),)
    assert facts.unedited == (Statement("Leo Wagner plays the", "piano"),)


def test_knowedit_has_answers_in_lists() -> None:
    facts = as_facts([KNOWEDIT])
    same = (Statement("The job of Ada Blake is", "baker"), Statement("Ada Blake also lived in", "Oslo"))
    assert facts.facts == (Fact("The place of birth of {} is", "Ada Blake", "Paris", "Rome", same_subject=same),)
    assert facts.unedited == (Statement("The job of Leo Wagner is", "pilot"),)


def test_wikibio_has_names_of_its_own() -> None:
    assert as_facts([WIKIBIO]).facts == (Fact("This is about {}. She", "Ada Blake", "bakes."),)


@pytest.mark.parametrize("nothing", ["<|endoftext|>", "", [], "flute"])
def test_a_ground_truth_that_is_none_is_no_target(nothing: Any) -> None:
    (fact,) = as_facts([EASYEDIT | {"ground_truth": nothing}]).facts
    assert fact.target_true is None


@pytest.mark.parametrize(
    ("prompt", "subject", "opened"),
    [
        ("Alabama is where Al lives, says Al", "Al", "Alabama is where {} lives, says Al"),
        ("红楼梦的作者是", "红楼梦", "{}的作者是"),
        ("Who wrote C++?", "C++", "Who wrote {}?"),
    ],
)
def test_the_first_mention_of_the_subject_counts(prompt: str, subject: str, opened: str) -> None:
    (fact,) = as_facts([{"prompt": prompt, "subject": subject, "target_new": "x"}]).facts
    assert (fact.prompt, fact.text) == (opened, prompt)


def test_a_record_without_its_subject_is_reported() -> None:
    with pytest.raises(PlanError, match=r"facts\[0\].prompt: found 'Who built it\?', expected .*'Watts Tower' itself"):
        as_facts([ZSRE | {"src": "Who built it?"}])
    with pytest.raises(PlanError, match=r"facts\[0\].subject: found nothing, expected text"):
        as_facts([MQUAKE | {"requested_rewrite": []}])


RECORDS = [ZSRE, EASYEDIT, KNOWEDIT, MQUAKE | {"requested_rewrite": REWRITE}]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.yaml"])
def test_files_of_windows_are_read(name: str, mark: bytes, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    text = lines if name == "f.jsonl" else json.dumps(RECORDS, indent=1)
    (tmp_path / name).write_bytes(mark + text.replace("\n", "\r\n").encode())
    assert read_facts_file(tmp_path / name) == as_facts(RECORDS)


def test_a_line_of_json_may_hold_another_kind_of_line_end(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps(EASYEDIT | {"target_new": "a\u2028b"}, ensure_ascii=False), "utf-8")
    assert read_facts_file(tmp_path / "f.jsonl").facts[0].target_new == "a\u2028b"
