"""Facts files: every accepted form, and one message with all that is wrong in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_lfm.artifacts.facts import Fact, FactsFile, as_facts, read_facts_file
from mergekit_lfm.artifacts.statement import Statement
from mergekit_lfm.errors import PlanError

FULL: dict[str, Any] = {
    "prompt": "{} was born in the city of",
    "subject": "Ada Blake",
    "target_new": "Paris",
    "target_true": "Rome",
    "paraphrase_prompts": ["The city where Ada Blake was born is"],
    "neighborhood_prompts": ["Leo Wagner was born in the city of", "Mia Stone was born in the city of"],
    "same_subject": [{"prompt": "Ada Blake works as a", "target": "baker"}],
}
LEAST = {"prompt": "The language of {} is", "subject": "Mia Stone", "target_new": "Danish"}
DATA = {"facts": [FULL, LEAST], "unedited": [{"prompt": "Leo Wagner speaks", "target": "Danish"}]}
READ = FactsFile(
    (
        Fact(
            "{} was born in the city of",
            "Ada Blake",
            "Paris",
            "Rome",
            ("The city where Ada Blake was born is",),
            ("Leo Wagner was born in the city of", "Mia Stone was born in the city of"),
            (Statement("Ada Blake works as a", "baker"),),
        ),
        Fact("The language of {} is", "Mia Stone", "Danish"),
    ),
    (Statement("Leo Wagner speaks", "Danish"),),
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "dump"), [("f.yaml", yaml.safe_dump), ("f.yml", yaml.safe_dump), ("f.json", json.dumps)]
)
def test_a_file_is_read(name: str, dump: Any, tmp_path: Path) -> None:
    path = write(tmp_path / name, dump(DATA))
    assert read_facts_file(path) == as_facts(path) == as_facts(str(path)) == as_facts(DATA) == as_facts(READ) == READ


def test_a_line_for_each_fact(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", f"{json.dumps(FULL)}\n\n{json.dumps(LEAST)}\n")
    assert read_facts_file(path) == FactsFile(READ.facts)


def test_facts_without_a_file() -> None:
    assert as_facts([FULL, LEAST]) == as_facts((FULL, LEAST)) == as_facts(READ.facts) == FactsFile(READ.facts)


def test_the_prompt_about_its_subject() -> None:
    assert [fact.text for fact in READ.facts] == ["Ada Blake was born in the city of", "The language of Mia Stone is"]


def test_data_are_as_in_a_file_without_empty_entries() -> None:
    assert READ.as_data() == DATA == json.loads(json.dumps(READ.as_data()))
    assert FactsFile(READ.facts[1:]).as_data() == {"facts": [LEAST]}
    assert as_facts(READ.as_data()) == READ


def test_blanks_that_join_are_kept_and_others_are_not_part_of_it() -> None:
    spaced = {"prompt": "The language of {} is ", "subject": " Mia Stone", "target_new": " Danish "}
    (fact,) = as_facts([spaced | {"target_true": " Dutch", "paraphrase_prompts": ["Mia Stone speaks\n"]}]).facts
    assert (fact.text, fact.subject) == ("The language of Mia Stone is", "Mia Stone")
    assert (fact.target_new, fact.target_true, fact.paraphrase_prompts) == (
        " Danish",
        " Dutch",
        ("Mia Stone speaks\n",),
    )
    assert fact.continuation == " Danish"


COUNTERFACT: dict[str, Any] = {
    "case_id": 0,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Shayna does this. Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}


def test_records_of_counterfact(tmp_path: Path) -> None:
    path = write(tmp_path / "counterfact.json", json.dumps([COUNTERFACT, LEAST]))
    assert read_facts_file(path).facts == (
        Fact(
            "The mother tongue of {} is",
            "Danielle Darrieux",
            "English",
            "French",
            ("Shayna does this. Danielle Darrieux, a native",),
            ("The mother tongue of Léon Blum is",),
        ),
        READ.facts[1],
    )


def test_records_of_counterfact_are_checked_likewise() -> None:
    wrong = {**COUNTERFACT, "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "target_new": {"id": "Q1"}}}
    with pytest.raises(PlanError, match=r"facts\[0\].target_new: found nothing, expected text"):
        as_facts([wrong])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjekt": "Ada"}, r"facts\[1\].subjekt: unknown key, did you mean '?subject"),
        ({"subject": None}, r"facts\[1\].subject: found nothing, expected text"),
        ({"subject": " "}, r"facts\[1\].subject: found ' ', expected text"),
        ({"target_new": 1912}, r"facts\[1\].target_new: found 1912, expected text; quote"),
        ({"target_new": False}, r"facts\[1\].target_new: found False, expected text; quote"),
        ({"target_true": ""}, r"facts\[1\].target_true: found '', expected text"),
        (
            {"prompt": "Mia speaks"},
            r"facts\[1\].prompt: found .* expected {} exactly once, .* subject 'Mia Stone' itself",
        ),
        ({"join": 3}, r"facts\[1\].join: found 3, expected the text between"),
        ({"question": ""}, r"facts\[1\].question: found '', expected text"),
        ({"prompt": "{} and {}"}, r"facts\[1\].prompt: found '{} and {}', expected {} exactly once"),
        ({"prompt": ["{} is"]}, r"facts\[1\].prompt: found \['{} is'\], expected text"),
        ({"paraphrase_prompts": "Mia speaks"}, r"facts\[1\].paraphrase_prompts: found 'Mia speaks', expected a list"),
        ({"neighborhood_prompts": ["a", ""]}, r"facts\[1\].neighborhood_prompts: found .* expected a list of texts"),
        ({"same_subject": {"prompt": "a", "target": "b"}}, r"facts\[1\].same_subject: found .* expected a list of"),
        ({"same_subject": [{"prompt": "a"}]}, r"facts\[1\].same_subject\[0\]: found .*expected {prompt, target}"),
        ({"same_subject": [{"prompt": "a", "target": 3}]}, r"facts\[1\].same_subject\[0\]: found .*both text"),
        ({"same_subject": [{"prompt": "a", "target": "b", "join": 1}]}, r"same_subject\[0\].join: found 1, expected"),
    ],
)
def test_errors_in_a_fact_are_reported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        as_facts({"facts": [FULL, LEAST | change]})


@pytest.mark.parametrize(
    "data",
    [None, "text", 3, [], {}, {"facts": []}, {"facts": "Ada"}, {"facts": {"prompt": "{} is"}}, {"fact": [LEAST]}],
)
def test_data_that_are_not_a_list_of_facts_are_refused(data: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "f.json", json.dumps(data))
    with pytest.raises(
        PlanError, match=r"f\.json: found .*, expected `facts`, a list of mappings with prompt, subject"
    ):
        read_facts_file(path)


def test_all_problems_are_said_at_once() -> None:
    wrong = {
        "facts": [LEAST | {"subjekt": 1, "target_new": ""}, 3, LEAST | {"prompt": "{}{}"}, LEAST],
        "unedited": [{"prompt": "a", "targett": "b"}],
        "uneditet": [],
    }
    with pytest.raises(PlanError) as raised:
        as_facts(wrong)
    message = str(raised.value)
    assert "6 problems" in message
    for part in (
        "facts[0].subjekt",
        "facts[0].target_new",
        "facts[1]: found 3",
        "facts[2].prompt",
        "unedited[0]",
        "uneditet",
    ):
        assert part in message


@pytest.mark.parametrize(("target", "says"), [("Dutch", "has two targets"), ("Danish", "is given twice")])
def test_a_fact_is_there_once(target: str, says: str) -> None:
    with pytest.raises(PlanError, match=rf"facts\[2\]: 'The language of Mia Stone is' {says}, here and in facts\[1\]"):
        as_facts([FULL, LEAST, LEAST | {"target_new": target}])
    other = as_facts([LEAST, LEAST | {"prompt": "{} speaks", "target_new": target}, LEAST | {"subject": "Ada"}])
    assert len(other.facts) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.json", b"{", r"f\.json: not JSON"),
        ("f.jsonl", b"{}\n{", r"f\.jsonl: line 2: not JSON"),
        ("f.yaml", b"facts: [", r"f\.yaml"),
        ("f.yaml", b"facts: []\nfacts: []", r"f\.yaml"),
        ("f.yaml", b"\xff\xfe\x00", r"f\.yaml: cannot be read: it is not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        read_facts_file(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.yaml: cannot be read: No such file"):
        read_facts_file(tmp_path / "none.yaml")
