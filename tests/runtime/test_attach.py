"""Modules that run with a model: where they join it, what they compute, and that they go again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_tune import TASKS, tiny, transformers  # noqa: F401
from torch import Tensor, nn

from mergekit_lfm.artifacts.attachment import Attachment, AttachmentInfo
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.runtime.attach import attach, expand_attachment, install
from mergekit_lfm.runtime.bottlenecks import Bottleneck, Fusion, Mixture, kronecker_sum
from mergekit_lfm.runtime.load import load_model
from mergekit_lfm.runtime.sites import PLACES, find_sites

CONFIG: dict[str, Any] = {
    "places": ["attention", "ffn"],
    "activation": "gelu",
    "size": 8,
    "scale": 1.0,
    "beside": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bottleneck": CONFIG,
    "compact": {**CONFIG, "rules": 4, "factor_rank": 2},
    "mixture": {**CONFIG, "experts": 3},
}
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGES: dict[str, Any] = {
    **{name: TINY[name] for name in TINY if name != "vocab_size"},
    "image_size": 16,
    "patch_size": 8,
}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
OPT: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
# The class of a model, its config, and of its last layer what ends attention, and what begins and ends the other part.
ARCHITECTURES: list[tuple[str, dict[str, Any], tuple[str, str, str]]] = [
    ("Llama", TINY, ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")),
    ("Phi3", {**TINY, "pad_token_id": 0}, ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    ("Bert", TINY, ("attention.output.dense", "intermediate.dense", "output.dense")),
    ("Roberta", TINY, ("attention.output.dense", "intermediate.dense", "output.dense")),
    ("GPT2", GPT, ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    ("OPT", {**OPT, "word_embed_proj_dim": 32, "vocab_size": 50}, ("self_attn.out_proj", "fc1", "fc2")),
    (
        "DistilBert",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 50},
        ("attention.out_lin", "ffn.lin1", "ffn.lin2"),
    ),
    ("ViT", IMAGES, ("attention.o_proj", "mlp.fc1", "mlp.fc2")),
    ("Falcon", FALCON, ("self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    (
        "Lfm2",
        {**TINY, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        ("self_attn.out_proj", "feed_forward.w1", "feed_forward.w2"),
    ),
]


def random_tensors(parameters: dict[str, nn.Parameter]) -> None:
    """Values that are not 0, so that a module changes something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in parameters.values():
            x.copy_(0.3 * torch.randn(x.shape, generator=generator))


def outputs(model: nn.Module) -> Tensor:
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        output = model(input_ids=ids)
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found


@pytest.mark.parametrize(("name", "config", "names"), ARCHITECTURES, ids=[each[0] for each in ARCHITECTURES])
def test_the_places_of_an_architecture_are_found(
    name: str, config: dict[str, Any], names: tuple[str, str, str]
) -> None:
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    sites = find_sites(model, PLACES)
    assert len(sites) == (3 if name == "Lfm2" else 4)  # whose first layer has a convolution for attention
    attention, ffn = sites[-2:]
    own = {id(module): path.removeprefix(f"{ffn.layer}.") for path, module in model.named_modules()}
    assert (own[id(attention.writes)], own[id(ffn.reads)], own[id(ffn.writes)]) == names
    assert {site.width for site in sites} == {32} and ffn.layer.endswith(".1")


def test_a_model_whose_places_cannot_be_told_is_refused() -> None:
    with torch.device("meta"):
        mamba = transformers.MambaModel(transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50))
        experts = transformers.MixtralModel(transformers.MixtralConfig(**TINY, num_local_experts=2))
    with pytest.raises(PlanError, match="no numbered layers with attention"):
        find_sites(mamba, PLACES)
    with pytest.raises(PlanError, match=r"layer layers.0 has no matrix where one attention"):
        find_sites(experts, PLACES)


@pytest.mark.parametrize("form", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_new_module_changes_nothing_a_trained_one_does_and_it_goes_again(
    form: str,
    kind: str,
    tiny: Path,  # noqa: F811
) -> None:
    model = load_model(tiny / kind, TASKS[kind]).model
    before, names = outputs(model), {*model.state_dict()}
    attached = install(model, form, CONFIGS[form])
    assert torch.equal(outputs(model), before)
    random_tensors(attached.parameters)
    assert float((outputs(model) - before).abs().max()) > 1e-3
    with pytest.raises(PlanError, match="the model has an attachment"):
        install(model, form, CONFIGS[form])
    attached.detach()
    assert torch.equal(outputs(model), before) and {*model.state_dict()} == names


def apply(adapter: nn.Module, x: Tensor) -> Tensor:
    """U f(D x + a) + b by its parameters."""
    own = dict(adapter.named_parameters())
    inner = torch.nn.functional.gelu(x @ own["down.weight"].T + own["down.bias"])
    return inner @ own["up.weight"].T + own["up.bias"]


def test_a_layer_of_a_bert_is_that_of_the_paper(tiny: Path) -> None:  # noqa: F811
    """Figure 2 of Houlsby et al.: after each part, before the sum with its input and the normalisation."""
    model: Any = load_model(tiny / "bert", "classification", dtype="float64").model
    random_tensors(install(model, "bottleneck", CONFIG).parameters)
    layer = model.bert.encoder.layer[1]
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention, output = layer.attention, layer.output
    with torch.no_grad():
        context = attention.self(x)[0]
        written = torch.nn.functional.linear(context, attention.output.dense.weight, attention.output.dense.bias)
        middle = attention.output.LayerNorm(written + apply(layer.attention_adapter, written) + x)
        inner = layer.intermediate(middle)
        written = torch.nn.functional.linear(inner, output.dense.weight, output.dense.bias)
        expected = output.LayerNorm(written + apply(layer.ffn_adapter, written) + middle)
        found = layer(x)
    assert torch.allclose(found[0] if isinstance(found, tuple) else found, expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_beside_a_part_the_module_reads_the_input_of_that(tiny: Path) -> None:  # noqa: F811
    """Table 1 of He et al.: h + s * adapter(x), of a Llama, also where activations are computed again."""
    model: Any = load_model(tiny / "llama", "lm", dtype="float64").model
    config = {**CONFIG, "places": ["ffn"], "beside": True, "scale": 3.0}
    attached = install(model, "bottleneck", config)
    random_tensors(attached.parameters)
    mlp, adapter = model.model.layers[0].mlp, model.model.layers[0].ffn_adapter
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        expected = inner @ mlp.down_proj.weight.T + 3 * apply(adapter, x)
        assert torch.allclose(mlp(x), expected, atol=1e-12)
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.zero_grad()
        model(input_ids=torch.arange(2, 14).view(2, 6)).logits.square().mean().backward()
        gradients.append([x.grad.clone() for x in attached.parameters.values() if x.grad is not None])
    assert len(gradients[0]) == len(attached.parameters)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_kronecker_sums_are_expanded_matrices(tiny: Path) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(3, *shape, dtype=torch.float64, generator=generator) for shape in ((3, 3), (4, 5)))
    expected = torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)]).sum(0)
    assert torch.allclose(kronecker_sum(left, right), expected, atol=1e-12)
    model = load_model(tiny / "bert", "classification", dtype="float64").model
    attached = install(model, "compact", CONFIGS["compact"])
    random_tensors(attached.parameters)
    found = outputs(model)
    tensors = {name: x.detach().clone() for name, x in attached.parameters.items()}
    attached.detach()
    plain = expand_attachment(Attachment(AttachmentInfo("compacter", "compact", CONFIGS["compact"], "base"), tensors))
    first, at = plain.tensors, "encoder.layer.0.ffn_adapter"
    rules = tensors["shared_adapter.left"]
    matrices = [torch.kron(rules[i], tensors[f"{at}.down_s"][i] @ tensors[f"{at}.down_t"][i]) for i in range(4)]
    assert torch.allclose(first[f"{at}.down.weight"], torch.stack(matrices).sum(0).T, atol=1e-12)
    attach(model, plain, "base")
    assert torch.allclose(outputs(model), found, atol=1e-10)


def test_a_mixture_draws_in_training_and_is_its_mean_otherwise() -> None:
    torch.manual_seed(0)
    mixture, plain = Mixture(CONFIGS["mixture"], 32).double(), Bottleneck(CONFIG, 32).double()
    random_tensors(dict(mixture.named_parameters()))
    states = [dict(expert.named_parameters()) for expert in mixture.experts]
    with torch.no_grad():
        for name, own in plain.named_parameters():
            own.copy_((states[0][name] + states[1][name] + states[2][name]) / 3)
    x = torch.randn(4, 32, dtype=torch.float64)
    mixture.eval()
    assert torch.allclose(mixture(x), plain(x), atol=1e-12)
    mixture.train()
    pairs = [apply(_joined(mixture.experts[i], mixture.experts[j]), x) for i in range(3) for j in range(3)]
    results = [mixture(x) for _ in range(60)]
    drawn = {next(n for n, pair in enumerate(pairs) if torch.allclose(each, pair)) for each in results}
    assert len(drawn) > 6  # a D with the U of another, too


def _joined(first: Any, second: Any) -> nn.Module:
    module = nn.Module()
    module.down, module.up = first.down, second.up
    return module


def test_a_fusion_weighs_adapters_by_attention() -> None:
    """Equations 2 to 4 of Pfeiffer et al., for each token by itself; with a query of 0 the mean."""
    fusion = Fusion({**CONFIG, "adapters": [CONFIG, CONFIG]}, 32).double().requires_grad_(False)
    random_tensors(dict(fusion.adapters.named_parameters()))
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    added = [apply(adapter, x) for adapter in fusion.adapters]
    assert torch.allclose(fusion(x), (added[0] + added[1]) / 2, atol=1e-12)
    random_tensors(dict(fusion.named_parameters()))
    added, query = [apply(adapter, x) for adapter in fusion.adapters], fusion.query(x)
    for row in range(2):
        for token in range(3):
            keys = [float(fusion.key(each[row, token]) @ query[row, token]) for each in added]
            shares = torch.tensor(keys, dtype=torch.float64).softmax(0)
            expected = sum(s * fusion.value(each[row, token]) for s, each in zip(shares, added, strict=True))
            assert torch.allclose(fusion(x)[row, token], expected, atol=1e-12)


def test_an_attachment_that_does_not_fit_is_refused_and_nothing_is_left(tiny: Path) -> None:  # noqa: F811
    model = load_model(tiny / "bert", "classification").model
    before, names = outputs(model), {*model.state_dict()}
    made = install(model, "bottleneck", CONFIG)
    tensors = {name: x.detach().clone() for name, x in made.parameters.items()}
    made.detach()
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        ({"base": "other"}, {}, "belongs to a model of content other, found one of content base"),
        ({}, {"more": torch.zeros(1)}, "does not fit the model at more"),
        ({}, {"encoder.layer.0.ffn_adapter.up.bias": torch.zeros(3)}, "does not fit the model at encoder.layer.0"),
        ({"form": "other"}, {}, "has a damaged config"),
        ({"config": {"places": ["ffn"]}}, {}, "has a damaged config"),
    ]
    for facts, changed, message in cases:
        given: dict[str, Any] = {"method": "houlsby", "form": "bottleneck", "config": CONFIG, "base": "base", **facts}
        info = AttachmentInfo(**given)
        with pytest.raises(FormatError, match=message):
            attach(model, Attachment(info, {**tensors, **changed}), "base")
        assert {*model.state_dict()} == names and torch.equal(outputs(model), before)
