"""Which tensors of a model are one: heads that loaders tie to an embedding, and embeddings that two stacks share.

A line of TIES is a tensor's name and those of the tensors that it may be tied to, all under one prefix; `*` stands for
one part of a name. Source: `_tied_weights_keys` of the model classes of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

TIES = """
lm_head.weight: model.embed_tokens.weight model.*.embed_tokens.weight shared.weight model.shared.weight
lm_head.weight: model.language_model.shared.weight transformer.wte.weight transformer.word_embeddings.weight
lm_head.weight: backbone.embeddings.weight prophetnet.word_embeddings.weight transformer.w.weight led.shared.weight
lm_head.weight: gpt_neox.embed_in.weight *.embeddings.word_embeddings.weight model.embed_tokens.word_embeddings.weight
lm_head.weight: model.text_model.embeddings.tok_embeddings.weight model.embed_tokens.embed_tokens.weight
lm_head.weight: transformer.tokens_embed.weight embed_tokens.weight model.local_encoder.embed_tokens.weight
lm_head.out_proj.weight: model.decoder.embed_tokens.weight model.encoder.text_model.embed_tokens.weight
lm_head.decoder.weight: *.embeddings.word_embeddings.weight
lm_head.decoder.bias: lm_head.bias
cls.predictions.decoder.weight: *.embeddings.word_embeddings.weight
cls.predictions.decoder.bias: cls.predictions.bias
predictions.decoder.weight: *.embeddings.word_embeddings.weight
predictions.decoder.bias: predictions.bias
generator_lm_head.weight: *.embeddings.word_embeddings.weight
mlm_score.decoder.weight: bridgetower.text_model.embeddings.word_embeddings.weight
mlm_score.decoder.weight: vilt.embeddings.text_embeddings.word_embeddings.weight
vocab_projector.weight: *.embeddings.word_embeddings.weight
output.weight: git.embeddings.word_embeddings.weight
entity_predictions.decoder.weight: luke.entity_embeddings.entity_embeddings.weight
pred_layer.proj.weight: transformer.embeddings.weight
decoder.weight: model.embeddings.tok_embeddings.weight
head.decoder.weight: model.embed_tokens.weight
head.weight: rwkv.embeddings.weight
lm_loss.weight: transformer.word_embedding.weight
proj_out.weight: model.decoder.embed_tokens.weight
output_projection.weight: biogpt.embed_tokens.weight model.decoder.embed_tokens.weight
decoder.output_projection.weight: decoder.embed_tokens.weight
embed_out.weight: *.embed_in.weight
text_decoder_postnet.lm_head.weight: speecht5.decoder.prenet.embed_tokens.weight
unembedding_projection.weight: model.embed_tokens.embedding_projection.weight
encoder.embed_tokens.weight: shared.weight decoder.embed_tokens.weight
decoder.embed_tokens.weight: shared.weight encoder.text_model.embed_tokens.weight
decoder.embed_tokens.eoi_embedding: encoder.text_model.embed_tokens.eoi_embedding
text_encoder.embed_tokens.weight: shared.weight
text_decoder.embed_tokens.weight: shared.weight
encoder.word_embeddings.weight: word_embeddings.weight
decoder.word_embeddings.weight: word_embeddings.weight
backbone_model.embed_tokens.embed_audio_tokens.weight: depth_decoder.model.embed_tokens.weight
encoder.language_model.embed_tokens.weight: decoder.embed_tokens.weight
encoder.language_model.norm.weight: decoder.norm.weight
encoder.embed_patches.proj.weight: patch_embed.proj.weight
encoder.embed_patches.proj.bias: patch_embed.proj.bias
encoder.relative_bias.biases.0.relative_attention_bias.weight: encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
decoder.relative_bias.biases.0.relative_attention_bias.weight: encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
prompt_encoder.shared_embedding.positional_embedding: shared_image_embedding.positional_embedding
ctc_head.weight: encoder.out.weight
ctc_head.bias: encoder.out.bias
mmm_text_head.decoder.bias: mmm_text_head.bias
mmm_image_head.decoder.bias: mmm_image_head.bias
mim_head.decoder.bias: mim_head.bias
mlm_head.decoder.bias: mlm_head.bias
"""  # noqa: E501

# The model types whose configs do not tie the head unless they say so; those of all others do.
_UNTIED = """
EvollaModel
afmoe apertus apertus1p5 apertus1p5_text arcee aria aria_text axk1 axk2 bailing_hybrid bamba beam bitnet blt
blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher bridgetower chameleon codegen cohere_asr
cohere_compass cosmos3_edge cosmos3_edge_text cosmos3_omni cwm dbrx deepseek_ocr2 deepseek_ocr2_encoder
deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory dots1 dots3_note
dots3_note_text emu3 emu3_text_model esmc eurobert evolla exaone exaone4 exaone4_5 exaone_moe falcon_h1 fast_vlm
flex_olmo flint fsmt fuyu git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm5_next
glm5_next_text glm_image glm_moe_dsa glm_ocr glmga gpt_neox gpt_oss gptj granite granite4_vision granite4_vision_text
granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium higgs_audio_v2 hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text hyperclovax idefics idefics2 idefics3 imagegpt internlm3 iquestcoder
jais2 jamba kimi_linear kolibri1 kyutai_speech_to_text laguna llama llama4 llama4_text llava llava_next
llava_next_video llava_onevision longcat_flash mamba2 mellum mimo_v2_flash minicpmv4_6 minicpmv4_7 minimax minimax_m2
minimax_m3_vl minimax_m3_vl_text ministral ministral3 mistral mistral4 mistral_large4 mistral_large4_text mixtral
mllama_text_model modernvbert molmo2 molmo2_text moonshine_streaming moshi moshi_depth muse_glimmer_text
muse_spark_text musicgen_decoder musicgen_melody_decoder nanochat nemotron nemotron_h neucodec olmo olmo2 olmo3
olmo_hybrid olmoe openai_privacy_filter perception_lm persimmon phi phi3 phi4_multimodal phimoe pix2struct
pix2struct_text_model pp_formulanet_text qianfan_ocr qwen2 qwen2_5_omni_talker qwen2_5_omni_thinker qwen2_5_vl
qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_talker_text qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp
qwen4_exp_text reformer rembert rwkv sarvam_mla sarvam_moe seed_oss smolvlm solar_open stablelm step3p5 ultrabert
ultravbert unlimited_ocr unlimited_ocr_text vibevoice video_llama_3 video_llava vipllava xcodec2 xlstm
"""
UNTIED = frozenset(_UNTIED.split())


def _pairs() -> dict[str, list[str]]:
    """The lines of TIES: for the name of each tied tensor the names that it may be tied to."""
    pairs: dict[str, list[str]] = {}
    for tied, sources in (line.split(": ") for line in TIES.strip().splitlines()):
        pairs.setdefault(tied, []).extend(sources.split())
    return pairs


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a model with this config ties its head, as the config says or by its model type; None without one."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(stated := part.get("tie_word_embeddings"), bool):
            return stated
    kind = config.get("model_type")
    return None if not isinstance(kind, str) else kind not in UNTIED


def tied_names(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of names that a model of these tensors may tie, the tensor first that loaders read."""
    names = dict.fromkeys(names)
    groups: dict[str, list[str]] = {}  # the group of each name
    for name, source in _tied_pairs(names):
        joined = list(dict.fromkeys([*groups.get(source, [source]), *groups.get(name, [name])]))
        groups.update(dict.fromkeys(joined, joined))
    return [tuple(group) for group in {id(group): group for group in groups.values()}.values()]


def _tied_pairs(names: Mapping[str, None]) -> Iterator[tuple[str, str]]:
    """A tied tensor and the one that it is tied to."""
    pairs = _pairs()
    ends = tuple(pairs)
    for name in (name for name in names if name.endswith(ends)):
        for tied, sources in pairs.items():
            prefix = name.removesuffix(tied)
            if name.endswith(tied) and (not prefix or prefix.endswith(".")):
                yield from ((name, source) for each in sources for source in _find(prefix, each, names))


def _find(prefix: str, source: str, names: Mapping[str, None]) -> list[str]:
    """The names that are the prefix and the source, in which `*` stands for one part."""
    start, star, end = (prefix + source).partition("*")
    if not star:
        return [start] if start in names else []
    fits = (name for name in names if name.endswith(end) and name.startswith(start))
    return [name for name in fits if "." not in name[len(start) : len(name) - len(end)]]
