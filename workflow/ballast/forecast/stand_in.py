"""A network of a known size but unknown shape: the Llama that comes nearest.

Where the base is shown images: as LLaVA-1.5, with CLIP-L/14-336 and two layers between.
"""

from __future__ import annotations

import math
from typing import Any

from ballast.forecast.architecture import Network, network

# (width, inner width, layers, heads) of Llamas and their like.
SHAPES = ((256, 688, 6, 8), (512, 1376, 8, 8), (768, 2048, 12, 12), (1024, 2816, 24, 16),
          (2048, 5632, 22, 32), (3200, 8640, 26, 32), (4096, 11008, 32, 32), (5120, 13824, 40, 40),
          (8192, 22016, 48, 64), (8192, 28672, 80, 64))  # fmt: skip
TOWER = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
         "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
         "patch_size": 14}  # fmt: skip
# Room for a picture and a text.
POSITIONS = 4096


def stand_in_config(parameters: float, images: bool = False) -> dict[str, Any]:
    """The configuration of the Llama of `SHAPES` whose parameter count is the nearest by ratio.

    images: whether it has a vision tower.
    """
    found = [
        {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        for width, inner, layers, heads in SHAPES
    ]
    text = min(found, key=lambda made: abs(math.log(network(made).parameters / parameters)))
    if not images:
        return text
    text |= {"max_position_embeddings": POSITIONS}
    return {"model_type": "llava", "text_config": text, "vision_config": TOWER}


def stand_in(parameters: float, images: bool = False) -> Network:
    """The network of `stand_in_config`."""
    return network(stand_in_config(parameters, images))
