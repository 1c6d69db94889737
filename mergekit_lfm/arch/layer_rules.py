"""Entries of a config that mean something else in every layer: thresholds, periods, and the patterns of classes.

A rule gives one fact of a layer from the config, the layer and the number of layers. Where a list may say the same,
such as `layer_types`, the fact has its name and the values its entries. Source: the configuration and model classes of
transformers 5.24; the rules of `*` are for entries that other classes read in the same way.
"""

# ruff: noqa: ARG001, ARG005 - every function of the table takes the same three

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

Part = Mapping[str, Any]
Value = Callable[[Part, int, int], Any]  # of the config with its defaults, the layer, and the number of layers
FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
HYBRID, SLIDING_HYBRID, CONV = "hybrid", "hybrid_sliding", "conv"


class Rule(NamedTuple):
    """One fact of a layer, as entries of a config state it.

    models: model types without `_text`; `*` stands for all others whose configs have the first of the keys.
    keys: the entries that the fact depends on, each with the value that the class takes without it.
    thresholds: those that get another value when layers are stacked, if one fits.
    rewrite: from the fact of every layer to entries that say so, None for one to leave out; None if no entries can.
    """

    fact: str
    models: str
    keys: dict[str, Any]
    value: Value
    thresholds: tuple[str, ...] = ()
    rewrite: Callable[[Sequence[Any]], dict[str, Any]] | None = None

    def values(self, part: Part, count: int) -> list[Any]:
        """The fact of every layer of a config."""
        stated = {key: part[key] for key in self.keys if part.get(key) is not None}
        filled = {**part, **self.keys, **stated}
        return [self.value(filled, layer, count) for layer in range(count)]


def _listed(fact: str, models: str, value: Value, *thresholds: str, **keys: Any) -> Rule:
    """A rule of classes that read a list of the fact instead, if the config has one."""
    return Rule(fact, models, keys, value, thresholds, lambda values: {**dict.fromkeys(keys), fact: list(values)})


def _types(models: str, value: Value, *thresholds: str, **keys: Any) -> Rule:
    return _listed("layer_types", models, value, *thresholds, **keys)


def _mlps(models: str, value: Value, *thresholds: str, **keys: Any) -> Rule:
    return _listed("mlp_layer_types", models, value, *thresholds, **keys)


def _every(period: str | int, word: Any, other: Any, first: int = -1) -> Value:
    """One word for the layers at `first` plus a multiple of the period, an entry or a number, another for the rest.

    A first layer of -1 is the last one of a period.
    """

    def value(c: Part, i: int, n: int) -> Any:
        step = c[period] if isinstance(period, str) else period
        return word if step and (i - first) % step == 0 else other

    return value


def _below(threshold: str | int, word: str = "dense", other: str = "sparse") -> Value:
    """One word for the layers before a threshold, an entry or a number, another from there on."""
    return lambda c, i, n: word if i < (c[threshold] if isinstance(threshold, str) else threshold) else other


def _windows(c: Part, i: int, n: int) -> str:
    """A number p: every p-th layer has full attention, none is sliding for 0. LLLG: local and global layers in turn."""
    pattern = c["sliding_window_pattern"]
    if isinstance(pattern, str):
        return SLIDING if pattern[i % len(pattern)] == "L" else FULL
    return _every(pattern, FULL, SLIDING)(c, i, n) if pattern else FULL


def _windows_from(*, used: bool) -> Value:
    """Windows from a layer on, if there are any. Configs name a size also where windows are off.

    used: whether a class takes them for used if its config does not say.
    """

    def value(c: Part, i: int, n: int) -> str:
        on = c.get("use_sliding_window", used) and c.get("sliding_window", 4096) is not None
        return SLIDING if on and i >= c["max_window_layers"] else FULL

    return value


def _alternating(c: Part, i: int, n: int) -> str:
    on = c.get("use_sliding_window", False) and i < c["max_window_layers"]
    return SLIDING if on and i % 2 == 0 else FULL


def _cohere2_moe(c: Part, i: int, n: int) -> str:
    """Two periods: that of the dense layers in front, and that of the others, counted from there."""
    dense = c["first_k_dense_replace"]
    if i < dense:
        return str(_every("prefix_dense_sliding_window_pattern", FULL, SLIDING)(c, i, n))
    return _windows(c, i - dense, n)


def _kimi(c: Part, i: int, n: int) -> str:
    """The list of layers with full attention counts from 1."""
    full = (c.get("linear_attn_config") or {}).get("full_attn_layers")
    return FULL if (i and i % 4 == 0 if full is None else i + 1 in full) else LINEAR


def _rope(c: Part, i: int, n: int) -> int:
    """1 for a layer with rotary positions, 0 without, as in `no_rope_layers`."""
    listed = c.get("no_rope_layers")
    return int(listed[i] if listed and len(listed) == n else (i + 1) % c["no_rope_layer_interval"] != 0)


def _chunked(c: Part, i: int, n: int) -> str:
    return "chunked_attention" if _rope(c, i, n) and c.get("attention_chunk_size", 8192) is not None else FULL


def _unroped_windows(c: Part, i: int, n: int) -> str:
    on = c.get("use_sliding_window", False) and c.get("sliding_window") is not None
    return SLIDING if on and not _rope(c, i, n) else FULL


def _jamba(c: Part, i: int, n: int) -> str:
    return "attention" if i % c["attn_layer_period"] == c["attn_layer_offset"] else "mamba"


def _zamba(c: Part, i: int, n: int) -> str:
    """The pattern starts at the third layer, which is hybrid."""
    at = (i - 3) % c["attn_layer_period"] == c["attn_layer_offset"]
    return HYBRID if i == 2 or (i > 2 and at) else LINEAR


def _inkling(c: Part, i: int, n: int) -> str:
    local = c.get("local_layer_ids")
    return SLIDING_HYBRID if ((i + 1) % 6 if local is None else i in local) else HYBRID


def _compressed(c: Part, i: int, n: int) -> str:
    ratios = c.get("compress_ratios")
    words = {0: SLIDING, 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    return words.get(ratios[i] if ratios and i < len(ratios) else 4 if i > 1 and i % 2 else 128, "")


def _dots3(c: Part, i: int, n: int) -> str:
    everywhere = FULL if c.get("use_dsa") is False else INDEXED
    return everywhere if i < 2 or i % 4 == 1 or not c.get("use_sliding_window", True) else SLIDING


def _indexers(c: Part, i: int, n: int) -> str:
    if pattern := c.get("index_topk_pattern"):
        return "full" if i < len(pattern) and pattern[i] in ("F", "full") else "shared"
    return "shared" if max(i - c["index_skip_topk_offset"] + 1, 0) % max(c["index_topk_freq"], 1) else "full"


def _thetas(default: float) -> Value:
    """The base of the rotary positions of each layer, 0 for those without: every fourth one, the last among them."""
    return lambda c, i, n: (c.get("rope_parameters") or {}).get("rope_theta", default) if (n - 1 - i) % 4 else 0


def _step3(c: Part, i: int, n: int) -> str:
    listed = c.get("moe_layers_enum")
    layers = listed.split(",") if isinstance(listed, str) else listed
    return "sparse" if (i >= 3 if layers is None else i in map(int, layers)) else "dense"


def _sparse_from(c: Part, i: int, n: int) -> str:
    freq = c["moe_layer_freq"]
    often = (i < len(freq) and freq[i]) if isinstance(freq, list) else freq and i % freq == 0
    return "sparse" if often and i >= c["first_k_dense_replace"] else "dense"


def _dense_but_every(c: Part, i: int, n: int) -> bool:
    step = c["decoder_sparse_step"]
    return i in c["mlp_only_layers"] or step <= 0 or (i + 1) % step != 0


def _sparse_between(c: Part, i: int, n: int) -> bool:
    last = c["moe_layer_end_index"]
    inside = c["moe_layer_start_index"] <= i <= (n - 1 if last == -1 else last)
    return bool(inside and (i + 1) % c["moe_layer_interval"] == 0)


def _third(c: Part, i: int, n: int) -> Any:
    """Whether a layer is of the input, repeated, or of the output; None if these are not all layers."""
    parts = [part for part in _THIRDS for _ in range(c[f"n_{part}_layers"])]
    return parts[i] if len(parts) == n else None


def _expand(c: Part, i: int, n: int) -> Any:
    """The entry of a layer in [[[kinds], times], ...]; None if that is another number of layers."""
    kinds = [kind for kinds, times in c["attention_types"] for _ in range(times) for kind in kinds]
    return kinds[i] if len(kinds) == n else None


_THIRDS = ("input", "recurrent", "output")
_LARA = (LINEAR, SLIDING, LINEAR, FULL, SLIDING)

RULES = (
    # the kind of attention
    _types("gemma3 t5gemma2 t5gemma2_decoder", _windows, sliding_window_pattern=6),
    _types("cohere2 exaone4 exaone_moe", _windows, sliding_window_pattern=4),
    _types(
        "cohere2_moe",
        _cohere2_moe,
        sliding_window_pattern=4,
        prefix_dense_sliding_window_pattern=1,
        first_k_dense_replace=0,
    ),
    Rule("layer_types", "*", {"sliding_window_pattern": 0}, _windows),
    _types("gemma2 gpt_oss t5_gemma_module vaultgemma", _every(2, FULL, SLIDING)),
    _types("ultrabert", _every(3, FULL, SLIDING)),
    _types("olmo3 dory", _every(4, FULL, SLIDING)),
    _types("gemma3n kolibri1", _every(5, FULL, SLIDING)),
    _types("cwm granite_swa granitemoe_swa", _every(4, FULL, SLIDING, first=0)),
    _types("inkling2 inkling2_loop", _every(6, HYBRID, SLIDING_HYBRID)),
    _types("mimo_v2_flash", lambda c, i, n: FULL if i == 0 else _every(6, FULL, SLIDING)(c, i, n)),
    _types(
        "gemma4 gemma4_unified diffusion_gemma embedding_gemma2 beam neomme",
        lambda c, i, n: FULL if i == n - 1 else _every(6, FULL, SLIDING)(c, i, n),
    ),
    _types("flint", lambda c, i, n: FULL if i < 2 or i == n - 1 else _every(4, FULL, SLIDING, first=1)(c, i, n)),
    _types("muse_glimmer muse_spark", lambda c, i, n: SLIDING if (n - 1 - i) % 4 else FULL),
    _types("lfm3", lambda c, i, n: FULL if i % 4 == 2 else SLIDING if i and i % 4 == 0 else CONV),
    _types("lara_mini", lambda c, i, n: _LARA[i % len(_LARA)]),
    _types("minimax", _every(2, LINEAR, FULL)),
    _types("olmo_hybrid", _every(4, FULL, LINEAR)),
    _types("glm5_next", _every(4, INDEXED, LINEAR)),
    _types("lfm3_vl_vision", lambda c, i, n: CONV if i < 2 or i % 2 else FULL),
    _types(
        "muse_glimmer_vision muse_spark_vision",
        lambda c, i, n: FULL if i == n - 1 else _every(4, FULL, "window_attention")(c, i, n),
    ),
    _types("inkling", _inkling),
    _types("deepseek_v4", _compressed),
    _types("dots3_note", _dots3),
    _types("kimi_linear", _kimi),
    _types("afmoe", _every("global_attn_every_n_layers", FULL, SLIDING), global_attn_every_n_layers=4),
    _types(
        "modernbert modernbert-decoder",
        _every("global_attn_every_n_layers", FULL, SLIDING, first=0),
        global_attn_every_n_layers=3,
    ),
    _types(
        "qwen3_next qwen3_5 qwen3_5_moe", _every("full_attention_interval", FULL, LINEAR), full_attention_interval=4
    ),
    _types("qwen4_exp", _every("full_attention_interval", INDEXED, LINEAR), full_attention_interval=4),
    Rule("layer_types", "*", {"full_attention_interval": 1}, _every("full_attention_interval", FULL, LINEAR)),
    _types("bailing_hybrid", _every("layer_group_size", FULL, LINEAR), layer_group_size=6),
    _types(
        "qwen2 qwen3 qwen2_5_omni qwen2_5_omni_talker deepseek_ocr2_encoder",
        _windows_from(used=False),
        "max_window_layers",
        max_window_layers=28,
    ),
    _types("qwen2_vl qwen2_5_vl", _windows_from(used=False), "max_window_layers", max_window_layers=80),
    _types("dots1", _windows_from(used=True), "max_window_layers", max_window_layers=62),
    _types("qwen2_moe", _alternating, "max_window_layers", max_window_layers=28),
    Rule("layer_types", "*", {"max_window_layers": 0}, _windows_from(used=False), ("max_window_layers",)),
    _listed("no_rope_layers", "llama4 smollm3 mistral_large4", _rope, no_rope_layer_interval=4),
    _types("llama4", _chunked, no_rope_layer_interval=4),
    _types("smollm3", _unroped_windows, no_rope_layer_interval=4),
    Rule("no_rope_layers", "*", {"no_rope_layer_interval": 4}, _rope),
    _listed("layers_block_type", "zamba", _zamba, attn_layer_period=6, attn_layer_offset=4),
    Rule("layers_block_type", "*", {"attn_layer_period": 8, "attn_layer_offset": 4}, _jamba),
    Rule(
        "attention_layers",
        "gpt_neo",
        {"attention_types": [[["global", "local"], 12]]},
        _expand,
        rewrite=lambda values: {"attention_types": [[list(values), 1]], "attention_layers": list(values)},
    ),
    Rule(
        "block_types",
        "recurrent_gemma",
        {"block_types": ["recurrent", "recurrent", "attention"]},
        lambda c, i, n: c["block_types"][i % len(c["block_types"])],
        rewrite=lambda values: {"block_types": list(values)},
    ),
    _listed("indexer_types", "hy_v4 hy_v4_vl", lambda c, i, n: "full" if i == 0 or i % 4 == 1 else "shared"),
    _listed(
        "indexer_types",
        "glm_moe_dsa mistral_large4 glm5_next",
        _indexers,
        index_topk_freq=1,
        index_skip_topk_offset=2,
    ),
    _listed("layer_rope_theta", "muse_glimmer", _thetas(10_000.0)),
    _listed("layer_rope_theta", "muse_spark", _thetas(500_000.0)),
    # dense layers and those of experts
    _mlps("axk1 axk2 dots3_note", _sparse_from, "first_k_dense_replace", first_k_dense_replace=1, moe_layer_freq=1),
    _mlps("cohere2_moe", _below("first_k_dense_replace"), "first_k_dense_replace", first_k_dense_replace=0),
    _mlps(
        "exaone_moe kimi_linear mistral_large4 unlimited_ocr",
        _below("first_k_dense_replace"),
        "first_k_dense_replace",
        first_k_dense_replace=1,
    ),
    _mlps("bailing_hybrid", _below("first_k_dense_replace"), "first_k_dense_replace", first_k_dense_replace=2),
    _mlps(
        "deepseek_v32 glm_moe_dsa", _below("first_k_dense_replace"), "first_k_dense_replace", first_k_dense_replace=3
    ),
    Rule(
        "mlp_layer_types",
        "*",
        {"first_k_dense_replace": 0, "moe_layer_freq": 1},
        _sparse_from,
        ("first_k_dense_replace",),
    ),
    Rule("mlp_layer_types", "*", {"num_dense_layers": 0}, _below("num_dense_layers"), ("num_dense_layers",)),
    _mlps("ernie4_5_vl_moe glm4_moe_lite laguna mimo_v2_flash hy_v3 hy_v4 hy_v4_vl", _below(1)),
    _mlps("glm5_next beam", _below(3)),
    _mlps("step3p5 step3p7", _step3),
    _mlps("inkling", _below("dense_mlp_idx"), "dense_mlp_idx", dense_mlp_idx=0),
    _mlps("deepseek_v4", _below("num_hash_layers", "hash_moe", "moe"), "num_hash_layers", num_hash_layers=3),
    Rule(
        "mlp_only_layers",
        "qwen2_moe qwen3_moe qwen3_next qwen3_vl_moe qwen3_omni_moe qwen3_omni_moe_talker flint *",
        {"mlp_only_layers": [], "decoder_sparse_step": 1},
        _dense_but_every,
        rewrite=lambda values: {
            "mlp_only_layers": [layer for layer, dense in enumerate(values) if dense],
            "decoder_sparse_step": 1,
        },
    ),
    Rule(
        "moe_layers",
        "ernie4_5_moe",
        {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        _sparse_between,
        ("moe_layer_start_index", "moe_layer_end_index"),
    ),
    Rule(
        "moe_layers",
        "llama4",
        {"interleave_moe_layer_step": 1},
        _every("interleave_moe_layer_step", True, False),
        rewrite=lambda values: {
            "interleave_moe_layer_step": None,
            "moe_layers": [layer for layer, sparse in enumerate(values) if sparse],
        },
    ),
    Rule(
        "moe_layers",
        "*",
        {"expert_layer_period": 2, "expert_layer_offset": 1},
        lambda c, i, n: i % c["expert_layer_period"] == c["expert_layer_offset"],
    ),
    Rule(
        "n_recurrent_layers",
        "dory",
        {"n_input_layers": 0, "n_recurrent_layers": 0, "n_output_layers": 0},
        _third,
        rewrite=lambda values: {f"n_{part}_layers": list(values).count(part) for part in _THIRDS},
    ),
    # what else depends on the number of a layer, or on how many there are
    Rule(
        "num_kv_shared_layers",
        "*",
        {"num_kv_shared_layers": 0},
        lambda c, i, n: i >= n - c["num_kv_shared_layers"] if c["num_kv_shared_layers"] <= n else None,
        ("num_kv_shared_layers",),
    ),
    Rule(
        "scale_attn_by_inverse_layer_idx",
        "*",
        {"scale_attn_by_inverse_layer_idx": False},
        lambda c, i, n: i + 1 if c["scale_attn_by_inverse_layer_idx"] else None,
    ),
    Rule(
        "scale_depth",
        "minicpm minicpm3",
        {"scale_depth": 1.4},
        lambda c, i, n: round(c["scale_depth"] / sqrt(n), 9),
        rewrite=lambda values: {"scale_depth": values[0] * sqrt(len(values))} if len(set(values)) == 1 else {},
    ),
)


def rules_of(part: Part, model: str) -> list[Rule]:
    """The rule for each fact that the config of such a model states, or that its class takes for granted."""
    found = {rule.fact: rule for rule in RULES if model in rule.models.split()}
    for rule in RULES:
        if "*" in rule.models.split() and part.get(next(iter(rule.keys))) is not None:
            found.setdefault(rule.fact, rule)
    return list(found.values())
