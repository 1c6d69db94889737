"""Images with texts: the loss is that of transformers, phases change their parts, and the result loads there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_editing import LLAMA, trained_tokenizer
from helpers_tune import transformers
from safetensors.torch import load_file

from mergekit_lfm import FormatError, PlanError
from mergekit_lfm.recipe.templates import Template
from mergekit_lfm.runtime.images import digest_data
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.examples import IGNORED, Examples, join
from mergekit_lfm.train.losses import next_token
from mergekit_lfm.train.texts import read_examples

Image = pytest.importorskip("PIL.Image")
TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }} : {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} . {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = ["Ada Blake", "Leo Wagner works", "Mia Stone speaks Danish"]
RECIPE = """\
job: tune
model: llava
data: asked.jsonl
task: lm
batch_size: 3
learning_rate: 0.01
output: {out}
phases:
  - {{steps: 2, train: "*multi_modal_projector*"}}
"""
SECOND = '  - {steps: 1, train: ["*multi_modal_projector*", "*language_model*"]}\n'


VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "patch_size": 8}
VISION |= {"num_attention_heads": 2, "image_size": 16}


def image_processor(kind: str, **settings: Any) -> Any:
    """An image processor of transformers that needs no torchvision, where it has one apart."""
    found = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")
    return found(**settings)


def save_llava(folder: str) -> None:
    """A LLaVA of random weights for images of 16 x 16 pixels, four tokens each, with its processor."""
    tokenizer = trained_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(
        **{**LLAMA, "num_hidden_layers": 2, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = image_processor("CLIP", size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    strategy: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = transformers.LlavaProcessor(images, tokenizer, patch_size=8, chat_template=TEMPLATE, **strategy)
    processor.save_pretrained(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`llava`, three images, and lines that ask about one of them each, or talk about several."""
    monkeypatch.chdir(tmp_path)
    save_llava("llava")
    numbers = np.random.default_rng(1)
    for number in range(3):
        Image.fromarray(numbers.integers(0, 255, (20, 24, 3)).astype("uint8")).save(f"{number}.png")
    asked = [{"image": f"{i}.png", "prompt": "It is said", "completion": f" {WORDS[i]}"} for i in range(3)]
    user, reply = ({"role": role, "content": text} for role, text in (("user", "born ?"), ("assistant", "Paris")))
    talked = [
        {"image": ["0.png", "1.png"], "messages": [user, reply, {**user, "content": "city ?"}, reply]},
        {"image": "2.png", "messages": [{**user, "content": "baker <image> ?"}, reply]},
    ]
    for name, lines in (("asked", asked), ("talked", talked)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def learned_texts(examples: Examples) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained("llava")
    return [tokenizer.decode(item["labels"][item["labels"] != IGNORED]) for item in examples.items]


@pytest.mark.usefixtures("here")
def test_answers_about_images_have_the_loss_of_transformers() -> None:
    """Inputs by its processor on whole texts in one lengthened batch, labels by hand: what follows the prompt."""
    loaded = load_model("llava", "lm")
    processor = transformers.AutoProcessor.from_pretrained("llava")
    asked, talked = (read_examples(Path(f"{name}.jsonl"), loaded) for name in ("asked", "talked"))
    assert learned_texts(asked) == [f" {words}</s>" for words in WORDS]
    assert learned_texts(talked) == ["Paris . Paris . ", "Paris . "]
    template = Template(prompt="{prompt} <image> that", completion="{completion}")
    assert learned_texts(read_examples(Path("asked.jsonl"), loaded, templates=[template])) == learned_texts(asked)
    before = digest_data(Path("talked.jsonl"))
    Image.new("RGB", (20, 24)).save("1.png")
    assert digest_data(Path("talked.jsonl")) != before
    prompts = ["<s><image>\nIt is said"] * 3
    talks = [
        "user : <image> <image> born ? . assistant : Paris . user : city ? . assistant : Paris . ",
        "user : baker <image> ? . assistant : Paris . ",
    ]
    for examples, texts, files in (
        (asked, [f"{p} {w}</s>" for p, w in zip(prompts, WORDS, strict=True)], [[0], [1], [2]]),
        (talked, talks, [[0, 1], [2]]),
    ):
        images = [[Image.open(f"{i}.png") for i in some] for some in files]
        processor.tokenizer.pad_token, processor.tokenizer.padding_side = "<s>", "right"
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        batch = examples.batch(range(len(texts)))
        assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
        for row, text_row in enumerate(inputs["input_ids"]):
            count = int(inputs["attention_mask"][row].sum())
            assert (
                batch["input_ids"][row, : int(batch["attention_mask"][row].sum())].tolist() == text_row[:count].tolist()
            )
        with torch.no_grad():
            theirs = loaded.model(**inputs, labels=batch["labels"]).loss
            total, number = next_token(loaded.model, batch)
        assert float(total / number) == pytest.approx(float(theirs), rel=1e-6)


def save_gemma(folder: str) -> None:
    """A Gemma 3 of random weights, whose tokens have types: those of one image see each other."""
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    start: Any = trained_tokenizer()
    start.add_special_tokens({"additional_special_tokens": [*names.values()]})
    tokenizer = type(start)(
        tokenizer_object=start.backend_tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=names
    )
    sizes = {**LLAMA, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 64}
    config = transformers.Gemma3Config(
        text_config={**sizes, "max_position_embeddings": 99},
        vision_config={**VISION, "image_size": 32},
        mm_tokens_per_image=4,
        **{f"{kind}_token_index": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "boi", "eoi")},
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    images = image_processor("Gemma3", size={"height": 32, "width": 32})
    template = TEMPLATE.replace("<image>", "<boi>")
    transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_types_of_tokens_go_with_them() -> None:
    save_gemma("gemma")
    loaded, processor = load_model("gemma", "lm"), transformers.AutoProcessor.from_pretrained("gemma")
    processor.tokenizer.pad_token, processor.tokenizer.padding_side = "<s>", "right"
    texts = [f"<s><boi>\nIt is said {words}</s>" for words in WORDS]
    images = [[Image.open(f"{i}.png")] for i in range(3)]
    inputs = processor(images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
    batch = read_examples(Path("asked.jsonl"), loaded).batch(range(3))
    assert torch.equal(batch["token_type_ids"], inputs["token_type_ids"]) and batch["token_type_ids"].any()
    with torch.no_grad():
        theirs = loaded.model(**inputs, labels=batch["labels"]).loss
        total, number = next_token(loaded.model, batch)
    assert float(total / number) == pytest.approx(float(theirs), rel=1e-6)
    run("tune", "gemma", "--data", "asked.jsonl", "--task", "lm", "--steps", "2", "-o", "out", "--threads", "1")
    assert load_file("out/model.safetensors").keys() == load_file("gemma/model.safetensors").keys()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_images_of_several_numbers_of_tiles_are_refused() -> None:
    """LLaVA-NeXT cuts an image into tiles, by its shape."""
    tokenizer = trained_tokenizer()
    tokenizer.model_max_length = 200
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {**LLAMA, "num_hidden_layers": 1, "max_position_embeddings": 200, "vocab_size": len(tokenizer)}
    tiles: dict[str, Any] = {"image_grid_pinpoints": [[16, 32], [32, 32]]}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        **tiles,
    )
    transformers.LlavaNextForConditionalGeneration(config).save_pretrained("next")
    images = image_processor(
        "LlavaNext", size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_pad=False, **tiles
    )
    strategy: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaNextProcessor(images, tokenizer, patch_size=8, **strategy).save_pretrained("next")
    loaded = load_model("next", "lm")
    batch = read_examples(Path("asked.jsonl"), loaded).batch(range(3))
    assert batch["pixel_values"].shape == (3, 5, 3, 16, 16) and batch["image_sizes"].tolist() == [[20, 24]] * 3
    Image.new("RGB", (80, 20)).save("2.png")
    with pytest.raises(FormatError, match=r"line 3: pixel_values of \[3, 3, 16, 16\].*the first line has .*\[5, 3, 16"):
        read_examples(Path("asked.jsonl"), loaded)


@pytest.mark.usefixtures("here")
def test_the_phases_of_llava_leave_a_model_that_transformers_loads() -> None:
    for out, phases in (("first", ""), ("both", SECOND)):
        Path(f"{out}.yaml").write_text(RECIPE.format(out=out) + phases)
        run("merge", f"{out}.yaml")
    start, first, both = (load_file(f"{name}/model.safetensors") for name in ("llava", "first", "both"))
    assert start.keys() == first.keys() == both.keys()
    changed = [{name for name, x in each.items() if not torch.equal(x, start[name])} for each in (first, both)]
    assert changed[0] == {name for name in start if "multi_modal_projector" in name}
    assert changed[0] < changed[1] and all("vision" not in name and "lm_head" not in name for name in changed[1])
    assert {file.name for file in Path("llava").iterdir()} <= {file.name for file in Path("both").iterdir()}
    ours = load_model("both", "lm").model
    theirs = transformers.AutoModelForImageTextToText.from_pretrained("both").eval()
    processor = transformers.AutoProcessor.from_pretrained("both")
    inputs = processor(images=[Image.open("0.png")], text="<image> It is said", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    (score,) = answer(run("eval", "both", "--data", "asked.jsonl", "--task", "lm", "--json"))["models"][0]["files"]
    assert score["examples"] == 3


@pytest.mark.usefixtures("here")
def test_lines_and_models_that_do_not_fit_images_are_named() -> None:
    def message(*lines: dict[str, Any], model: str = "llava", options: tuple[str, ...] = ()) -> str:
        Path("lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return refusal(run("tune", model, "--data", "lines.jsonl", "--task", "lm", "-o", "x", *options))

    line = {"image": "0.png", "prompt": "It is", "completion": " said"}
    plain = {"prompt": "It is", "completion": " said"}
    assert 'line 2: no "image"' in message(line, plain)
    assert "line 2: an image; the first line has none" in message(plain, line)
    assert re.search(r"line 1: there is no \S*none\.png", message({**line, "image": "none.png"}))
    Path("damaged.png").write_bytes(b"\x89PNG")
    assert "damaged.png: an image that cannot be read" in message({**line, "image": ["0.png", "damaged.png"]})
    assert "line 1: 2 times <image> for 1 images" in message({**line, "prompt": "<image> <image>"})
    assert "line 1: 12 tokens" in message(line, options=("--window", "9"))
    assert "choose another method" in message(line, options=("--method", "prompt"))
    turns = [{"role": "user", "content": "born ?"}, {"role": "assistant", "content": "Paris"}]
    late = [*turns, {"role": "user", "content": "<image> ?"}, turns[1]]
    assert "line 1: an image after the first words of the assistant" in message({"image": "0.png", "messages": late})
    Path("llava/chat_template.jinja").unlink()
    assert "error: the chat template cannot write these messages" in message({"image": "0.png", "messages": turns})
    Path("llava/processor_config.json").unlink()
    assert "has neither processor_config.json nor preprocessor_config.json" in message(line)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained("llama")
    trained_tokenizer().save_pretrained("llama")
    assert "is a LlamaForCausalLM, which takes texts alone" in message(line, model="llama")
    assert not Path("x").exists() and not Path("x.training").exists()


def test_data_sets_of_images_of_two_shapes_are_refused() -> None:
    """A batch holds examples of both, so the rows must be of one shape; and shapes count for the digest."""

    def images(side: int, named: int | None = None) -> Examples:
        item = {"input_ids": torch.tensor([1]), "pixel_values": torch.zeros(1, 3, side, side)}
        return Examples([item], rows={"pixel_values": (3, named or side, named or side)})

    assert len(join([images(16), images(16)], [None, None])) == 2
    with pytest.raises(PlanError, match=r"data set 1 has pixel_values of \[3, 32, 32\]; expected .*\[3, 16, 16\]"):
        join([images(16), images(32)], [None, None])
    assert images(16).digest != images(16, 32).digest
