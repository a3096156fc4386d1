#!/usr/bin/env python3
"""What Hugging Face transformers computes for a prompt, dense and in float32: the oracle for whole models.

    .venv/bin/python tests/golden/run_transformers.py --model DIR --tokens FILE.i32 --out golden.safetensors

The file holds `layer.N.key` and `layer.N.value` (post-RoPE, F32 [kv_heads, tokens, head_dim]), `positions` (I64 [P]),
`logits` (F32 [P, vocab]), and what the rotary embedding was built from: `rope.inv_freq` (F32 [rotary_dim / 2]) and
`rope.attention_factor` (F32 [1], a factor on cos and sin), where the model has one for all layers. Weights are used
as stored, widened to float32.
"""

import argparse
import pathlib

import numpy
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache


def read_tokens(path):
    """Token ids of a file of little-endian int32."""
    return numpy.fromfile(path, dtype="<i4").astype(numpy.int64)


def load_model(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype, attn_implementation="eager")
    return model.eval()


def cache_layers(cache):
    """(key, value) of each layer, as transformers 5 and 4 keep them."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def prefill(model, tokens, positions):
    """Runs `tokens` through `model` once; returns the golden tensors by name. positions: where logits are wanted."""
    cache = DynamicCache()
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(tokens)[None], past_key_values=cache, use_cache=True)[0][0]
        logits = model.lm_head(hidden[positions])
    golden = {
        "positions": torch.tensor(positions, dtype=torch.int64),
        "logits": logits,
    }
    if hasattr(model.model, "rotary_emb"):  # version 4 keeps that of some families inside their layers
        golden["rope.inv_freq"] = model.model.rotary_emb.inv_freq
        golden["rope.attention_factor"] = torch.tensor([float(model.model.rotary_emb.attention_scaling)])
    for layer, (key, value) in enumerate(cache_layers(cache)):
        golden[f"layer.{layer}.key"] = key[0]
        golden[f"layer.{layer}.value"] = value[0]
    return {name: tensor.contiguous() for name, tensor in golden.items()}


def main():
    parser = argparse.ArgumentParser(description="Write what transformers computes for a prompt, dense in float32.")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=pathlib.Path, required=True, help="little-endian int32 ids")
    parser.add_argument("--positions", help="comma-separated; default: the last")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    tokens = read_tokens(arguments.tokens)
    positions = [int(p) for p in arguments.positions.split(",")] if arguments.positions else [len(tokens) - 1]
    save_file(prefill(load_model(arguments.model), tokens, positions), str(arguments.out))


if __name__ == "__main__":
    main()
