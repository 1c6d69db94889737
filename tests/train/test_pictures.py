"""Images in folders and in lines: their pixels are those of the image processor, and a change of one is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_commands import answer, refusal, run
from helpers_tune import transformers

from mergekit_lfm import tune_model
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.losses import classes
from mergekit_lfm.train.texts import read_examples

Image = pytest.importorskip("PIL.Image")
NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny ViT, `vit`, whose classes are in another order than their names; images by folders, and by lines."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "eel", 1: "cat", 2: "dog"},
        label2id={"eel": 0, "cat": 1, "dog": 2},
        initializer_range=0.3,
    )
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    Path("vit/preprocessor_config.json").write_text(json.dumps(settings))
    numbers, lines = np.random.default_rng(1), list[dict[str, Any]]()
    for number in range(9):
        name = NAMES[number % 3]
        place = Path("pets", name, f"{number}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 80, (20, 24, 3)) + 80 * (number % 3)
        Image.fromarray(pixels.astype("uint8")).save(place)
        lines.append({"image": str(place), "label": config.label2id[name]})
    Path("pets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.mark.usefixtures("here")
def test_folders_and_lines_are_the_same_images_as_the_processor_makes_them() -> None:
    loaded = load_model("vit", "classification")
    by_folder, by_line = (read_examples(Path(name), loaded) for name in ("pets", "pets.jsonl"))
    rows = sorted(by_line.items, key=lambda item: bytes(item["image"].tolist()).decode().split("/")[-2:])
    assert (
        [int(item["labels"]) for item in by_folder.items]
        == [int(item["labels"]) for item in rows]
        == [1] * 3 + [2] * 3 + [0] * 3
    )
    batch = by_folder.batch(range(9))
    processor = transformers.AutoImageProcessor.from_pretrained("vit")
    files = sorted(Path("pets").rglob("*.png"))
    expected = processor(images=[Image.open(file) for file in files], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        theirs = loaded.model(**expected, labels=batch["labels"]).loss
        total, number = classes(loaded.model, batch)
    assert float(total / number) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.usefixtures("here")
def test_a_classifier_of_images_learns_them_and_a_changed_image_is_another_request() -> None:
    how: dict[str, Any] = {"task": "classification", "steps": 30, "batch_size": 9, "threads": 1, "dev": 0.34}
    made = tune_model("vit", "pets", "out", learning_rate=0.01, **how)
    assert made.result.dev_loss is not None and made.result.loss < 0.3
    arguments = ["vit", "--data", "pets", "--task", "classification", "--steps", "30", "--batch-size", "9"]
    arguments += ["--threads", "1", "--dev", "0.34", "--learning-rate", "0.01", "-o", "out"]
    assert answer(run("tune", *arguments, "--json"))["already_there"]
    (score,) = answer(run("eval", "out", "--data", "pets", "--task", "classification", "--json"))["models"][0]["files"]
    loaded = load_model("out", "classification")
    batch = read_examples(Path("pets"), loaded).batch(range(9))
    with torch.no_grad():
        right = loaded.model(pixel_values=batch["pixel_values"]).logits.argmax(1) == batch["labels"]
    assert score["examples"] == 9 and score["correct"] == int(right.sum()) > 3
    Image.new("RGB", (20, 24)).save("pets/cat/0.png")
    assert "out exists" in refusal(run("tune", *arguments))


@pytest.mark.usefixtures("here")
def test_images_that_do_not_fit_are_named() -> None:
    def message(data: str, model: str = "vit") -> str:
        return refusal(run("tune", model, "--data", data, "--task", "classification", "-o", "x", "--threads", "1"))

    Path("lines.jsonl").write_text('{"image": "none.png", "label": 0}\n{"image": "pets/cat/0.png", "label": "cat"}\n')
    found = message("lines.jsonl")
    assert "line 1: there is no" in found and 'line 2: "label" is "cat", not a whole number' in found
    Path("pets/dog/1.png").write_bytes(b"\x89PNG")
    assert "expected images that can be read; found\n  1.png: " in message("pets")
    Path("pets/notes.txt").write_text("mine")
    assert "found notes.txt; move other files away" in message("pets")
    Path("vit/preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in message("pets.jsonl")
    assert not Path("x").exists() and not Path("x.training").exists()
