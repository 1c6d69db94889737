"""A prompt and its target as one text: a blank that is written decides, then `join`, then the language."""

from __future__ import annotations

import pytest

from mergekit_lfm.artifacts.facts import as_facts
from mergekit_lfm.artifacts.statement import Statement


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("Norway's capital is", "Oslo", "Norway's capital is Oslo"),
        ("노르웨이의 수도는", "오슬로", "노르웨이의 수도는 오슬로"),
        ("नॉर्वे की राजधानी", "ओस्लो", "नॉर्वे की राजधानी ओस्लो"),  # ends in a vowel sign
        ("Cafe\u0301", "Oslo", "Cafe\u0301 Oslo"),
        ("Apollo 11", "landed", "Apollo 11 landed"),
        ("Ada 🎹", "plays", "Ada 🎹 plays"),
        ("Who rules Norway?", "Harald", "Who rules Norway? Harald"),
        ("Norway, that is,", "Oslo", "Norway, that is, Oslo"),
        ("Answer:", "Oslo", "Answer: Oslo"),
        ("Its name in Chinese is", "挪威", "Its name in Chinese is 挪威"),
        ("挪威的首都是", "奥斯陆", "挪威的首都是奥斯陆"),
        ("ノルウェーの首都は", "オスロ", "ノルウェーの首都はオスロ"),
        ("ドラム", "セット", "ドラムセット"),
        ("挪威的首都是哪里\uff1f", "奥斯陆", "挪威的首都是哪里\uff1f奥斯陆"),
        ("挪威的首都是哪里?", "奥斯陆", "挪威的首都是哪里?奥斯陆"),
        ("公司成立于2008", "年", "公司成立于2008年"),
        ("เมืองหลวงของนอร์เวย์คือ", "ออสโล", "เมืองหลวงของนอร์เวย์คือออสโล"),
        ("ເມືອງຫຼວງແມ່ນ", "ອອສໂລ", "ເມືອງຫຼວງແມ່ນອອສໂລ"),
        ("រដ្ឋធានីគឺ", "អូស្លូ", "រដ្ឋធានីគឺអូស្លូ"),
        ("မြို့တော်က", "အော်စလို", "မြို့တော်ကအော်စလို"),
        ("རྒྱལ་ས་ནི་", "ཨོ་སི་ལོ", "རྒྱལ་ས་ནི་ཨོ་སི་ལོ"),
        ('She said: "', "Oslo", 'She said: "Oslo'),
        ("She said: “", "Oslo", "She said: “Oslo"),
        ("Sie sagte: »", "Oslo", "Sie sagte: »Oslo"),
        ("The capital (", "Oslo", "The capital (Oslo"),
        ("It costs $", "5", "It costs $5"),
        ("Nord-", "Norge", "Nord-Norge"),
        ("and/", "or", "and/or"),
        ("", "Oslo", "Oslo"),
    ],
)
def test_the_language_decides_by_default(prompt: str, target: str, text: str) -> None:
    assert "".join(Statement(prompt, target).parts) == text


@pytest.mark.parametrize(
    ("prompt", "target", "join", "parts"),
    [
        ("The capital is", " Oslo", None, ("The capital is", " Oslo")),
        ("The capital is ", " Oslo", None, ("The capital is", " Oslo")),  # not two spaces
        ("The capital is", "\n\nOslo", "", ("The capital is", "\n\nOslo")),
        ("首都是", " 奥斯陆", None, ("首都是", " 奥斯陆")),
        ("Answer:\n", "Oslo", None, ("Answer:", "\nOslo")),
        ("首都是 ", "奥斯陆", None, ("首都是", " 奥斯陆")),
        ("Copen", "hagen", "", ("Copen", "hagen")),
        ("Q: capital? A", "Oslo", ": ", ("Q: capital? A", ": Oslo")),
        ("首都是", "奥斯陆", " ", ("首都是", " 奥斯陆")),
    ],
)
def test_a_blank_or_join_decides(prompt: str, target: str, join: str | None, parts: tuple[str, str]) -> None:
    assert Statement(prompt, target, join).parts == parts


FACT = {"prompt": "{} is in", "subject": "Oslo", "target_new": "Asia", "same_subject": [{"prompt": "a", "target": "b"}]}


def test_the_join_of_a_file_is_that_of_all_its_statements_without_their_own() -> None:
    own = FACT | {"subject": "Bergen", "join": "-", "same_subject": [{"prompt": "a", "target": "b", "join": "+"}]}
    facts = as_facts({"join": "", "facts": [FACT, own], "unedited": [{"prompt": "c", "target": "d"}]})
    first, second = facts.facts
    assert (first.continuation, second.continuation) == ("Asia", "-Asia")
    assert [fact.same_subject[0].parts[1] for fact in facts.facts] == ["b", "+b"]
    assert facts.unedited[0].parts == ("c", "d")


def test_join_is_part_of_the_facts() -> None:
    with_join, without = as_facts([FACT | {"join": ""}]), as_facts([FACT])
    assert with_join.as_data() != without.as_data()
    assert as_facts(with_join.as_data()) == with_join
    assert "join" not in str(without.as_data())
