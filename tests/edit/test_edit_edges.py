"""Edits leave the rest alone, find subjects, fit only certain files, and refuse bad requests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_editing import tiny_model, trained_tokenizer
from torch import nn

from mergekit_lfm.artifacts.patch import Patch, open_patch
from mergekit_lfm.artifacts.statistics import open_statistics
from mergekit_lfm.collect.run import collect
from mergekit_lfm.edit.prompts import encode, fill_template
from mergekit_lfm.edit.sites import find_sites
from mergekit_lfm.edit.solve import edit
from mergekit_lfm.errors import PlanError
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.store.checkpoint import open_checkpoint
from mergekit_lfm.views.patched import patched_view

ADA = {"prompt": "The city of {}", "subject": "Ada Blake", "target_new": "Rome"}
MIA = {"prompt": "{} speaks", "subject": "Mia Stone", "target_new": "glass blower"}
QUICK: dict[str, Any] = {"layers": [1, 2], "steps": 2, "covariance": "identity", "context_templates": ["{}", "So . {}"]}


def quick(model: nn.Module | None = None, facts: Any = (ADA, MIA), kind: str = "gpt2", **changes: Any) -> Patch:
    given = {name: value for name, value in (QUICK | changes).items() if value is not ...}
    return edit(model or tiny_model("gpt2"), trained_tokenizer(kind), list(facts), **given)


# ------------------------------------------------------------------ the model stays as it was


def state(model: nn.Module) -> list[Any]:
    """Everything in a model that an edit could leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    asking = [(name, x.requires_grad, x.grad is None, id(x)) for name, x in model.named_parameters()]
    return [hooks, asking]


def half_trained() -> Any:
    """A model with dropout that is being trained, in part."""
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    model.transformer.wte.requires_grad_(False)
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_model_stays_as_it_was_and_is_edited_without_dropout(method: str) -> None:
    model, resting = half_trained(), tiny_model("gpt2")
    before, tensors = state(model), {name: x.clone() for name, x in model.state_dict().items()}
    layers = [1] if method == "rome" else [1, 2]
    patch = quick(model, method=method, layers=layers)
    assert state(model) == before
    assert all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())
    for layer in layers:
        assert torch.equal(patch.delta(layer), quick(resting, method=method, layers=layers).delta(layer))


def test_the_model_stays_as_it_was_where_an_edit_fails() -> None:
    model = half_trained()
    before, tensors = state(model), {name: x.clone() for name, x in model.state_dict().items()}

    def interrupted(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(model, progress=interrupted)
    singular = {1: torch.eye(48), 2: torch.diag(torch.cat([torch.ones(40), -torch.ones(8)]))}
    with pytest.raises(PlanError, match=r"layer 2.*ridge"):  # after layer 1 was changed
        quick(model, covariance=singular, ridge=0.0, lambda_=1e6)
    assert state(model) == before
    assert all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())


def test_progress_counts_the_facts() -> None:
    for method, layers in (("rome", [1]), ("memit", [1, 2])):
        seen: list[tuple[int, int]] = []
        quick(method=method, layers=layers, batch=1, progress=lambda *now, seen=seen: seen.append(now))
        assert seen == [(1, 2), (2, 2)]


# ------------------------------------------------------------------ where the subject is


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "ended", "llama2", "prepended"])
@pytest.mark.parametrize("subject", ["Ada Blake", "Zoë Müller", "A", "Blümë"])
@pytest.mark.parametrize("prompt", ["{} speaks", "It is said that {}, a baker, was", "The city of {}"])
def test_the_subject_is_found_by_its_characters(kind: str, subject: str, prompt: str) -> None:
    tokenizer = trained_tokenizer(kind)
    texts = [fill_template(template, prompt, subject) for template in ("{}", "Yesterday it rained . {}")]
    found = encode(tokenizer, [text for text, _ in texts], [span for _, span in texts])
    for row, (text, (start, stop)) in enumerate(texts):
        assert text[start:stop] == subject
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        first, last = int(found.first[row]), int(found.last[row])
        assert offsets[last][0] < stop <= offsets[last][1]
        assert offsets[first][0] <= start < offsets[first][1]
        assert last + 1 == found.lengths[row] or offsets[last + 1][0] >= stop  # no token of it comes after


def test_rows_are_padded_on_the_right_for_any_tokenizer() -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=trained_tokenizer("ended").backend_tokenizer, padding_side="left", pad_token="</s>"
    )
    found = encode(tokenizer, ["Ada speaks", "Ada Blake was born in Rome"])
    assert found.mask[0].tolist() == sorted(found.mask[0].tolist(), reverse=True)
    assert found.lengths.tolist() == found.mask.sum(1).tolist()
    assert found.ids[:, 0].tolist() == [0, 0]  # <s>, and no </s>, since the texts go on
    assert int((found.ids == 1).sum()) == 0


def test_names_of_the_layers_come_from_the_architecture() -> None:
    for name, ending, axis in (("gpt2-square", "c_proj", 0), ("gpt-neo", "c_proj", 1), ("gpt-j", "fc_out", 1)):
        sites = find_sites(tiny_model(name))
        assert [site.layer for site in sites] == [0, 1, 2, 3]
        assert {site.weight for site in sites} == {f"transformer.h.{i}.mlp.{ending}.weight" for i in range(4)}
        assert {site.axis for site in sites} == {axis}
        assert all(site.inputs == site.projection.get_parameter("weight").shape[axis] for site in sites)


# ------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer, whose files name tensors without the model's prefix, and its statistics."""
    place = tmp_path_factory.mktemp("saved")
    tiny_model("gpt2", torch.float32).transformer.save_pretrained(place / "m")
    trained_tokenizer().save_pretrained(place / "m")
    (place / "text.txt").write_text("Ada Blake was born in the city of Paris . Mia Stone speaks Danish .\n" * 3)
    layers = ["c_proj"]
    collect("gram", str(place / "m"), str(place / "text.txt"), place / "gram", task="lm", layers=layers)
    return place


def test_a_patch_of_a_saved_model_is_in_the_names_of_its_files_and_knows_them(folder: Path, tmp_path: Path) -> None:
    options = {"lr": 1.0, "clamp": 30.0, "kl_factor": 0.0, "weight_decay": 0.0, "lambda_": 1e-6, "steps": 25}
    loaded, fact = load_model(folder / "m", "lm"), {**ADA, "target_new": "baker"}
    given = QUICK | options | {"layers": [3], "context_templates": ["{}"]}
    patch = edit(loaded, None, {"facts": [fact]}, method="memit", **given)
    checkpoint = open_checkpoint(folder / "m")
    (name,) = patch.info.tensors
    assert name in checkpoint
    assert not name.startswith("transformer.")
    assert patch.info.base == checkpoint.content
    assert patch.info.tensors[name].digest == checkpoint.digest_of(name)
    assert (patch.info.tensors[name].shape, patch.info.tensors[name].dtype) == ((48, 32), "float32")
    assert patch.info.facts == {"facts": [fact]}
    patch.save(tmp_path / "patch.safetensors")
    after: Any = load_model(patched_view(checkpoint, open_patch(tmp_path / "patch.safetensors")), "lm")
    ids = torch.tensor([after.tokenizer("The city of Ada Blake")["input_ids"]])
    wanted = after.tokenizer(" baker")["input_ids"][0]
    with torch.no_grad():
        assert float(loaded.model(ids).logits[0, -1].softmax(-1)[wanted]) < 0.1
        assert float(after.model(ids).logits[0, -1].softmax(-1)[wanted]) > 0.9


def test_statistics_of_the_model_are_taken_and_those_of_another_are_not(folder: Path, tmp_path: Path) -> None:
    loaded, statistics = load_model(folder / "m", "lm"), open_statistics(folder / "gram")
    entry, layer = next((name, x) for name, x in statistics.info.layers.items() if x.weight.startswith("h.1.mlp."))
    moment = statistics.read(entry)[:-1, :-1].double()
    assert torch.equal(moment, moment.T)
    given = {**QUICK, "layers": [1], "covariance": statistics}
    patch = edit(loaded, None, [ADA], method="rome", **given)
    direct = edit(loaded, None, [ADA], method="rome", **{**given, "covariance": {1: moment}})
    assert torch.equal(patch.delta(1), direct.delta(1))
    assert layer.weight == "h.1.mlp.c_proj.weight"
    tiny_model("gpt2-square", torch.float32).save_pretrained(tmp_path / "other")
    trained_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="collected on another model"):
        edit(load_model(tmp_path / "other", "lm"), None, [ADA], method="rome", **given)


# ------------------------------------------------------------------ refusals


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layers": [1, 7]}, "no layer 7.*has 4"),
    ({"layers": [2, 1]}, "ascending"),
    ({"layers": [1, 1]}, "ascending"),
    ({"method": "rome"}, "rome edits one layer"),
    ({"method": "memmit"}, "memit"),
    ({"context_templates": ["So."]}, "once for the prompt"),
    ({"context_templates": ["{} {}"]}, "once for the prompt"),
    ({"context_templates": ["So . {}"]}, "among them, the bare prompt; add it"),
    ({"kl_template": "is a"}, "in place of the subject"),
    ({"step": 3}, "steps"),
    ({"key": "mean"}, "no such option"),
    ({"steps": 0, "lr": -1.0}, "(?s)steps.*lr"),
    ({"lambda_": 1.0, "lambda_ratio": 1.0}, "both lambda and lambda_ratio"),
    ({"preset": "gpt2-xxl"}, "gpt2-xl"),
    ({"preset": "gpt2-medium"}, "no constants for memit"),
    ({"covariance": None}, "stats gram"),
    ({"covariance": "Identity"}, "identity"),
    ({"covariance": {1: torch.eye(48)}}, "layer 2 .*has no matrix"),
    ({"covariance": {1: torch.eye(32), 2: torch.eye(48) / 0}}, r"(?s)layer 1 is \[32, 32\].*layer 2 is not finite"),
    ({"covariance": {1: -torch.eye(48), 2: -torch.eye(48)}}, "ridge"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=lambda x: str(x)[:40])
def test_options_that_cannot_be_honoured_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        quick(**changes)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([{**ADA, "prompt": "{} speaks " + "and speaks " * 40}], "tokens, the model takes 48"),
        ([{**ADA, "prompt": "Ada speaks"}], "{}"),
        ([{**ADA, "target_new": ""}], "target_new"),
    ],
)
@pytest.mark.parametrize("method", ["memit", "rome"])
def test_facts_that_do_not_fit_are_refused(facts: list[Any], said: str, method: str) -> None:
    with pytest.raises(PlanError, match=re.escape(said)):
        quick(facts=facts, method=method, layers=[1])


def test_a_prompt_that_is_too_long_is_refused_before_any_search() -> None:
    seen: list[Any] = []
    long = {**MIA, "prompt": "{} speaks " + "and speaks " * 40}
    for method in ("memit", "rome"):
        with pytest.raises(PlanError, match="the model takes 48"):
            quick(facts=[ADA, long], method=method, layers=[1], batch=1, progress=lambda *now: seen.append(now))
    assert seen == []


def test_a_subject_whose_characters_are_in_no_token_is_refused() -> None:
    dots = {"prompt": "The city of {} is", "subject": "漢", "target_new": "Rome"}
    with pytest.raises(PlanError, match="no token"):
        quick(facts=[dots], kind="llama2")  # its alphabet lacks the letter, and it has no token for the unknown


def test_slow_tokenizers_and_models_without_one_are_refused() -> None:
    with pytest.raises(PlanError, match="tokenizer"):
        edit(tiny_model("gpt2"), None, [ADA], **QUICK)
    with pytest.raises(PlanError, match="fast tokenizer"):
        edit(tiny_model("gpt2"), _Slow(), [ADA], **QUICK)  # type: ignore[arg-type]


class _Slow:
    """A tokenizer that gives no offsets."""

    is_fast = False


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mixtral", {"num_local_experts": 2, "num_key_value_heads": 2}),
        ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    ],
)
def test_architectures_without_a_table_are_refused(kind: str, options: dict[str, Any]) -> None:
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 340,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**size, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(PlanError, match=kind.lower()):
        quick(model, layers=None)


def test_models_that_are_not_decoders_are_refused() -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 340}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**size, intermediate_size=24))
    with pytest.raises(PlanError, match="decoder"):
        quick(bert, layers=[0])


# ------------------------------------------------------------------ two facts about one subject


def test_two_facts_of_one_subject_are_refused_in_one_batch() -> None:
    other = {"prompt": "The language of {} is", "subject": "Ada Blake", "target_new": "Danish"}
    with pytest.raises(PlanError, match=r"(?s)The city of Ada Blake.*one after another") as refused:
        quick(facts=[ADA, MIA, other])
    assert "The language of Ada Blake is" in str(refused.value)
    assert "Mia Stone" not in str(refused.value)
    assert quick(facts=[ADA, MIA, other], allow_same_subject=True).info.tensors
    assert quick(facts=[ADA, other], method="rome", layers=[1]).info.tensors


def test_one_key_under_two_names_is_found_too() -> None:
    # The two prompts are the same up to the subject's last token.
    one = {"prompt": "{} speaks", "subject": "Ada Blake", "target_new": "Danish"}
    other = {"prompt": "Ada {} works as a", "subject": "Blake", "target_new": "baker"}
    with pytest.raises(PlanError, match="one subject"):
        quick(facts=[one, MIA, other])


def test_a_patch_says_all_that_it_depends_on() -> None:
    patch = quick(lr=0.25)
    options = dict(patch.info.options)
    assert options.pop("model_dtype") == "float64"
    assert options["lr"] == 0.25
    assert (options["layers"], options["steps"], options["context_templates"]) == ([1, 2], 2, ["{}", "So . {}"])
    assert {"lambda", "lambda_ratio", "ridge", "kl_factor", "clamp", "weight_decay", "kl_template"} <= options.keys()
    again = {("lambda_" if name == "lambda" else name): x for name, x in options.items() if x is not None}
    same = edit(tiny_model("gpt2"), trained_tokenizer(), patch.info.facts, method=patch.info.method, **again)
    assert torch.equal(same.delta(2), patch.delta(2))
