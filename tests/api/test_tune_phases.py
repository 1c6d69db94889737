"""Tuning of parts of a model, in phases: against a loop by hand, on adapters, on a model of images and text."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_commands import refusal, run
from helpers_tune import tiny, transformers  # noqa: F401
from safetensors.torch import load_file
from torch import nn

from mergekit_lfm import PlanError, tune_model
from mergekit_lfm.machine.pauses import Pauses
from mergekit_lfm.recipe.training import Options
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.train.examples import IGNORED, Examples
from mergekit_lfm.train.loop import fit
from mergekit_lfm.train.losses import next_token, squares
from mergekit_lfm.train.texts import read_examples
from mergekit_lfm.tune.phases import select_parts
from mergekit_lfm.tune.work import Prepared

LINE: dict[str, Any] = {"task": "lm", "batch_size": 4, "threads": 1, "learning_rate": 1e-2}
FIRST, BOTH = ["*layers.0.*"], ["*layers.0.*", "*layers.1.mlp.*"]


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    shutil.copytree(tiny / "llama", tmp_path / "llama")
    shutil.copy(tiny / "llama.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_phases_are_those_of_a_loop_by_hand() -> None:
    """AdamW that first sees one layer, then that and a part of another, whose moments begin then."""
    phases = [{"steps": 2, "train": FIRST}, {"steps": 3, "train": BOTH}]
    outcome = tune_model("llama", "llama.jsonl", "ours", phases=phases, schedule="constant", clip=0.0, **LINE)
    assert outcome.result.steps == 5
    loaded = load_model("llama", "lm")
    examples, named = read_examples(Path("llama.jsonl"), loaded), dict(loaded.model.named_parameters())
    assert outcome.result.trained == sum(x.numel() for name, x in named.items() if "s.0." in name or "s.1.mlp" in name)
    optimizers = [
        torch.optim.AdamW([x for name, x in named.items() if part in name], lr=1e-2, weight_decay=0.0)
        for part in ("layers.0.", "layers.1.mlp.")
    ]
    for step in range(5):
        total, number = next_token(loaded.model, examples.batch(examples.step(step, 4, 0)))
        loaded.model.zero_grad()
        (total / number).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers[: 1 if step < 2 else 2]:
            optimizer.step()
    ours, before = load_file("ours/model.safetensors"), load_file("llama/model.safetensors")
    assert all(torch.allclose(x, named[name], atol=1e-6) for name, x in ours.items())
    changed = {name for name, x in ours.items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if "layers.0." in name or "layers.1.mlp." in name}


@pytest.mark.usefixtures("here")
def test_an_adapter_of_one_layer_changes_that_alone() -> None:
    run("tune", "llama", "--data", "llama.jsonl", "--task", "lm", "--method", "lora", "--train", "*layers.1.self*",
        "--steps", "3", "--learning-rate", "0.01", "--threads", "1", "-o", "out")  # fmt: skip
    ups = {name: x for name, x in load_file("out/adapter_model.safetensors").items() if "lora_B" in name}
    assert {name for name, x in ups.items() if bool(x.any())} == {name for name in ups if "layers.1.self_attn" in name}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "*layer.0.*"}, r"found '\*layer\.0\.\*', which no parameter's name matches; expected patterns such"),
        ({"train": "*embed*", "method": "lora"}, r"lora trains no parameter that matches \*embed\*"),
        ({"train": "*norm*", "method": "svf"}, "svf trains no parameter"),
        ({"train": "*layers.0.*", "method": "lp_ft"}, "lp_ft has phases of its own"),
        ({"phases": [{"steps": 2, "train": "*"}], "steps": 3}, r"steps: found 3, expected 2, the sum over the phases"),
        ({"phases": [{"steps": 2, "train": "*"}], "train": "*"}, "train: found beside `phases`"),
        ({"phases": [{"steps": 2, "train": []}]}, r"phases\[0\]\.train"),
    ],
)
def test_parts_that_train_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        tune_model("llama", "llama.jsonl", "out.safetensors" if options.get("method") == "svf" else "out",
                   **{**LINE, **options})  # fmt: skip
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_a_pattern_on_the_command_line_that_matches_nothing_is_one_message() -> None:
    found = run("tune", "llama", "--data", "llama.jsonl", "--task", "lm", "--train", "*nowhere*", "-o", "out")
    assert "'*nowhere*'" in refusal(found)


class Killed(Exception):
    """The end of a run in place of a kill."""


def test_killed_in_any_phase_it_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Linear(3, 1))
    examples = Examples([{"input": torch.randn(4), "labels": torch.randn(())} for _ in range(9)])
    options = Options(steps=6, batch_size=4, learning_rate=0.1)

    def train(place: Path, last: int) -> tuple[torch.Tensor, int]:
        model = copy.deepcopy(start)
        prepared = select_parts(Prepared(model), [(3, ["0.*"]), (3, ["0.bias", "2.*"])], "full")

        seen = list[int]()

        def tell(done: int, *_: object) -> None:
            seen.append(done)
            if done == last:
                raise Killed

        how: dict[str, Any] = {"place": place, "request": "a", "pauses": Pauses(every_s=0, saving_share=math.inf)}
        fit(model, examples, squares, options, hooks=prepared.hooks, tell=tell, **how)
        return torch.cat([x.detach().flatten() for x in model.parameters()]), seen[0]

    wanted, _ = train(tmp_path / "whole", 0)
    for last in (1, 3, 4, 6):
        with pytest.raises(Killed):
            train(tmp_path / str(last), last)
        numbers, first = train(tmp_path / str(last), 0)
        assert torch.equal(numbers, wanted) and first == last  # goes on from the state before the kill


def test_a_llava_learns_its_projector_and_then_its_language_model_too() -> None:
    """The two phases of LLaVA on a tiny model of random weights; the tower of images stays."""
    vision = transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                           num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    text = transformers.LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                    num_attention_heads=2, pad_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=False)
    )
    ids = torch.tensor([0, 3, 3, 3, 3, 7, 9, 8])  # a start, an image of four patches, three words
    labels = torch.where(ids > 3, ids, IGNORED)
    images = torch.randn(4, 3, 8, 8)
    examples = Examples([{"input_ids": ids, "pixel_values": image, "labels": labels} for image in images])
    projector, language = ["*multi_modal_projector*"], ["*multi_modal_projector*", "*language_model*"]
    phases = [(2, projector), (2, language)]
    states = [{name: x.detach().clone() for name, x in model.named_parameters()}]
    for count in (1, 2):  # two runs from the same start: the first phase alone, and both
        model.load_state_dict(states[0], strict=False)
        nn.Module.requires_grad_(model, True)
        prepared = select_parts(Prepared(model), phases[:count], "full")
        fit(model, examples, next_token, Options(steps=2 * count, batch_size=2, learning_rate=1e-2,
                                                 schedule="constant"), hooks=prepared.hooks)  # fmt: skip
        states.append({name: x.detach().clone() for name, x in model.named_parameters()})
    changed = [{name for name, x in state.items() if not torch.equal(x, states[0][name])} for state in states[1:]]
    assert changed[0] == {name for name in states[0] if "projector" in name}
    assert changed[0] < changed[1] and {name for name in changed[1] if "vision" in name or "lm_head" in name} == set()
    assert any("language_model" in name for name in changed[1])
