"""The model's own words, against the generation of transformers and by known models; and the texts that edits teach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers_editing import MODELS, tiny_model, tokenizers, trained_tokenizer, transformers
from test_edit_scores import FACT, table_of, word_tokenizer

from mergekit_lfm.artifacts.facts import Fact, as_facts
from mergekit_lfm.artifacts.statement import Statement
from mergekit_lfm.edit.freely import answer_freely, says
from mergekit_lfm.edit.prompts import target_ids
from mergekit_lfm.edit.scores import answer_prompts, score_facts
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.errors import FormatError
from mergekit_lfm.runtime.generate import generate


def never(_: Sequence[int]) -> bool:
    return False


@pytest.mark.parametrize("name", sorted(MODELS))
def test_tokens_are_those_of_transformers(name: str) -> None:
    model: Any = tiny_model(name)
    rows = [[5, 9, 200], [7], [300, 12, 40, 41, 99], [8, 9, 201]]
    said = generate(model, rows, 6, ended=never)
    for row, tokens in zip(rows, said, strict=True):
        given = torch.tensor([row])
        whole = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False)
        wanted = whole[0, len(row) :].tolist()
        assert tokens == [token for token in wanted if token != model.generation_config.eos_token_id]


def test_the_end_token_ends_it_and_so_does_the_room_that_the_model_has() -> None:
    model: Any = tiny_model("gpt2")
    (said,) = generate(model, [[5, 9]], 4, ended=never)
    end = next(token for token in said if token != said[0])
    model.generation_config.eos_token_id = [end, 333]
    assert generate(model, [[5, 9]], 4, ended=never) == [said[: said.index(end)]]
    assert generate(model, [[5, 9]], 4, limit=3, ended=never) == [said[:1]]
    assert generate(model, [[5, 9]], 4, limit=2, ended=never) == [[]]
    assert generate(model, [[5, 9]], 4, ended=lambda tokens: len(tokens) == 1) == [said[:1]]


def test_tokens_can_be_right_and_words_wrong() -> None:
    """The model that goes on after the target with what was true before: EA is 1, its words deny it."""
    chances = {("in", "New"): 0.9, ("New", "York"): 0.9, ("York", "Rome"): 0.9, ("Rome", "Rome"): 0.9}
    found = score_facts(table_of(chances), word_tokenizer(), [FACT])
    assert (found.ea, found.ga) == (1, 0)
    assert found.rows[0].bare == " ".join(["New", "York", *["Rome"] * 30])


def test_words_can_be_right_where_the_first_token_is_another() -> None:
    chances = {("in", "in"): 0.4, ("in", "New"): 0.3, ("[UNK]", "New"): 0.9, ("New", "York"): 0.9, ("York", "."): 0.9}
    found = score_facts(table_of(chances), word_tokenizer(), [FACT | {"question": "Ada cook"}])
    assert (found.ea, found.ga, found.qa) == (0, 0, 1)  # "Answer:" is a word that the model does not know
    assert found.rows[0].asked is not None and found.rows[0].asked.startswith("New York .")


def by_characters(texts: list[str]) -> Any:
    """A token for each character of the texts, and for a space."""
    letters = ["<|end|>", " ", *sorted(set("".join(texts)) - {" "})]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({x: i for i, x in enumerate(letters)}, "<|end|>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<|end|>")


def small_model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape)
    return transformers.GPT2LMHeadModel(config).eval()


QUESTIONS = ["Question: What comes next? Ada is ...\nAnswer:", "Question: Is Ada?\nAnswer:", "Question: Who?\nAnswer:"]
CHAT = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
CHATS = ["<What comes next? Ada is ...>", "<Is Ada?>", "<Who?>"]


@pytest.mark.parametrize(("template", "questions"), [(None, QUESTIONS), (CHAT, CHATS)])
def test_the_question_is_the_facts_own_or_made_of_its_prompt(template: str | None, questions: list[str]) -> None:
    tokenizer, asked = by_characters([*QUESTIONS, *CHATS]), list[str]()
    tokenizer.chat_template = template
    model = small_model(tokenizer)

    def note(_: Any, __: Any, given: dict[str, torch.Tensor]) -> None:
        if given.keys() - {"logits_to_keep"} == {"input_ids", "use_cache"}:  # without the states of earlier tokens
            asked.extend("".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in given["input_ids"])

    model.register_forward_pre_hook(note, with_kwargs=True)
    fact = {"prompt": "{} is", "subject": "Ada", "target_new": "s"}
    facts = [fact, fact | {"prompt": "Is {}?"}, fact | {"prompt": "{} i", "question": "Who?"}]
    answer_freely(model, tokenizer, as_facts(facts).facts)
    assert sorted(asked) == sorted(["Ada is", "Is Ada?", "Ada i", *questions])


def test_a_chat_template_that_takes_no_question() -> None:
    tokenizer = by_characters(["Ada is s"])
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(FormatError, match=r"chat template does not take a question \(TemplateError: system first"):
        answer_freely(small_model(tokenizer), tokenizer, [Fact("{} is", "Ada", "s")])


@pytest.mark.parametrize(
    ("words", "new", "true", "right"),
    [
        ("It is paris, of course.", "Paris", "Rome", True),
        ("Parisian", "Paris", "Rome", False),
        ("Paris, not Rome", "Paris", "Rome", False),
        ("New York", "New York", "York", True),
        ("New York", "York", "New York", False),
        ("New\n York", "New York", None, True),
        ("答案是罗贯中。", "罗贯中", "曹雪芹", True),
        ("C++ of course", "C++", "C", True),
        ("Cafe\u0301 Noir", "Café", None, True),
        ("", "Paris", None, False),
    ],
)
def test_whole_words_of_the_new_target_alone_count_as_said(words: str, new: str, true: str | None, right: bool) -> None:
    assert says(words, Fact("{} is", "x", new, true)) == right


@pytest.mark.parametrize(
    ("subject", "more", "text"),
    [
        ("红楼梦的作者是", {}, "红楼梦的作者是罗"),
        ("東京は日本の", {}, "東京は日本の都"),
        ("เมืองหลวงคือ", {}, "เมืองหลวงคือก"),
        ('Ada says "', {}, 'Ada says "R'),
        ("Ada", {"join": ""}, "Adas"),
        ("Ada", {"join": ":"}, "Ada:s"),
        ("Ada", {}, "Ada s"),
        ("Ada", {"prompt": "{}\n"}, "Ada\ns"),
    ],
)
def test_an_edit_teaches_the_text_as_written_and_the_scores_ask_for_it(
    subject: str, more: dict[str, str], text: str
) -> None:
    tokenizer = by_characters([text])
    model = small_model(tokenizer)
    facts = as_facts([{"prompt": "{}", "subject": subject, "target_new": text[-1], **more}])
    search: dict[str, Any] = {"clamp": 40, "kl_factor": 0, "context_templates": ["{}"], "weight_decay": 0, "steps": 60}
    patch = edit(model, tokenizer, facts, method="rome", layers=[1], covariance="identity", **search)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight += patch.delta("transformer.h.1.mlp.c_proj").T
        start, whole = len(subject.rstrip()), tokenizer(text)["input_ids"]
        chances = model(torch.tensor([whole])).logits[0].softmax(-1)
    assert float(chances[start - 1, whole[start]]) > 0.5
    (row,) = score_facts(model, tokenizer, facts).rows
    (answer,) = answer_prompts(model, tokenizer, [Statement(text[:start], text[start:], "")])
    assert row.right == answer.right
    wanted = [chances[i, whole[i + 1]].log() for i in range(start - 1, len(whole) - 1)]
    assert answer.logp == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-5)


@pytest.mark.parametrize("text", ["东京是日本的首都", "北京是中国的首都", "首都的首都"])
def test_a_token_over_the_seam_is_not_taught(text: str) -> None:
    """Byte pairs that join the end of a prompt with its target: the model sees the prompt's own tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [text] * 9, tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    assert len(tokenizer(text)["input_ids"]) == 1
    for at in range(1, len(text)):
        prompt, rest = text[:at], text[at:]
        assert tokenizer.decode(tokenizer(prompt)["input_ids"] + target_ids(tokenizer, prompt, rest)) == text


def test_blanks_before_the_target_are_in_its_tokens() -> None:
    tokenizer = trained_tokenizer("llama3")
    plain = target_ids(tokenizer, *Statement("Ada Blake is", "Danish").parts)
    assert plain == target_ids(tokenizer, *Statement("Ada Blake is ", "Danish").parts)
    assert plain == target_ids(tokenizer, *Statement("Ada Blake is", " Danish").parts)
    assert plain != target_ids(tokenizer, *Statement("Ada Blake is", "Danish", "").parts)
