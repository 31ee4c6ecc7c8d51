"""Models of a real model's shape with random weights, for the benchmarks: no ratio depends on the weights."""

from __future__ import annotations

import sys
from pathlib import Path

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (128, 344, 4, 4, 2, 1536),
    "0.1b": (576, 1536, 30, 9, 3, 49_152),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
}


def make(shape: str, directory: Path, vocabulary: int | None = None, device: str = "cpu") -> None:
    """A Llama of that shape as an ordinary directory, in 16 bits but for the tiny one.

    Args:
        vocabulary: another size of it.
        device: that draws the weights; a CPU takes minutes for 8 billion.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, key_value_heads, own_vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary or own_vocabulary,
        tie_word_embeddings=shape != "8b",
        max_position_embeddings=8192,
    )
    print(f"making a base of shape {shape} with random weights", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if shape != "tiny" else torch.float32)
    with torch.device(device):
        LlamaForCausalLM(config).save_pretrained(str(directory))
    torch.set_default_dtype(torch.float32)
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that load it
