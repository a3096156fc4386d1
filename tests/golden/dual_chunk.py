"""Dual chunk attention by definition, which transformers does not have: every pair of a query and a key is given its
relative position, and the query is rotated by that."""

import math
import types

import torch


def relative_positions(num_tokens, chunk_size, local_size):
    """[query, key] what the key of each query counts as its distance, where query >= key (arXiv 2402.17463; served
    checkpoints cap at chunk_size, not below)."""
    length = chunk_size - local_size
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
    apart = query // length - key // length
    succ = (query % length + length).clamp(max=chunk_size)
    last_succ = min(2 * length - 1, chunk_size)
    asked_at = torch.where(apart == 0, query % length, torch.where(apart == 1, succ, last_succ))
    return asked_at - key % length


def key_scale(num_tokens, original):
    """What queries and keys are multiplied with (arXiv 2501.15383); original: 0 for nothing."""
    return max(1.0, 0.1 * math.log(num_tokens / original) + 1.0) if original else 1.0


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q, k, v, inv_freq, dual_chunk):
    """q [heads, tokens, dim]; k, v [kv_heads, tokens, dim]; not rotated. Returns (output, keys as they are cached)."""
    num_tokens, dim = q.shape[1:]
    length = dual_chunk["chunk_size"] - dual_chunk["local_size"]
    scale = key_scale(num_tokens, dual_chunk.get("original_max_position_embeddings", 0))
    distances = relative_positions(num_tokens, dual_chunk["chunk_size"], dual_chunk["local_size"])
    angles = torch.arange(-length, 2 * dual_chunk["chunk_size"])[:, None].double() * inv_freq.double()  # by distance
    cos, sin = (table.to(q.dtype) for table in (angles.cos(), angles.sin()))
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    outputs = []
    for head in range(q.shape[0]):
        kv_head = head * k.shape[0] // q.shape[0]
        rows = []
        for i in range(num_tokens):
            at = distances[i] + length
            asked = rotate(q[head, i].expand(num_tokens, dim), cos[at], sin[at])
            scores = torch.einsum("kd,kd->k", asked, k[kv_head]) * scale**2 / math.sqrt(dim)
            weights = torch.softmax(scores.masked_fill(~causal[i], -torch.inf), -1, torch.promote_types(q.dtype, torch.float32))
            rows.append(weights.to(q.dtype) @ v[kv_head])
        outputs.append(torch.stack(rows))
    places = torch.arange(num_tokens) % length + length
    return torch.stack(outputs), rotate(k, cos[places], sin[places]) * scale


def install(model):
    """Gives every layer of a Qwen2 of transformers 4.45 or 5 this attention, for whole prompts; on the CPU."""
    dual_chunk = model.config.dual_chunk_attention_config

    def forward(layer, hidden_states, past_key_value=None, past_key_values=None, **_):
        heads = [
            projection(hidden_states)[0].unflatten(-1, (-1, layer.head_dim)).transpose(0, 1)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        ]
        output, cached = attention(*heads, model.model.rotary_emb.inv_freq, dual_chunk)
        output = layer.o_proj(output.transpose(0, 1).flatten(1))[None]
        cache = past_key_values if past_key_value is None else past_key_value  # the names of 5 and of 4.45
        cache.update(cached[None], heads[2][None], layer.layer_idx)
        return (output, None) if past_key_value is None else (output, None, past_key_value)

    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)
