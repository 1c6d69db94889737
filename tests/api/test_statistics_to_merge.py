"""From running models, by their statistics, to a merged model that runs: in GPT-2's layout, and a Llama's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_lfm import merge
from mergekit_lfm.collect.run import collect

transformers = pytest.importorskip("transformers")

VOCABULARY = 40


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


MAKERS: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama}
# For each kind: a layer that shares its inputs with no other, one that shares them, and the last layer of all.
LAYERS = {
    "gpt2": ["transformer.h.1.mlp.c_proj", "transformer.h.0.attn.c_attn"],
    "llama": ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj", "lm_head"],
}


class Pair:
    """Two models of a kind with random weights, each with texts of its own, and a recipe that merges them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder, self.models, self.data = folder, [], []
        for i in range(2):
            torch.manual_seed(i)
            model = MAKERS[kind]().eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder / f"m{i}")
            self.models.append(model)
            self.data.append([{"input_ids": torch.randint(VOCABULARY, (8, 10))} for _ in range(3)])

    def merged(self, method: str, kind: str, **parameters: float) -> Any:
        for i, (model, data) in enumerate(zip(self.models, self.data, strict=True)):
            file = self.folder / f"m{i}.{kind}"
            collect(kind, model, data, file, task="lm", checkpoint=self.folder / f"m{i}")
        models = [{"model": str(self.folder / f"m{i}"), "stats": str(self.folder / f"m{i}.{kind}")} for i in range(2)]
        recipe = {"merge_method": method, "models": models, "parameters": parameters}
        out = Path(merge(recipe, self.folder / method, threads=1))
        return transformers.AutoModelForCausalLM.from_pretrained(out)


def seen(model: Any, layer: str, data: list[dict[str, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """The layer's inputs, with a 1 appended, and its outputs, over all data; a row for each token."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, args, output: found.append((args[0], output)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    x, y = (torch.cat([part.flatten(0, -2) for part in side]).double().numpy() for side in zip(*found, strict=True))
    return np.c_[x, np.ones(len(x))], y


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layer_fits_both_models_answers_on_their_own_texts(kind: str, tmp_path: Path) -> None:
    """numpy fits one map to the inputs and outputs of both models, recorded as they run."""
    pair = Pair(kind, tmp_path)
    merged = pair.merged("regmean", "gram", alpha=1.0, ridge=0.0)
    for layer in LAYERS[kind]:
        module = merged.get_submodule(layer)
        x, y = (np.concatenate(side) for side in zip(*map(seen, pair.models, [layer] * 2, pair.data), strict=True))
        if module.bias is None:
            x = x[:, :-1]
        fitted = np.linalg.lstsq(x, y, rcond=None)[0]  # [inputs (+ 1), outputs]
        weight = module.weight.detach().double().numpy()
        found = weight if kind == "gpt2" else weight.T
        bias = [] if module.bias is None else [module.bias.detach().double().numpy()[None]]
        found = np.concatenate([found, *bias])
        own = pair.models[0].get_submodule(layer).weight.detach().double().numpy()
        assert np.square(x @ found - y).sum() <= np.square(x @ fitted - y).sum() * (1 + 1e-4)
        # the outputs of a LayerNorm lie in a plane, so that the map itself is not unique
        assert np.allclose(x @ found, x @ fitted, atol=1e-3 * np.abs(y).max())
        assert not np.allclose(weight, own, atol=0.1)


def test_parameters_that_only_one_model_depends_on_come_from_it(tmp_path: Path) -> None:
    """The second model reads only the first half of the vocabulary; the Fisher information of the rest is 0 there."""
    pair = Pair("llama", tmp_path)
    for batch in pair.data[1]:
        batch["input_ids"] %= VOCABULARY // 2
    merged = pair.merged("fisher", "fisher")
    first, second, result = (m.get_input_embeddings().weight.detach() for m in (*pair.models, merged))
    seen_rows = torch.cat([batch["input_ids"].unique() for batch in pair.data[0]]).unique()  # type: ignore[no-untyped-call]
    unseen = seen_rows[seen_rows >= VOCABULARY // 2]
    assert len(unseen) > 5
    assert torch.allclose(result[unseen], first[unseen], rtol=1e-5)
    both = result[: VOCABULARY // 2]
    inside = (both - first[: VOCABULARY // 2]) * (both - second[: VOCABULARY // 2])
    assert bool((inside <= 1e-6).all())
