"""PTR: classes by the words of a masked language model, against transformers' own model and tokens; and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_tune import PEOPLE, RULES, masked, transformers  # noqa: F401
from safetensors.torch import load_file

from mergekit_lfm import evaluate_models, tune_model
from mergekit_lfm.artifacts.attachment import open_attachment
from mergekit_lfm.artifacts.rules import make_rules
from mergekit_lfm.errors import FormatError
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.runtime.templates import lay_out, with_template
from mergekit_lfm.train.losses import LOSSES, with_words
from mergekit_lfm.train.texts import read_examples

HOW: dict[str, Any] = {"task": "classification", "method": "ptr", "batch_size": 15, "threads": 1}
CLASSES = [word for pair in RULES["classes"] for word in pair]


@pytest.fixture(scope="module")
def made(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A template after a hundred steps, and one as it was at first."""
    root = tmp_path_factory.mktemp("templates")
    given = {"parameters": {"template": str(masked / "rules.yaml")}, **HOW}
    for name, steps, rate in (("tuned", 100, 0.05), ("first", 1, 1e-12)):
        out = root / f"{name}.safetensors"
        tune_model(masked / "masked", masked / "a.jsonl", out, steps=steps, learning_rate=rate, **given)
    return root


def words_by_hand(folder: Path, text: str, values: torch.Tensor) -> list[dict[str, float]]:
    """p of each word for each place, float64, among those that classes have there: of the whole text's tokens at once.

    values: vectors in place of the template's words.
    """
    model = transformers.BertForMaskedLM.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(RULES["template"].replace("{text}", text).replace("[MASK]", "<mask>"))["input_ids"]
    places = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    embedded = model.get_input_embeddings()(torch.tensor([ids])).detach()
    own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    soft = [i for i in range(1 + own, len(ids) - 1) if i not in places]
    embedded[0, soft] = values.double()
    with torch.no_grad():
        odds = model(inputs_embeds=embedded).logits[0, places].softmax(-1)
    found = []
    for place, each in enumerate(odds):
        p = {pair[place]: float(each[tokenizer.convert_tokens_to_ids(f"Ġ{pair[place]}")]) for pair in RULES["classes"]}
        found.append({word: x / sum(p.values()) for word, x in p.items()})
    return found


@pytest.mark.parametrize("name", ["first", "tuned"])
def test_a_class_is_the_product_of_its_words(name: str, made: Path, masked: Path) -> None:  # noqa: F811
    """Of texts of several lengths in one batch; the loss is -ln p of the class, and the mean over places of -ln p."""
    file = made / f"{name}.safetensors"
    base: Any = load_model(masked / "masked", "masked_lm", dtype="float64")
    loaded: Any = with_template(base, open_attachment(file))
    batch = read_examples(masked / "b.jsonl", loaded).batch(range(6))
    values, total, trained = load_file(file)["values"], 0.0, 0.0
    embed = loaded.model.get_input_embeddings().weight
    layout = lay_out(make_rules(RULES, "rules"), loaded.tokenizer)
    assert torch.allclose(values, embed[layout.soft].float(), atol=1e-6) == (name == "first")
    with torch.no_grad():
        found = loaded.model(batch["input_ids"], batch["attention_mask"]).softmax(-1)
    assert len({int(count) for count in batch["attention_mask"].sum(1)}) > 1
    lines = [json.loads(line) for line in (masked / "b.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: len(loaded.tokenizer(line["text"])["input_ids"]))  # as they are read
    for row, line in zip(found, lines, strict=True):
        places = words_by_hand(masked / "masked", line["text"], values)
        products = [math.prod(p[word] for p, word in zip(places, pair, strict=True)) for pair in RULES["classes"]]
        expected = torch.tensor(products, dtype=torch.float64) / sum(products)
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=0)
        total -= math.log(expected[line["label"]])
        trained -= math.log(products[line["label"]]) / 2
    loss = with_words(LOSSES["classification"], 2)
    assert float(loss(loaded.model, batch).total.detach()) == pytest.approx(total, rel=1e-9)
    loaded.model.train()
    assert float(loss(loaded.model, batch).total.detach()) == pytest.approx(total + trained, rel=1e-9)


def test_training_finds_the_classes_of_its_texts(made: Path, masked: Path) -> None:  # noqa: F811
    scores = []
    for name in ("first", "tuned"):
        prompt = made / f"{name}.safetensors"
        outcome = evaluate_models(masked / "masked", data=masked / "a.jsonl", task="classification", prompt=prompt)
        (score,) = next(iter(outcome.result.values())).values()
        scores.append(score.accuracy)  # type: ignore[union-attr]
    assert scores[0] <= 0.5 and scores[1] == 1
    arguments = ["--data", str(masked / "a.jsonl"), "--task", "classification", "--json"]
    said = answer(run("eval", str(masked / "masked"), *arguments, "--prompt", str(made / "tuned.safetensors")))
    assert '"accuracy": 1.0' in json.dumps(said)
    described = run("inspect", str(made / "tuned.safetensors")).output
    assert "template" in described and RULES["template"] in described
    how = {**HOW, "parameters": {"template": str(masked / "rules.yaml")}, "loss": {"r3f": 1.0}, "steps": 2}
    tuned = tune_model(masked / "masked", masked / "a.jsonl", made / "smooth.safetensors", **how)
    assert tuned.result.trained == 7 * 32


def test_rules_that_are_none_have_one_message() -> None:
    wrong = {"template": "{text} [MASK] [MASK]", "classes": [["a", "b"], ["a"], "ab", ["a", "b"], [1, ""]]}
    with pytest.raises(FormatError) as caught:
        make_rules(wrong, "r.yaml")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"  classes[{label}]" for label in (1, 2, 3, 4)
    ]
    assert "found the words of class 0; expected others" in str(caught.value)
    for data, message in (
        ([], "expected the keys template and classes"),
        ({"template": "[MASK]", "classes": [["a"], ["b"]]}, "expected {text} once, and [MASK] for each word"),
        ({"template": "{text} [MASK]", "classes": [["a"]]}, "classes: found [['a']]; expected two or more"),
    ):
        with pytest.raises(FormatError) as caught:
            make_rules(data, "r.yaml")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "arguments", "message"),
    [
        (RULES, ["--task", "masked_lm"], "task: found 'masked_lm', expected classification for ptr"),
        (None, [], "parameters.template: "),
        ({**RULES, "classes": [["baker", "bread"], ["city", "works"]]}, [], "found 'bread', "),
        ({"template": "{text}[MASK]", "classes": [["baker"], ["city"]]}, [], "without words; expected some"),
        ({**RULES, "classes": RULES["classes"][:2]}, [], "found the label 2; expected 0 to 1"),
        (RULES, ["--window", "45"], "window is 45, and 9 virtual tokens stand before it"),
        (RULES, ["--loss", "aux_lm=1"], "a method that makes a template"),
    ],
)
def test_templates_that_do_not_fit_are_refused(
    rules: Any,
    arguments: list[str],
    message: str,
    masked: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "rules.yaml").write_text(json.dumps(rules))
    task = [] if "--task" in arguments else ["--task", "classification"]
    more = [] if rules is None else ["--template", str(tmp_path / "rules.yaml")]
    common = ["--data", str(masked / "a.jsonl"), "--method", "ptr", "-o", str(tmp_path / "out.safetensors")]
    assert message in refusal(run("tune", str(masked / "masked"), *common, *task, *more, *arguments))
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("masked", "masked_lm", "found a template for masked_lm, expected classification; give that task"),
        ("wide", "classification", "with this model's tokens it has 7 words of 16 numbers"),
    ],
)
def test_a_template_is_judged_on_its_task_and_model_alone(
    model: str,
    task: str,
    message: str,
    made: Path,
    masked: Path,  # noqa: F811
) -> None:
    folder = masked / model
    if model == "wide":
        folder = made / "wide"
        config = transformers.BertConfig.from_pretrained(masked / "masked", hidden_size=16)
        transformers.BertForMaskedLM(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(masked / "masked").save_pretrained(folder)
    data = ["--data", str(masked / "b.jsonl"), "--task", task]
    prompt = str(made / "tuned.safetensors")
    assert message in refusal(run("eval", str(folder), *data, "--prompt", prompt))
    data = [*data[:-1], "masked_lm"]
    assert "is a template, which changes no weights" in refusal(run("eval", f"{masked / 'masked'}+{prompt}", *data))
