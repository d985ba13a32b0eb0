"""A network of a known size but unknown shape: the Llama that comes nearest."""

from __future__ import annotations

import math

from ballast.forecast.architecture import Network, network

# (width, inner width, layers, heads) of Llamas and their like.
SHAPES = ((256, 688, 6, 8), (512, 1376, 8, 8), (768, 2048, 12, 12), (1024, 2816, 24, 16),
          (2048, 5632, 22, 32), (3200, 8640, 26, 32), (4096, 11008, 32, 32), (5120, 13824, 40, 40),
          (8192, 22016, 48, 64), (8192, 28672, 80, 64))  # fmt: skip


def stand_in(parameters: float) -> Network:
    """The Llama of `SHAPES` whose parameter count is the nearest by ratio."""
    found = [
        network(
            {
                "model_type": "llama",
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
            }
        )
        for width, inner, layers, heads in SHAPES
    ]
    return min(found, key=lambda made: abs(math.log(made.parameters / parameters)))
