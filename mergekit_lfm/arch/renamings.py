"""Names that differ between versions of libraries and between wrappers, as pairs of patterns.

Each pair is a regular expression and its replacement. Whoever reads them tries each where it makes more names equal.
"""

from __future__ import annotations

RENAMINGS: tuple[tuple[str, str], ...] = (
    # torch.compile, DataParallel, FSDP, activation checkpointing, DeepSpeed, peft
    (r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.", r"\1"),
    (r"^base_model\.model\.", ""),
    # BERT as converted from TensorFlow, and since
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"LayerNorm\.weight$", "LayerNorm.gamma"),
    (r"LayerNorm\.bias$", "LayerNorm.beta"),
    # weight normalisation and spectral normalisation before and after torch's parametrizations
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"\.weight_orig$", ".parametrizations.weight.original"),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"\.parametrizations\.weight\.original$", ".weight_orig"),
    # Mixtral on the Hub, and in transformers 5
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.mlp\.", ".block_sparse_moe."),
    # vision-language models before and after transformers 4.52
    (r"^visual\.", "model.visual."),
    (r"^model\.visual\.", "visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(vision_tower|vision_model|multi_modal_projector|image_newline|connector)\b", r"model.\1"),
    (r"^model\.(vision_tower|vision_model|multi_modal_projector|image_newline|connector)\b", r"\1"),
)
