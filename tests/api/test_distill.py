"""`distill_model` as a whole: teachers asked before or in each step, recipes, interruptions, refusals, scores."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_commands import refusal, run
from helpers_editing import LLAMA
from helpers_tokenizers import save_llama
from helpers_tune import bits_of, tiny  # noqa: F401
from safetensors.torch import load_file, save_file

from mergekit_lfm import PlanError, distill_model, open_checkpoint
from mergekit_lfm.api.recipes import run_recipe
from mergekit_lfm.distill import teachers as answers
from mergekit_lfm.distill.teachers import Kept
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.texts import read_examples

LINE: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 3e-3, "threads": 1}


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with tiny models, a teacher of each with other weights, and their data."""
    for kind in ("llama", "bert", "encoder"):
        shutil.copytree(tiny / kind, tmp_path / kind)
        shutil.copy(tiny / f"{kind}.jsonl", tmp_path)
        for number in (1, 2):
            teacher = shutil.copytree(tiny / kind, tmp_path / f"{kind}-teacher{number}")
            tensors, generator = load_file(teacher / "model.safetensors"), torch.Generator().manual_seed(number)
            moved = {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in tensors.items()}
            save_file(moved, teacher / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = [
    ("llama", "lm", {"loss": {"kd": 0.9, "task": 0.1}, "top_k": 5}),
    ("llama", "lm", {"loss": {"attention": 1.0, "hint": 1.0, "lit": 0.1, "uld": 0.5}}),
    ("bert", "classification", {"loss": {"kd": 1.0, "vid": 0.1, "angle": 1.0, "triplet": 1.0, "local": 1.0}}),
    ("encoder", "embedding", {"loss": {"embed": 1.0, "distance": 1.0, "l2sp": 0.01}}),
]


@pytest.mark.parametrize(("kind", "task", "how"), CASES)
@pytest.mark.usefixtures("here")
def test_teachers_asked_before_and_in_each_step_give_the_same_bytes(kind: str, task: str, how: dict[str, Any]) -> None:
    """And the student comes nearer to them; nothing but the student's own tensors is in it."""
    both: list[Any] = [f"{kind}-teacher1", {"model": f"{kind}-teacher2", "weight": 3.0}]
    made = [
        distill_model(kind, both, f"{kind}.jsonl", out, task=task, cache=cache, **how, **LINE)
        for out, cache in (("kept", None), ("live", False))
    ]
    files = [Path(out, "model.safetensors").read_bytes() for out in ("kept", "live")]
    assert files[0] == files[1] and made[0].digest == made[1].digest
    assert not Path("kept.training/teachers").exists()
    assert load_file("kept/model.safetensors").keys() == load_file(f"{kind}/model.safetensors").keys()
    record = [json.loads(line)["loss"] for line in Path("kept.training/metrics.jsonl").read_text().splitlines()]
    assert record[-1] < record[0]
    assert distill_model(kind, both, f"{kind}.jsonl", "kept", task=task, **how, **LINE).already_there
    assert "good" in run("verify", "kept").stdout


@pytest.mark.usefixtures("here")
def test_answers_of_a_teacher_survive_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are whole are not made again, and the result has the same bytes; in a cache they stay for others."""
    monkeypatch.setattr(answers, "LARGEST", 1)  # a file for each example
    how: dict[str, Any] = {"task": "lm", **LINE}
    distill_model("llama", "llama-teacher1", "llama.jsonl", "whole", **how)
    save, made = Kept._save, list[int]()

    def stop(self: Kept, tensors: Any, numbers: list[int]) -> None:
        if len(made) == 5:
            raise KeyboardInterrupt
        save(self, tensors, numbers)
        made.extend(numbers)

    monkeypatch.setattr(Kept, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        distill_model("llama", "llama-teacher1", "llama.jsonl", "out", **how)
    first, before = made.copy(), {path: path.stat().st_ino for path in Path("out.training").rglob("answers-*")}
    assert len(first) == len(before) == 5
    made.clear()

    def count(self: Kept, tensors: Any, numbers: list[int]) -> None:
        save(self, tensors, numbers)
        made.extend(numbers)

    monkeypatch.setattr(Kept, "_save", count)
    distill_model("llama", "llama-teacher1", "llama.jsonl", "out", **how)
    assert not {*made} & {*first} and open_checkpoint("out").content == open_checkpoint("whole").content
    distill_model("llama", "llama-teacher1", "llama.jsonl", "one", cache="cache", **how)
    made.clear()
    distill_model("llama", "llama-teacher1", "llama.jsonl", "two", cache="cache", temperature=1.0, **how)
    assert made == [] and [*Path("cache").rglob("answers-*")]


@pytest.mark.usefixtures("here")
def test_the_first_step_has_the_divergence_of_transformers_models() -> None:
    """The loss of a step with a batch of all examples, by the two models alone, each example by itself."""
    made = distill_model("bert", "bert-teacher1", "bert.jsonl", "out", task="classification", temperature=3.0,
                         **{**LINE, "steps": 1, "batch_size": 16})  # fmt: skip
    student, teacher = (load_model(name, "classification", dtype="float64") for name in ("bert", "bert-teacher1"))
    total = 0.0
    for item in read_examples(Path("bert.jsonl"), student).items:
        with torch.no_grad():
            q, p = ((x.model(item["input_ids"][None]).logits / 3).log_softmax(-1) for x in (student, teacher))
        total += 9 * float((p.exp() * (p - q)).sum())
    assert made.result.loss == pytest.approx(total / 16, rel=1e-4)


@pytest.mark.usefixtures("here")
def test_a_development_file_shows_the_share_that_came_back() -> None:
    """A student that is its teacher with noise on it; the scores are those of `eval`."""
    how: dict[str, Any] = {**LINE, "steps": 30, "dev": "llama.jsonl", "evaluate_every": 30}
    facts = distill_model("llama-teacher1", "llama", "llama.jsonl", "out", task="lm", **how).result.facts
    numbers = [each["bits_per_byte"] for each in (facts["teachers"]["llama"], facts["before"], facts["after"])]
    assert facts["recovered"] == pytest.approx((numbers[1] - numbers[2]) / (numbers[1] - numbers[0]))
    judged = json.loads(run("eval", "out", "--data", "llama.jsonl", "--task", "lm", "--json").stdout)
    assert judged["models"][0]["texts"][0]["bits_per_byte"] == pytest.approx(numbers[2], rel=1e-6)


@pytest.mark.usefixtures("here")
def test_texts_without_labels_suffice_and_an_adapter_can_be_the_student() -> None:
    texts = [json.loads(line)["text"] for line in Path("bert.jsonl").read_text().splitlines()]
    Path("bare.txt").write_text("\n".join(texts))
    distill_model("bert", "bert-teacher1", "bare.txt", "out", task="classification", **LINE)
    how: dict[str, Any] = {"task": "embedding", "method": "lora", "accumulate": 2}  # vectors are of one example each
    distill_model("encoder", "encoder-teacher1", "bare.txt", "adapter", **how, **LINE)
    assert Path("adapter/adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("here")
def test_teachers_of_some_classes_each_are_one_teacher_of_all() -> None:
    """The first step's loss is that of a teacher whose head has the rows of both, in the order of their classes."""
    config = json.loads(Path("bert/config.json").read_text())
    heads = load_file("bert-teacher1/model.safetensors")
    for name, rows in (("first", [0]), ("rest", [1, 2])):
        shutil.copytree("bert-teacher1", name)
        cut = {n: x[rows].clone() if n.startswith("classifier") else x for n, x in heads.items()}
        save_file(cut, f"{name}/model.safetensors", metadata={"format": "pt"})
        labels = {str(i): f"LABEL_{i}" for i in range(len(rows))}
        named = {**config, "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
        Path(name, "config.json").write_text(json.dumps(named))
    how: dict[str, Any] = {"task": "classification", **LINE}
    parts: list[Any] = [{"model": "rest", "classes": (1, 2)}, {"model": "first", "classes": (0, 0)}]
    one, all_ = (
        distill_model("bert", teachers, "bert.jsonl", out, **how)
        for teachers, out in ((parts, "out"), ("bert-teacher1", "whole"))
    )
    assert one.result.loss == pytest.approx(all_.result.loss, rel=1e-5)


RECIPE = """
job: distill
name: student
model: llama
teachers: [llama-teacher1, {model: llama-teacher2, weight: 2}]
data: llama.jsonl
task: lm
loss: {kd: 1, hint: 0.1}
layers: {1: 1, 2: 2}
steps: 2
learning_rate: 1.0e-3
---
merge_method: linear
models: [{model: student}, {model: llama-teacher1}]
parameters: {weight: 0.5}
"""


@pytest.mark.usefixtures("here")
def test_a_recipe_merges_its_student() -> None:
    Path("r.yaml").write_text(RECIPE)
    assert "llama-teacher2, weight 2" in run("plan", "r.yaml", "out").stdout
    run_recipe("r.yaml", "out", threads=1)
    assert open_checkpoint("out.stages/student").keys() == open_checkpoint("llama").keys()
    lock = json.loads(Path("out.stages/student/merge.lock.json").read_text())
    assert [each["input"] for each in lock["inputs"]] == ["llama", "llama-teacher1", "llama-teacher2"]


@pytest.mark.usefixtures("here")
def test_damaged_answers_are_asked_for_again() -> None:
    how: dict[str, Any] = {"task": "lm", "cache": "cache", **LINE}
    distill_model("llama", "llama-teacher1", "llama.jsonl", "whole", **how)
    (file,) = Path("cache").rglob("answers-*")
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x40
    file.write_bytes(content)
    distill_model("llama", "llama-teacher1", "llama.jsonl", "out", **how)
    assert open_checkpoint("out").content == open_checkpoint("whole").content


@pytest.mark.usefixtures("here")
def test_a_padded_vocabulary_and_a_large_top_k_change_nothing() -> None:
    """A teacher whose vocabulary has more words than the student's, and the largest scores of as many as there are."""
    config = json.loads(Path("llama-teacher1/config.json").read_text())
    tensors, size = load_file("llama-teacher1/model.safetensors"), config["vocab_size"]
    shutil.copytree("llama-teacher1", "padded")
    wide = {n: torch.cat([x, 9 * torch.ones(8, x.shape[1])]) if size in x.shape else x for n, x in tensors.items()}
    save_file(wide, "padded/model.safetensors", metadata={"format": "pt"})
    Path("padded/config.json").write_text(json.dumps({**config, "vocab_size": size + 8}))
    losses = [
        distill_model("llama", teacher, "llama.jsonl", f"out{i}", task="lm", top_k=top_k, loss=loss, **LINE).result.loss
        for i, (teacher, top_k, loss) in enumerate(
            (teacher, top_k, loss)
            for loss in ({"kd": 1.0}, {"hard": 1.0}, {"kd": 1.0, "uld": 0.5})
            for teacher, top_k in (("llama-teacher1", None), ("padded", None), ("padded", size + 100))
            if "uld" not in loss or top_k is None
        )
    ]
    assert losses[1:3] == pytest.approx([losses[0]] * 2, rel=1e-4)
    assert losses[4:6] == pytest.approx([losses[3]] * 2, rel=1e-4)
    assert losses[7] >= losses[6]  # `uld` reads all words, and those of the padding, which are likely here, too


@pytest.mark.usefixtures("here")
def test_answers_that_the_disk_has_no_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size of all, also where a file has one answer: those of 16 examples take more than twice those of 8."""
    monkeypatch.setattr(answers, "LARGEST", 1)
    distill_model("llama", "llama-teacher1", "llama.jsonl", "whole", task="lm", cache="cache", **LINE)
    size = sum(path.stat().st_size for path in Path("cache").rglob("answers-*"))
    monkeypatch.setattr(answers, "free_space", lambda _: size // 3)
    with pytest.raises(PlanError, match=r"set top_k, keep it elsewhere by cache"):
        distill_model("llama", "llama-teacher1", "llama.jsonl", "out", task="lm", **LINE)
    monkeypatch.setattr(answers, "free_space", lambda _: size)
    distill_model("llama", "llama-teacher1", "llama.jsonl", "out", task="lm", **LINE)


HEALED = """
name: whole
merge_method: linear
models: [{model: llama-teacher1}, {model: llama-teacher2}]
parameters: {weight: 0.5}
heal: {teachers: [llama-teacher1, llama-teacher2], data: llama.jsonl, task: lm, steps: 2, learning_rate: 1.0e-3}
---
job: eval
models: [whole-unhealed, whole]
data: llama.jsonl
task: lm
"""


@pytest.mark.usefixtures("here")
def test_heal_is_a_stage_behind_the_documents_own() -> None:
    """The same bytes as of the two stages written out."""
    first = HEALED.partition("---")[0]
    Path("r.yaml").write_text(HEALED)
    run_recipe("r.yaml", "scores.json", threads=1)
    apart = [
        {**yaml.safe_load(first), "name": "student", "heal": None},
        {"job": "distill", "name": "whole", "model": "student", **yaml.safe_load(first)["heal"]},
    ]
    del apart[0]["heal"]
    run_recipe(apart, "out", threads=1)
    healed = open_checkpoint("scores.stages/whole")
    assert healed.content == open_checkpoint("out").content
    assert healed.content != open_checkpoint("scores.stages/whole-unhealed").content
    for wrong in ("5", "{model: a, teachers: b}"):
        Path("wrong.yaml").write_text(first.partition("heal:")[0] + f"heal: {wrong}\n")
        assert "heal: found" in refusal(run("merge", "wrong.yaml", "out2"))


@pytest.mark.slow
def test_a_pruned_model_is_healed_by_the_whole_one(tmp_path: Path) -> None:
    """The recipe of the docs with fewer steps: at least half of what was lost in bits per byte comes back."""
    whole, pruned, healed = bits_of("heal.yaml", tmp_path, {300: 40, 150: 30})
    assert (pruned - healed) / (pruned - whole) > 0.5


MEASURED = """
import sys
from pathlib import Path
from mergekit_lfm import distill_model
how = {"task": "lm", "steps": 1, "batch_size": 1, "window": 8, "threads": 1, "learning_rate": 1e-4}
cache = None if sys.argv[1] == "kept" else False
distill_model("small", ["large1", "large2"], "llama.jsonl", sys.argv[1], cache=cache, **how)
(peak,) = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak[1]) * 1024)
"""


@pytest.mark.slow
def test_teachers_larger_together_than_the_memory_are_asked_one_after_the_other(here: Path) -> None:
    """Two of 180 MB: in memory is one of them at a time, where asking both in each step holds both."""
    import transformers

    config: dict[str, Any] = {
        **LLAMA,
        "num_hidden_layers": 2,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
    }
    for name in ("large1", "large2"):
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "num_key_value_heads": 8}))
        made.save_pretrained(here / name)
        shutil.copy(here / "llama/tokenizer.json", here / name)
        shutil.copy(here / "llama/tokenizer_config.json", here / name)
    (here / "llama").rename("small")
    size = sum(path.stat().st_size for path in (here / "large1").glob("*.safetensors"))
    assert size > 130_000_000
    peaks = [
        int(subprocess.run([sys.executable, "-c", MEASURED, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "live")
    ]
    assert peaks[1] - peaks[0] > 0.8 * size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "kdd=1"], "kd"),
        (["--loss", "task=1"], "a term that follows the teacher"),
        (["--loss", "embed=1"], "found the task lm, expected classification or embedding"),
        (["--loss", "r3f=1"], "r3f is of `job: tune` alone"),
        (["--loss", "hint=1", "--layer", "1=9"], "llama-teacher1 has 2 layers; expected 0 to 2"),
        (["--loss", "hint=1", "--temperature", "2"], "temperature: found it, expected none without kd"),
        (["--method", "prompt"], "expected a method that trains a model"),
        (["--top-k", "3", "--loss", "logits=1"], "logits"),
        (["--top-k", "3", "--loss", "kd=1", "--loss", "uld=1"], "none with uld"),
        (["--no-cache", "--cache", "x"], "found --cache and --no-cache"),
        (["--cache", "llama-teacher1/answers"], "expected a folder of its own"),
        (["--loss", "attention=1", "--layer", "0=0"], "layers from 1 on, for attention"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(here: Path, arguments: list[str], message: str) -> None:
    before = sorted(here.rglob("*"))
    command = ["distill", "llama", "--teacher", "llama-teacher1", "--data", "llama.jsonl", "--task", "lm", "-o", "out"]
    assert message in refusal(run(*command, *arguments))
    assert sorted(here.rglob("*")) == before


@pytest.mark.usefixtures("here")
def test_teachers_that_do_not_fit_are_refused() -> None:
    command = ["distill", "bert", "--data", "bert.jsonl", "--task", "classification", "-o", "out"]
    config = json.loads(Path("bert-teacher2/config.json").read_text())
    labels = {str(i): f"LABEL_{i}" for i in range(2)}
    config |= {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    Path("bert-teacher2/config.json").write_text(json.dumps(config))
    wrong = ["--loss", "triplet=1", "--batch-size", "2", "--teacher", "bert-teacher1"]
    assert "3 or more for triplet" in refusal(run(*command, *wrong))
    nothing = ["--loss", "hint=1", "--train", "*classifier*", "--teacher", "bert-teacher1", "--threads", "1"]
    assert "depends on no parameter that is trained" in refusal(run(*command, *nothing))
    assert "bert-teacher2 has 2 classes, expected 3" in refusal(run(*command, "--teacher", "bert-teacher2"))
    tokenizer = json.loads(Path("llama-teacher2/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    Path("llama-teacher2/tokenizer.json").write_text(json.dumps(tokenizer))
    message = (
        r"llama-teacher2 and llama read the data in different ways[^$]*generate[^$]*the loss uld, alone or with task"
    )
    for loss in ({"kd": 1.0}, {"uld": 1.0, "hint": 1.0}):
        with pytest.raises(PlanError, match=message):
            distill_model("llama", "llama-teacher2", "llama.jsonl", "out", task="lm", loss=loss, **LINE)


@pytest.mark.usefixtures("here")
def test_a_teacher_of_another_tokenizer_is_followed_where_both_begin_a_token() -> None:
    """Asked before or in each step, to the same bytes; and of answers, with scores in bits per byte."""
    save_llama(Path("letters"), 5, config={"initializer_range": 0.2, "max_position_embeddings": 200})
    texts = [json.loads(line)["text"] for line in Path("llama.jsonl").read_text().splitlines()]
    lines = [{"prompt": "Say :", "completion": text} for text in texts]
    Path("answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both: list[Any] = ["letters", {"model": "llama-teacher1", "weight": 3.0}]
    how: dict[str, Any] = {"task": "lm", "loss": {"uld": 1.0}, "dev": 0.25, **LINE, "batch_size": 12}
    made = [
        distill_model("llama", both, "llama.jsonl", out, cache=cache, **how)
        for out, cache in (("kept", None), ("live", False))
    ]
    files = [Path(out, "model.safetensors").read_bytes() for out in ("kept", "live")]
    assert files[0] == files[1] and made[0].digest == made[1].digest
    record = [json.loads(line)["loss"] for line in Path("kept.training/metrics.jsonl").read_text().splitlines()]
    assert record[-1] < record[0]
    how |= {"loss": {"uld": 1.0, "task": 0.01}, "dev": "llama.jsonl"}
    facts = distill_model("llama", "letters", "answers.jsonl", "answered", **how).result.facts
    assert "bits_per_byte" in facts["teachers"]["letters"]
