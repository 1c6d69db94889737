"""Architectures whose merges test_architectures.py tests, a line each; docs/architectures.md lists them.

To add one: its name, its class in transformers with a config that names every size, and how its layers are stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Architecture(NamedTuple):
    """A line of the table. kind: the class of its model, and config: its entries.

    stack: the number of layers of each of the modules to stack, "" for the whole model; {} where a stack has no
    meaning. again: the first layer that the stack has twice. shapes: of the tensors, of models without a class in
    transformers.
    """

    kind: str
    config: Mapping[str, Any]
    stack: Mapping[str, int] = MappingProxyType({"": 2})
    again: int = 1
    shapes: Shapes = MappingProxyType({})


Config = dict[str, Any]

TEXT: Config = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 32}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = GROUPED | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

GPT2 = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}
DISTIL = {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
T5: Config = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2}
T5 |= {"num_heads": 2, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0}
GATED = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
PAIR: Config = {"vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
PAIR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
PAIR |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MAMBA = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
JAMBA |= {"mamba_d_state": 4, "mamba_dt_rank": 2}

IMAGE: Config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGE |= {"image_size": 8, "patch_size": 4}
CLIP: Config = {"text_config": TEXT | {"projection_dim": 16}, "vision_config": IMAGE | {"projection_dim": 16}}
CLIP |= {"projection_dim": 16}
LLAVA: Config = {"text_config": GROUPED | {"model_type": "llama"}, "image_token_index": 3}
LLAVA |= {"vision_config": IMAGE | {"model_type": "clip_vision_model"}}
PATCHES = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 16,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_VL: Config = {"text_config": GROUPED | MROPE, "image_token_id": 3, "video_token_id": 4}
QWEN_VL |= {"vision_start_token_id": 5, "vision_end_token_id": 6}
SOUND: Config = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}

ATTENTION = {f"attn1.to_{x}.weight": (8, 8) for x in "qkv"} | {"attn1.to_out.0.weight": (8, 8), "norm1.bias": (8,)}
RESNET = {"norm1.weight": (8,), "conv1.weight": (8, 8, 3, 3), "time_emb_proj.weight": (8, 16), "conv2.bias": (8,)}
UNET: Shapes = {
    "conv_in.weight": (8, 4, 3, 3),
    "time_embedding.linear_1.weight": (16, 8),
    **{f"down_blocks.0.resnets.{i}.{name}": shape for i in range(2) for name, shape in RESNET.items()},
    **{f"down_blocks.0.attentions.0.transformer_blocks.0.{name}": shape for name, shape in ATTENTION.items()},
    "down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3),
    **{f"mid_block.resnets.{i}.{name}": shape for i in range(2) for name, shape in RESNET.items()},
    **{f"up_blocks.0.resnets.{i}.{name}": shape for i in range(3) for name, shape in RESNET.items()},
    "conv_norm_out.weight": (8,),
    "conv_out.weight": (4, 8, 3, 3),
}

_A = Architecture
_WHOLE, _NONE = {"": 2}, dict[str, int]()
_PAIR, _LANGUAGE, _TOWERS = {"encoder": 2, "decoder": 2}, {"language_model": 2}, {"text_model": 2, "vision_model": 3}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "Llama": _A("LlamaForCausalLM", GROUPED),
        "Llama with biases": _A("LlamaForCausalLM", GROUPED | {"attention_bias": True, "mlp_bias": True}),
        "Llama, tied": _A("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}),
        "Mistral": _A("MistralForCausalLM", GROUPED),
        "Qwen2": _A("Qwen2ForCausalLM", GROUPED),
        "Qwen3": _A("Qwen3ForCausalLM", GROUPED),
        "Qwen3-Next": _A(
            "Qwen3NextForCausalLM",
            EXPERTS
            | LINEAR
            | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8},
        ),
        "Gemma 2": _A("Gemma2ForCausalLM", GROUPED),
        "Gemma 3, text": _A(
            "Gemma3ForCausalLM", GROUPED | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
        ),
        "Gemma 3, vision-language": _A(
            "Gemma3ForConditionalGeneration",
            {"text_config": GROUPED, "vision_config": IMAGE, "mm_tokens_per_image": 4, "image_token_index": 3},
            _LANGUAGE,
        ),
        "Phi-3": _A("Phi3ForCausalLM", GROUPED),
        "GPT-2": _A("GPT2LMHeadModel", GPT2),
        "GPT-NeoX": _A("GPTNeoXForCausalLM", TEXT),
        "OPT": _A("OPTForCausalLM", TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
        "BERT": _A("BertForMaskedLM", TEXT),
        "BERT with pooler": _A("BertModel", TEXT),
        "RoBERTa": _A("RobertaForMaskedLM", TEXT),
        "DistilBERT": _A("DistilBertForMaskedLM", DISTIL),
        "ModernBERT": _A("ModernBertForMaskedLM", TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
        "ViT": _A("ViTForImageClassification", IMAGE, {"": 3}),
        "CLIP": _A("CLIPModel", CLIP, _TOWERS),
        "SigLIP": _A("SiglipModel", {"text_config": TEXT | {"projection_size": 16}, "vision_config": IMAGE}, _TOWERS),
        "T5": _A("T5ForConditionalGeneration", T5, _PAIR),
        "T5 1.1": _A("T5ForConditionalGeneration", GATED, _PAIR),
        "BART": _A(
            "BartForConditionalGeneration",
            PAIR | {"decoder_layers": 3, "max_position_embeddings": 32},
            {"encoder": 2, "decoder": 3},
        ),
        "Whisper": _A(
            "WhisperForConditionalGeneration",
            PAIR | {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16},
            _PAIR,
        ),
        "wav2vec2": _A("Wav2Vec2ForCTC", TEXT | SOUND),
        "MusicGen": _A("MusicgenForCausalLM", TEXT | {"ffn_dim": 24, "num_codebooks": 2}),
        "Mixtral": _A("MixtralForCausalLM", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "Qwen3-MoE": _A("Qwen3MoeForCausalLM", EXPERTS),
        "OLMoE": _A("OlmoeForCausalLM", EXPERTS),
        "DeepSeek-V3": _A("DeepseekV3ForCausalLM", EXPERTS | ROUTED | LATENT | {"head_dim": 4}),
        "GLM-4-MoE": _A("Glm4MoeForCausalLM", EXPERTS | ROUTED),
        "gpt-oss": _A("GptOssForCausalLM", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "LFM2": _A("Lfm2ForCausalLM", GROUPED | {"layer_types": ["conv", "full_attention"]}),
        "Mamba": _A("MambaForCausalLM", MAMBA),
        "Jamba": _A("JambaForCausalLM", GROUPED | JAMBA | {"num_experts": 4}, _WHOLE, again=0),
        "Qwen2.5-VL": _A(
            "Qwen2_5_VLForConditionalGeneration", QWEN_VL | {"vision_config": PATCHES | {"window_size": 8}}, _LANGUAGE
        ),
        "Qwen3-VL": _A(
            "Qwen3VLForConditionalGeneration",
            QWEN_VL | {"vision_config": PATCHES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
            _LANGUAGE,
        ),
        "LLaVA": _A("LlavaForConditionalGeneration", LLAVA, _LANGUAGE),
        "ResNet": _A(
            "ResNetForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
            _NONE,
        ),
        "U-Net": _A("UNet2DConditionModel", {"_class_name": "UNet2DConditionModel"}, _NONE, shapes=UNET),
    }
)
