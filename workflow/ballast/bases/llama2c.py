"""llama2.c's checkpoints (`.bin`, version 0) and tokenizers as a transformers folder.

A checkpoint is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a
negative vocab_size says that the head has weights of its own) and fp32 weights. A tokenizer is an
int32 (longest token), then per token its score (fp32), its length (int32) and its bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ballast.errors import DataError

SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_BYTE = len(SPECIAL)  # the 256 bytes follow the special tokens
HEADER = struct.Struct("<7i")


def convert(model: Path, tokenizer: Path, folder: Path) -> None:
    """Write `folder`, which loads by the Auto classes, from a checkpoint and its tokenizer.

    Raises DataError if a file is not of llama2.c's format or the two do not fit each other.
    """
    network = _network(model)
    words = _words(tokenizer)
    if len(words) != network.config.vocab_size:
        raise DataError(
            f"{tokenizer.name} has {len(words)} tokens, {model.name} {network.config.vocab_size}"
        )
    network.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(words),
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _network(path: Path) -> LlamaForCausalLM:
    """The model of a checkpoint."""
    raw = path.read_bytes()
    if len(raw) < HEADER.size:
        raise DataError(f"{path}: too short for a checkpoint of llama2.c")
    dim, hidden, layers, heads, kv_heads, words, length = HEADER.unpack_from(raw)
    tied, words = words > 0, abs(words)
    sizes = (dim, hidden, layers, heads, kv_heads, words, length)
    if min(sizes) < 1 or dim % heads or heads % kv_heads:
        raise DataError(f"{path}: {sizes} are no sizes of a model; not a llama2.c checkpoint")
    narrow = dim // heads * kv_heads
    # In the file's order; of each tensor the shape per layer, or alone.
    parts = {
        "embed_tokens": (words, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, narrow, dim),
        "self_attn.v_proj": (layers, narrow, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
        "rotary tables": (length, dim // heads),  # cosines and sines; made again from the sizes
        "lm_head": (0,) if tied else (words, dim),
    }
    due = HEADER.size + 4 * sum(int(np.prod(shape)) for shape in parts.values())
    if len(raw) != due:
        raise DataError(f"{path}: {len(raw)} bytes; {due} are due; truncated, or another version")
    values = torch.from_numpy(np.frombuffer(raw, "<f4", offset=HEADER.size).astype(np.float32))
    found: dict[str, Tensor] = {}
    for name, shape in parts.items():
        count = int(np.prod(shape))
        found[name], values = values[:count].view(shape), values[count:]
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    network = LlamaForCausalLM(config).eval()
    network.load_state_dict(_state(found, layers, heads, kv_heads, tied))
    return network


def _state(
    found: dict[str, Tensor], layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, Tensor]:
    """The weights by transformers' names."""
    words = found["embed_tokens"]
    state = {"model.embed_tokens.weight": words, "model.norm.weight": found["norm"]}
    state["lm_head.weight"] = words if tied else found["lm_head"]
    turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}
    for name, stacked in found.items():
        if name.startswith(("self_attn.", "mlp.")) or name.endswith("_layernorm"):
            for layer in range(layers):
                weight = stacked[layer]
                if name in turned:
                    weight = _halves(weight, turned[name])
                state[f"model.layers.{layer}.{name}.weight"] = weight
    return state


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows [out, in] of a projection for rotary embeddings that turn halves, not neighbours.

    llama2.c turns rows (0, 1), (2, 3), ... of a head together; transformers turns row i and row
    i + half.
    """
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _words(path: Path) -> list[tuple[float, str]]:
    """Score and text of every token."""
    raw, place = path.read_bytes(), 4
    found: list[tuple[float, str]] = []
    while place < len(raw):
        try:
            score, length = struct.unpack_from("<fi", raw, place)
            (text,) = struct.unpack_from(f"<{length}s", raw, place + 8)
            found.append((score, text.decode("utf-8")))
        except (struct.error, UnicodeDecodeError):
            raise DataError(
                f"{path}: token {len(found)} is damaged, or this is no llama2.c tokenizer"
            ) from None
        place += 8 + length
    if len(found) < FIRST_BYTE + 256:
        raise DataError(f"{path}: {len(found)} tokens; the 256 bytes and three more are due")
    return found


def _tokenizer(words: list[tuple[float, str]]) -> Tokenizer:
    """Byte-pair encoding that merges the best-scored pair first, as llama2.c does.

    A space is put before the text; characters that are no token become their bytes.
    """
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [text for _, text in words[len(names) :]]
    known = {name: i for i, name in reversed(list(enumerate(names)))}  # the first of equals
    by_score = sorted(range(FIRST_BYTE + 256, len(names)), key=lambda i: (-words[i][0], i))
    merges = [
        (names[i][:cut], names[i][cut:])
        for i in by_score
        for cut in range(1, len(names[i]))
        if names[i][:cut] in known and names[i][cut:] in known
    ]
    made = Tokenizer(BPE(known, merges, unk_token=SPECIAL[0], byte_fallback=True, fuse_unk=True))
    made.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    made.normalizer = normalizers.Prepend(" ")
    made.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made
