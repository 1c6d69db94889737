#!/usr/bin/env python3
"""Make three tiny models of images and text with random weights: a base, and two near it in place of fine-tunes.

    pip install -c constraints.txt -e ".[models]"
    python recipes/make/vision.py recipes/vision       # seconds; 1 MB

They are LLaVAs: a CLIP tower of two layers, a connector, and a Llama of three layers. They know nothing; they show how
a model of several parts is merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, set_seed

IMAGE = 3  # the token in whose places the image is
VOCABULARY = 64


def configure() -> LlavaConfig:
    """The config of all three."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, tie_word_embeddings=False)


def main() -> None:
    """Write the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    set_seed(0)
    model = LlavaForConditionalGeneration(configure())
    base = {name: x.clone() for name, x in model.state_dict().items()}
    for name in ("base", "charts", "photos"):
        if name != "base":
            noise = {key: 0.02 * torch.randn(x.shape) for key, x in base.items() if x.is_floating_point()}
            model.load_state_dict({key: x + noise[key] if key in noise else x for key, x in base.items()})
        model.save_pretrained(folder / name)


if __name__ == "__main__":
    main()
