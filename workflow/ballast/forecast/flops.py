"""Floating-point operations of training and scoring, from a network's shapes.

A multiplication and an addition count as two operations. Only matrix products are counted: they are
nearly all, and what torch.utils.flop_counter counts.
"""

from __future__ import annotations

from ballast.forecast.architecture import Network


def forward_flops(network: Network, tokens: float, length: float, head: bool = True) -> float:
    """Of one pass over `tokens` tokens in sequences of `length`; images enter as features."""
    each = 2 * network.stack.matrices
    if head:
        each += 2 * network.embeddings
        if network.kind == "masked":
            each += 2 * network.stack.width**2
    shown = min(1.0, network.image_tokens / length) if network.connector else 0.0
    seen = shown * 2 * sum(m * n for m, n in (network.connector or {}).values())
    return tokens * (each + seen) + attention_flops(network, tokens, length)


def attention_flops(network: Network, tokens: float, length: float) -> float:
    """Of attention's own products in one pass: queries with keys, and scores with values."""
    linear = network.stack.linear
    width = (linear.get("q_proj") or linear["query"])[0]
    return 4 * tokens * length * width * network.stack.layers


def training_flops(
    network: Network,
    tokens: float,
    length: float,
    trainable: float,
    selective: bool,
    checkpointing: bool = False,
) -> float:
    """Of training on `tokens` tokens: the pass, the gradients of activations and of what trains.

    selective: what trains are the base's own weights, which the pass has counted; else they are
    adapters beside them. Checkpointing runs every layer's pass twice.
    """
    once = forward_flops(network, tokens, length)
    own = 2 * trainable * tokens if selective else 6 * trainable * tokens
    # Adapters are all that trains: what the first layer's queries and keys read needs no gradient.
    first = sum(m * n for name, (m, n) in network.stack.linear.items() if name in _FIRST)
    spared = 0 if selective else 2 * first * tokens
    # Scores and values are each made of two activations, and both get a gradient.
    own += attention_flops(network, tokens, length)
    again = forward_flops(network, tokens, length, head=False) if checkpointing else 0.0
    return 2 * once + own - spared + again


_FIRST = ("q_proj", "k_proj", "v_proj", "query", "key", "value")


def tower_flops(network: Network, images: float) -> float:
    """Of looking at images once: what a frozen tower's stored features cost."""
    if network.tower is None:
        return 0.0
    patches = network.image_tokens + 1
    width = network.tower.width
    each = 2 * network.tower.matrices + 4 * patches * width * network.tower.layers
    return images * patches * each
