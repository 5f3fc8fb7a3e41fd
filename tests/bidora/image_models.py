"""A tiny ViT with random weights, and a folder of small images of three classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

__all__ = ["save_vit", "write_pets"]


def save_vit(folder: Path, **settings: Any) -> Path:
    """Save a ViT for images of 8 × 8 pixels, without a head, and its image processor."""
    torch.manual_seed(0)
    given = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 4, **settings}
    config = ViTConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        initializer_range=0.2,
        **given,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def write_pets(root: Path, each: int = 10) -> Path:
    """Write noisy images of three classes, told apart by colour, of mixed sizes."""
    random = np.random.default_rng(0)
    for place, name in enumerate(("ant", "bee", "cat")):
        for part, count in (("train", each), ("test", 4)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (8 + i, 10, 3), dtype=np.uint8)
                pixels[..., place] += 130
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
