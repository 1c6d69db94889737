"""A LoRA that is extracted gives the fine-tuned model back: by the view of the base with it, and by peft."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_adapters import SIZES, Net, logits, tiny_model, with_adapter
from models import files_of, save_checkpoint
from torch import Tensor

from mergekit_lfm import extract_lora
from mergekit_lfm.api.extract import ENTRY
from mergekit_lfm.api.outcome import Finding
from mergekit_lfm.engine import extraction
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.kernels.low_rank import approximate
from mergekit_lfm.store.checkpoint import Checkpoint
from mergekit_lfm.views.adapted import open_model

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def tune(model: Any, *, rank: int | None = None) -> Any:
    """Change all parameters of a model: by matrices of this rank, or all their numbers."""
    torch.manual_seed(5)
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1 and rank is not None:
                x.add_(0.1 * torch.randn(*x.shape[:-1], rank) @ torch.randn(*x.shape[:-2], rank, x.shape[-1]))
            else:
                x.add_(0.1 * torch.randn(x.shape))
    return model


def errors(base: Path, out: Path, tuned: Path) -> float:
    """How far the base with the adapter is from the tuned model, relative to the distance of the two."""
    applied, old, new = (open_model(text) for text in (f"{base}+{out}", str(base), str(tuned)))

    def distance(one: Checkpoint) -> float:
        return math.sqrt(sum(float((one.read(n).double() - new.read(n).double()).square().sum()) for n in new))

    return distance(applied) / distance(old)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral"])
def test_all_of_a_change_comes_back(tmp_path: Path, kind: str) -> None:
    base, tuned = tiny_model(kind), tune(tiny_model(kind))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    extracted = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=64).result
    assert extracted.kept == pytest.approx(1, abs=1e-7) and not extracted.dropped
    assert errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned") < 1e-5
    torch.testing.assert_close(logits(with_adapter(base, tmp_path / "out")), logits(tuned), atol=1e-3, rtol=1e-3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    saved = {"llama": "lm_head", "gpt2": "wte", "bert": "classifier", "mixtral": "gate"}
    assert saved[kind] in config["modules_to_save"] and config["fan_in_fan_out"] == (kind == "gpt2")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_a_change_of_rank_4_comes_back_at_rank_8(tmp_path: Path, kind: str) -> None:
    """Case D25 of mergekit's."""
    base, tuned = tiny_model(kind), tune(tiny_model(kind), rank=4)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=8, embed_lora=kind == "llama")
    assert errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned") < 1e-5
    torch.testing.assert_close(logits(with_adapter(base, tmp_path / "out")), logits(tuned), atol=1e-3, rtol=1e-3)


def test_a_tied_embedding_stays_the_heads(tmp_path: Path) -> None:
    for embed_lora in (False, True):
        folder = tmp_path / str(embed_lora)
        base, tuned = (tiny_model("llama", tie_word_embeddings=True) for _ in range(2))
        tune(tuned, rank=2).save_pretrained(folder / "tuned")
        base.save_pretrained(folder / "base")
        extract_lora(folder / "tuned", folder / "base", folder / "out", rank=4, embed_lora=embed_lora)
        torch.testing.assert_close(logits(with_adapter(base, folder / "out")), logits(tuned), atol=1e-3, rtol=1e-3)
        assert errors(folder / "base", folder / "out", folder / "tuned") < 1e-5


SHAPES = {"q": (40, 24), "k": (24, 24), "v": (12, 60)}


def spectra(tmp_path: Path, scale: Mapping[str, float]) -> dict[str, Any]:
    """Save a base and a model whose changes have singular values 1, 1/2, 1/4 ... times the scale; the changes."""
    draw = torch.Generator().manual_seed(0)
    changes, base = {}, {}
    for leaf, shape in SHAPES.items():
        name = f"model.layers.0.{leaf}.weight"
        u, v = (torch.linalg.qr(torch.randn(n, min(shape), generator=draw)).Q for n in shape)
        changes[name] = scale[leaf] * (u * 2.0 ** -torch.arange(min(shape))) @ v.T
        base[name] = torch.zeros(shape)
    save_checkpoint(tmp_path / "base", base, LLAMA)
    save_checkpoint(tmp_path / "tuned", changes, LLAMA)
    return {name: x.double().numpy() for name, x in changes.items()}


def test_the_share_of_the_energy_is_kept_by_the_least_rank(tmp_path: Path) -> None:
    changes = spectra(tmp_path, {"q": 1, "k": 1, "v": 5})
    result = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", energy=0.99).result
    for each in result.reduced:
        energies = np.linalg.svd(changes[each.name], compute_uv=False) ** 2
        shares = energies.cumsum() / energies.sum()
        assert each.rank == int((shares < 0.99).sum()) + 1
        assert each.kept / each.energy == pytest.approx(shares[each.rank - 1], abs=1e-5)
    off = errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned")
    assert 1 - off**2 == pytest.approx(result.kept, abs=1e-5)


def test_a_size_is_spent_where_it_keeps_most(tmp_path: Path) -> None:
    changes = spectra(tmp_path, {"q": 1, "k": 0.5, "v": 3})
    result = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", size=5000).result
    offers = sorted(
        (-(sigma**2) / sum(x.shape), sum(x.shape), name)
        for name, x in changes.items()
        for sigma in np.linalg.svd(x, compute_uv=False)
    )
    room = 5000 - sum(2 * (ENTRY + len(name.removesuffix(".weight"))) for name in changes)
    ranks, left, full = dict.fromkeys(changes, 0), room, set[str]()
    for _, width, name in offers:
        if name in full or 4 * width > left:
            full.add(name)
        else:
            ranks[name], left = ranks[name] + 1, left - 4 * width
    assert {each.name: each.rank for each in result.reduced} == ranks
    assert 0.8 * 5000 < result.nbytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= 5000
    assert len({*ranks.values()}) > 1


@pytest.mark.filterwarnings("ignore:.*no rank fits")
@pytest.mark.parametrize("embed_lora", [False, True])
def test_a_size_has_room_for_a_head_that_is_tied_to_an_embedding(tmp_path: Path, embed_lora: bool) -> None:
    models = Path(__file__).parents[2] / "recipes" / "quickstart"
    out = tmp_path / "out"
    result = extract_lora(models / "docs", models / "base", out, size=700_000, embed_lora=embed_lora).result
    assert 680_000 < result.nbytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= 700_000


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_the_randomised_decomposition_keeps_as_much_as_the_exact_one(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 300, generator=draw)).Q for n in shape)
    change = (u * torch.arange(1, 301) ** -0.7) @ v.T
    energies = np.linalg.svd(change.double().numpy(), compute_uv=False) ** 2
    for rank in (1, 8, 64):
        best = energies[:rank].sum() / energies.sum()
        for exact in (True, False):
            near = approximate(change, rank, 7, exact=exact)
            a, b = near.factors(rank)
            kept = 1 - float((change - b @ a).double().square().sum()) / near.total
            assert float(near.energies.sum()) / near.total == pytest.approx(kept, abs=1e-6)
            assert kept == pytest.approx(best, abs=1e-6 if exact else 1e-3)
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-5)


def large(tmp_path: Path) -> None:
    """Save a base and a tuned model with matrices that are decomposed with random numbers."""
    draw = torch.Generator().manual_seed(2)
    names = [f"model.layers.{i}.q_proj.weight" for i in range(3)]
    for model in ("base", "tuned"):
        save_checkpoint(tmp_path / model, {name: torch.randn(260, 280, generator=draw) for name in names}, LLAMA)


def test_threads_leave_no_trace(tmp_path: Path) -> None:
    large(tmp_path)
    for threads in (1, 3):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / str(threads) / "out", rank=4, threads=threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_a_killed_run_leaves_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spectra(tmp_path, {"q": 1, "k": 1, "v": 1})
    count = iter(range(9))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return approximate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "approximate", killed)
        with pytest.raises(KeyboardInterrupt):
            extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")


def test_changes_that_are_not_extracted_are_named(tmp_path: Path) -> None:
    base = {"model.layers.0.q_proj.weight": torch.zeros(8, 8), "model.layers.0.gamma": torch.zeros(8)}
    base |= {"model.layers.0.v_proj.weight": torch.zeros(8, 8), "model.norm.weight": torch.zeros(8)}
    save_checkpoint(tmp_path / "base", base, LLAMA)
    save_checkpoint(tmp_path / "tuned", {name: x + 1 for name, x in base.items()}, LLAMA)
    with pytest.warns(Finding, match=r"the adapter lacks model\.layers\.0\.gamma: PEFT saves whole modules"):
        result = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", exclude=["v_proj"]).result
    assert {each.name: (each.why, each.energy) for each in result.dropped} == {
        "model.layers.0.v_proj.weight": ("excluded", 64),
        "model.layers.0.gamma": ("PEFT saves whole modules, and its own has others in it", 8),
    }
    assert [each.name for each in result.saved] == ["model.norm.weight"]
    assert result.kept == pytest.approx((64 + 8) / (64 + 8 + 64 + 8))


def test_a_head_that_the_base_lacks_is_saved(tmp_path: Path) -> None:
    base, tuned = tiny_model("bert"), tune(tiny_model("bert"))
    base.bert.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    result = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=64).result
    assert "classifier.weight" in [each.name for each in result.saved]
    assert "num_labels=3)" in (tmp_path / "out" / "README.md").read_text()
    torch.testing.assert_close(logits(with_adapter(base, tmp_path / "out")), logits(tuned), atol=1e-3, rtol=1e-3)


def test_files_without_the_prefix_of_the_class_are_named_as_it_runs(tmp_path: Path) -> None:
    """As GPT-2 lies on the Hub."""
    base, tuned = tiny_model("gpt2"), tune(tiny_model("gpt2"))
    for folder, model in (("base", base), ("tuned", tuned)):
        bare = {n.removeprefix("transformer."): x for n, x in model.state_dict().items() if n != "lm_head.weight"}
        save_checkpoint(tmp_path / folder, bare, {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]})
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=64)
    torch.testing.assert_close(logits(with_adapter(base, tmp_path / "out")), logits(tuned), atol=1e-3, rtol=1e-3)
    assert errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned") < 1e-5


def test_experts_stored_together_come_back_with_one_rank(tmp_path: Path) -> None:
    base, tuned = tiny_model("mixtral"), tune(tiny_model("mixtral"), rank=2)
    for folder, model in (("base", base), ("tuned", tuned)):
        save_checkpoint(tmp_path / folder, model.state_dict(), model.config.to_dict())
    result = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", energy=1 - 1e-9).result
    assert {(each.rank, each.count) for each in result.reduced if "experts" in each.name} == {(2, 4)}
    assert errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned") < 1e-4
    torch.testing.assert_close(logits(with_adapter(base, tmp_path / "out")), logits(tuned), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.bfloat16, 1e-2)])
def test_other_dtypes_are_read_exactly(tmp_path: Path, dtype: torch.dtype, most: float) -> None:
    """The bound is that of the adapter's float32, or of the bfloat16 in which the base with the adapter is read."""
    draw = torch.Generator().manual_seed(3)
    base = {Q: torch.randn(8, 6, generator=draw), "model.norm.weight": torch.ones(6)}
    tuned = {name: x + torch.randn(x.shape, generator=draw) for name, x in base.items()}
    save_checkpoint(tmp_path / "base", {name: x.to(dtype) for name, x in base.items()}, LLAMA)
    save_checkpoint(tmp_path / "tuned", {name: x.to(dtype) for name, x in tuned.items()}, LLAMA)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")
    assert errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned") < most


def test_an_excluded_tensor_may_have_another_shape(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", BASE, LLAMA)
    tuned = changed(Q, torch.ones(8, 6)) | {"model.embed_tokens.weight": torch.zeros(10, 6)}
    save_checkpoint(tmp_path / "tuned", tuned, LLAMA)
    result = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", exclude=["embed"]).result
    assert [each.name for each in result.dropped] == ["model.embed_tokens.weight"]


def test_an_adapter_on_its_base_is_extracted_again(tmp_path: Path) -> None:
    base, tuned = tiny_model("llama"), tune(tiny_model("llama"), rank=2)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "one", rank=2)
    extract_lora(f"{tmp_path / 'base'}+{tmp_path / 'one'}", tmp_path / "base", tmp_path / "two", rank=2)
    assert errors(tmp_path / "base", tmp_path / "two", tmp_path / "tuned") < 1e-5


def test_convolutions_come_back(tmp_path: Path) -> None:
    model, tuned = Net(), tune(Net())
    save_checkpoint(tmp_path / "base", model.state_dict(), {})
    save_checkpoint(tmp_path / "tuned", tuned.state_dict(), {})
    result = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=32).result
    assert {each.name: each.shape for each in result.reduced}["conv.weight"] == (6, 27)
    images = torch.randn(2, 3, 4, 4)
    wrapped = with_adapter(model, tmp_path / "out")
    torch.testing.assert_close(wrapped(images), tuned(images), atol=1e-5, rtol=1e-4)
    assert errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned") < 1e-5


def test_a_tied_head_that_peft_leaves_alone_is_named(tmp_path: Path) -> None:
    import transformers

    hub: Any = transformers
    model = hub.BertForMaskedLM(hub.BertConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "base")
    tune(model).save_pretrained(tmp_path / "tuned")
    with pytest.warns(Finding, match="with PEFT the head of .*tuned keeps the base's embedding"):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", exclude=["predictions.bias"])


Q = "model.layers.0.q_proj.weight"


def changed(name: str, x: Tensor) -> dict[str, Tensor]:
    return {**BASE, name: x}


BASE = {Q: torch.zeros(8, 6), "model.embed_tokens.weight": torch.zeros(9, 6), "model.norm.weight": torch.zeros(6)}
HOSTILE: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
    (BASE, {}, "nothing to extract: the models have the same values"),
    (changed(Q, torch.ones(8, 6)), {"exclude": ["q_"]}, "same values but in model.layers.0.q_proj.weight: excluded"),
    (changed("model.embed_tokens.weight", torch.zeros(10, 6)), {}, r"embed_tokens.weight is \[10, 6\] in .*, \[9, 6\]"),
    (changed("model.extra.weight", torch.zeros(2)), {}, r"model.extra.weight \[2\] float32 is in .*tuned alone"),
    ({Q: torch.ones(8, 6)}, {}, "2 problems"),
    (changed(Q, torch.full((8, 6), torch.nan)), {}, "q_proj.weight holds NaN or infinity"),
    (changed("model.norm.weight", torch.full((6,), torch.inf)), {}, "norm.weight holds NaN or infinity"),
    (BASE, {"rank": 0}, "extraction: rank: found 0, expected greater than or equal to 1"),
    (BASE, {"energy": 1.5}, "energy: found 1.5, expected less than or equal to 1"),
    (BASE, {"rank": 1, "energy": 0.5}, "rank: found `rank` and `energy`, expected one of rank, energy and size"),
    (BASE, {"include": ["a", "("]}, r"include\[1\]: found '\(', expected a regular expression \(missing"),
    (BASE, {"dtype": "int8"}, "dtype: found 'int8', expected a dtype"),
    (BASE, {"dtype": "float64"}, "dtype: found 'float64', expected one of float32, bfloat16, float16; did you mean"),
    (changed(Q, torch.ones(8, 6)), {"memory": 100}, "found a memory of 100 B"),
    (changed(Q, torch.ones(8, 6)), {"size": 10}, "found a size of 10 B, expected more than .* for the header; give"),
    (changed(Q, torch.ones(8, 6)), {"size": 350}, "q_proj.weight: no rank fits into the size"),
    (
        changed("model.norm.weight", torch.ones(6)),
        {"size": 10},
        "saved whole, model.norm.weight; give more, or exclude some",
    ),
]


@pytest.mark.parametrize(("tensors", "options", "message"), HOSTILE)
def test_a_wrong_request_gets_one_message(
    tmp_path: Path, tensors: Mapping[str, Tensor], options: Mapping[str, Any], message: str
) -> None:
    save_checkpoint(tmp_path / "base", BASE, LLAMA)
    save_checkpoint(tmp_path / "tuned", tensors, LLAMA)
    with pytest.raises((PlanError, FormatError), match=message):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def test_factors_that_overflow_are_refused(tmp_path: Path) -> None:
    """Infinite numbers in the adapter would be NaN in the model."""
    name = "model.layers.0.mlp.up_proj.weight"
    for folder, size in (("base", 0.0), ("tuned", 1e12)):
        save_checkpoint(tmp_path / folder, {name: torch.full((8, 8), size)}, LLAMA)
    with pytest.raises(
        PlanError, match=r"up_proj\.weight: the factors of its change are too large for float16; choose"
    ):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1, dtype="float16")
    assert not (tmp_path / "out").exists()
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=1)
    assert errors(tmp_path / "base", tmp_path / "out", tmp_path / "tuned") < 1e-5
