#!/usr/bin/env python3
"""Selections of others beside block-share, in PyTorch: which answers of dense attention does each keep, with how many pairs?

    tests/bench/selection_peers.py --model DIR --prompts DIR [--selection SPEC ...] [--device cuda]

--model is needle-20m, or another Llama without anything special; --prompts is what needle.py writes with --layout spread, of which the
first prompt is used. Each selection is made layer by layer from the queries and keys that it led to itself, and attention goes over exactly the pairs
that it holds, so these are figures of selections and not of kernels. Prints questions answered of those that dense answers, KL(dense ||
selection) at the answers, and density: pairs over causal pairs. float32 on a CPU, bfloat16 on a GPU.

SPEC, each as published, from its definition:
  vertical-slash:V,S           MInference (arXiv 2407.02490): the last 64 queries choose V columns and S distances; of a distance
                               every 64-row block gets the 64 keys that any of its rows has there, as tiles do
  vertical-slash:V,S,CHUNK     the same from the last 64 queries of each CHUNK of rows, for that chunk
  flash-prefill:ALPHA          FlashPrefill (arXiv 2603.06199): 128 x 128 blocks by the summed weight of mean keys, against the largest
  xattention:STRIDE,THRESHOLD  XAttention (arXiv 2503.16428): 128 x 128 blocks by antidiagonal sums, up to a share of the weight
  flex-prefill:GAMMA           FlexPrefill (arXiv 2502.20766): for each head block-sparse or vertical-slash, up to a share of the weight
  block-share:R,TAU[,S[,C]][,fp8]
                               ours (kernels/sparse/head_pattern.h)
"""

import argparse
import array
import json
import math
import pathlib
import time

import safetensors.torch
import torch
import torch.nn.functional as F

BLOCK = 64
ROWS = 1024  # that are attended to at once


def expand(kept, block, first, end):
    """Rows [first, end) of a mask of blocks, for the keys before `end`."""
    rows = torch.arange(first, end, device=kept.device) // block
    return kept[rows][:, torch.arange(end, device=kept.device) // block]


class Blocks:
    def __init__(self, kept, block):
        self.kept, self.block = kept, block

    def mask(self, first, end):
        return expand(self.kept, self.block, first, end)


class Lines:
    """(columns, distances), bool [tokens] each, for every chunk of rows."""

    def __init__(self, chunks, chunk):
        self.chunks, self.chunk = chunks, chunk

    def mask(self, first, end):
        parts = []
        for row in range(first, end, BLOCK):
            columns, distances = self.chunks[row // self.chunk]
            # Key j lies at distances row - j .. row + 63 - j of the block's rows.
            padded = F.pad(distances.float(), (BLOCK - 1, BLOCK - 1))
            any_row = F.max_pool1d(padded[None, None], BLOCK, 1)[0, 0] > 0  # at d + 63: of distances d .. d + 63
            keys = torch.arange(end, device=columns.device)
            at = (row - keys + BLOCK - 1).clamp(min=0)
            parts.append((any_row[at] & (keys < row + BLOCK) | columns[:end]).expand(min(BLOCK, end - row), -1))
        return torch.cat(parts)


def last_weights(q, k, scale, most):
    """What the last queries, at most so many, give each key and each distance, summed over them; and how many they are."""
    n = len(k)
    last = min(most, len(q))
    scores = (q[-last:] @ k.T).float() * scale
    later = torch.arange(n, device=k.device)[None] > torch.arange(n - last, n, device=k.device)[:, None]
    weight = scores.masked_fill(later, -math.inf).softmax(-1)
    slash = torch.zeros(n, device=k.device)
    for i in range(last):
        position = n - last + i
        slash[:position + 1] += weight[i, :position + 1].flip(0)
    return weight.sum(0), slash, last


def choose_lines(q, k, scale, v, s):
    """Of the last 64 of these queries over the keys up to the last one."""
    vertical, slash, _ = last_weights(q, k, scale, 64)
    vertical[:30] = math.inf
    slash[:100] = math.inf
    return vertical.topk(min(len(k), v)).indices, slash.topk(min(len(k), s)).indices


def vertical_slash(q, k, scale, v, s, chunk=None):
    n = len(k)
    chunk = int(chunk or n)
    chunks = []
    for end in range(chunk, n + chunk, chunk):
        end = min(end, n)
        columns, distances = torch.zeros(2, n, dtype=torch.bool, device=k.device)
        vertical, slash = choose_lines(q[:end], k[:end], scale, int(v), int(s))
        columns[vertical] = True
        distances[slash] = True
        chunks.append((columns, distances))
    return Lines(chunks, chunk)


def block_means(x, block):
    n = len(x)
    sums = F.pad(x.float(), (0, 0, 0, -n % block)).view(-1, block, x.shape[1]).sum(1)
    counts = torch.full((len(sums), 1), block, device=x.device)
    counts[-1] = (n - 1) % block + 1
    return sums / counts


def lower(blocks, device):
    return torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()


def flash_prefill(q, k, scale, alpha):
    block, n = 128, len(k)
    means = block_means(k, block).to(k.dtype)
    blocks = len(means)
    energy = torch.zeros(blocks, blocks, device=k.device)
    ends = torch.arange(1, blocks + 1, device=k.device) * block - 1
    for first in range(0, n, ROWS):
        rows = torch.arange(first, min(n, first + ROWS), device=k.device)
        scores = (q[rows] @ means.T).float() * scale
        scores.masked_fill_(ends > rows[:, None], -math.inf)
        of_block = F.pad(scores, (0, 0, 0, -len(rows) % block), value=-math.inf).view(-1, block, blocks)
        largest = of_block.amax((1, 2), keepdim=True).clamp(min=-1e30)  # rows that see no whole block have none
        energy[first // block:first // block + len(of_block)] = (of_block - largest).exp().sum(1)
    kept = energy >= alpha * energy.max(1, keepdim=True).values
    kept[:, :2] = True
    for near in range(4):
        kept.diagonal(-near)[:] = True
    kept[-2:] = True
    return Blocks(kept & lower(blocks, k.device), block)


def xattention(q, k, scale, stride, threshold):
    block, stride, n = 128, int(stride), len(k)
    pad = -n % block
    q, k = F.pad(q, (0, 0, 0, pad)), F.pad(k, (0, 0, 0, pad))
    groups = len(k) // stride
    sums = q.view(groups, stride, -1).flip(1).reshape(groups, -1) @ k.reshape(groups, -1).T
    scores = (sums.float() * (scale / stride)).masked_fill_(~lower(groups, k.device), -math.inf)
    per_block = block // stride
    blocks = groups // per_block
    mass = scores.softmax(-1).view(blocks, per_block, blocks, per_block).sum((1, 3))
    forced = torch.eye(blocks, dtype=torch.bool, device=k.device)
    forced[:, 0] = True
    order = mass.masked_fill(forced, math.inf).argsort(1, descending=True)
    sorted_mass = mass.gather(1, order)
    before = sorted_mass.cumsum(1) - sorted_mass  # forced ones first
    kept = torch.zeros_like(forced).scatter_(1, order, before < threshold * mass.sum(1, keepdim=True))
    return Blocks((kept | forced) & lower(blocks, k.device), block)


def flex_prefill(q, k, scale, gamma, tau=0.1):
    block, n = 128, len(k)
    blocks = -(-n // block)
    vertical, slash, last = last_weights(q, k, scale, block)
    vertical, slash = vertical / last, slash / last
    pooled = lambda x: F.pad(x, (0, -n % block)).view(-1, block).sum(1)
    means = block_means(k, block)
    a = pooled(vertical)
    b = ((q[-last:].float().mean(0) @ means.T) * scale).softmax(-1)
    m = (a + b) / 2
    divergence = lambda p: (p * (p / m).log()).nan_to_num(0).sum()
    by_query = (divergence(a) / 2 + divergence(b) / 2).clamp(min=0).sqrt() < tau
    count = lambda x: 1 if by_query else int((x.sort(descending=True).values.cumsum(0) <= gamma).sum() + 1) // block + 1
    kept = torch.zeros(blocks, blocks, dtype=torch.bool, device=k.device)
    kept[:, a.topk(min(blocks, count(vertical))).indices] = True
    for distance in pooled(slash).topk(min(blocks, count(slash))).indices.tolist():
        kept.diagonal(-distance)[:] = True
    if by_query:
        shares = (block_means(q, block) @ means.T * scale).masked_fill(~lower(blocks, k.device), -math.inf).softmax(-1)
        order = shares.flatten().argsort(descending=True)
        chosen = order[shares.flatten()[order].cumsum(0) <= gamma * blocks]
        kept.view(-1)[chosen] = True
    kept[:, 0] = True
    kept.diagonal()[:] = True
    return Blocks(kept & lower(blocks, k.device), block)


def representatives(k, outliers):
    """[blocks, 1 + outliers, dim]"""
    whole = k[:len(k) // BLOCK * BLOCK].view(-1, BLOCK, k.shape[1]).float()
    mean = whole.mean(1, keepdim=True)
    far = ((whole - mean)**2).sum(-1).topk(outliers).indices
    return torch.cat([mean, whole.gather(1, far[..., None].expand(-1, -1, k.shape[1]))], 1)


def coarse_representatives(of_blocks, samples, count):
    whole = of_blocks[:len(of_blocks) // 8 * 8]
    coarse, dim = len(whole) // 8, whole.shape[2]
    rows = whole.view(coarse, 8, -1, dim).transpose(1, 2).reshape(coarse, -1, dim)  # plane after plane
    if samples:
        chosen = list(whole[:, :samples].reshape(coarse, 8 * samples, dim)[:, 4::8].unbind(1))
    else:
        chosen = [whole[:, 0].reshape(coarse, 8, dim).mean(1)]
    distance = torch.stack([((rows - row[:, None])**2).sum(-1) for row in chosen]).amin(0)
    for _ in range(count):
        chosen.append(rows[torch.arange(len(rows), device=rows.device), distance.argmax(1)])
        distance = distance.minimum(((rows - chosen[-1][:, None])**2).sum(-1))
    return torch.stack(chosen, 1)


def scores_of(q, rows, scale, visible, samples, keys):
    """The largest product with the representatives of each block of so many keys, for those before visible[i] alone."""
    rows = rows.to(q.dtype)
    scores = torch.full((len(q), len(rows)), -math.inf, device=q.device)
    for r in range(rows.shape[1]):
        scores = scores.maximum((q @ rows[:, r].T).float() * scale + (math.log(keys / samples) if r < samples else 0))
    return scores.masked_fill_(torch.arange(len(rows), device=q.device) >= visible[:, None], -math.inf)


def to_e4m3(x, dims):
    """Rounded to E4M3, as float: elements along dims share the power of two that brings the largest into [128, 256)."""
    x = x.float()
    exponent = (8 - torch.frexp(x.abs().amax(dims, keepdim=True)).exponent).clamp(max=47)
    scaled = torch.ldexp(x, exponent)
    spacing = (torch.frexp(scaled).exponent - 1).clamp(min=-6) - 3
    return torch.ldexp(torch.ldexp(torch.ldexp(scaled, -spacing).round(), spacing), -exponent)


def block_share(q, k, scale, outliers, tau, samples=0, coarse=0, fp8=False):
    n = len(k)
    blocks = -(-n // BLOCK)
    outliers, samples = int(outliers), int(samples)
    fine = representatives(k, outliers)
    if samples:
        whole = k[:n // BLOCK * BLOCK].view(-1, BLOCK, k.shape[1])
        fine = torch.cat([whole[:, BLOCK // samples // 2::BLOCK // samples].to(fine.dtype), fine[:, 1:]], 1)
    coarse = int(coarse) if n >= 8 * BLOCK else 0
    above = coarse_representatives(fine, samples, coarse) if coarse else None
    if fp8:
        fine = to_e4m3(fine.to(k.dtype), (1, 2))
        above = to_e4m3(above.to(k.dtype), (1, 2)) if coarse else None
        q, k = (torch.cat([to_e4m3(part, (0, 1)) for part in x.split(BLOCK)]) for x in (q, k))
    kept = torch.zeros(blocks, blocks, dtype=torch.bool, device=k.device)
    for first in range(0, n, ROWS):
        end = min(n, first + ROWS)
        row_block = torch.arange(first, end, device=k.device) // BLOCK
        any_row = lambda x: torch.stack([part.any(0) for part in x.split(BLOCK)])
        least = torch.full((end - first, 1), -math.inf, device=k.device)
        scores = scores_of(q[first:end], fine[:end // BLOCK], scale, row_block, samples, BLOCK)
        if samples:
            own = (q[first:end] @ k[first:end].T).float() * scale
            place = torch.arange(end - first, device=k.device)
            hidden = (place[None] > place[:, None]) | (place[None] // BLOCK != place[:, None] // BLOCK)
            others = own.masked_fill(hidden, -math.inf).logsumexp(1, keepdim=True)
        else:
            others = torch.full_like(least, -math.inf)
        if coarse:
            coarse_scores = scores_of(q[first:end], above[:end // BLOCK // 8], scale, row_block // 8, samples, 8 * BLOCK)
            least = coarse_scores.logsumexp(1, keepdim=True).logaddexp(others)
            opened = any_row(coarse_scores - least >= math.log(tau / 2)).repeat_interleave(8, 1)
            opened = F.pad(opened, (0, scores.shape[1] - opened.shape[1]), value=True)
            behind = torch.arange(scores.shape[1], device=k.device) // 8 >= row_block[::BLOCK, None] // 8
            scores.masked_fill_(~(opened | behind)[row_block - row_block[0]], -math.inf)
        total = scores.logsumexp(1, keepdim=True).logaddexp(others).maximum(least)
        chosen = any_row(scores - total >= math.log(tau))
        kept[first // BLOCK:first // BLOCK + len(chosen), :chosen.shape[1]] = chosen
    kept[:, 0] = True
    for near in range(min(4, blocks)):
        kept.diagonal(-near)[:] = True
    return Blocks(kept & lower(blocks, k.device), BLOCK)


SELECTIONS = {"vertical-slash": vertical_slash, "flash-prefill": flash_prefill, "xattention": xattention,
              "flex-prefill": flex_prefill, "block-share": block_share}


class Model:
    """A Llama, of one prompt."""

    def __init__(self, directory, device):
        config = json.loads((directory / "config.json").read_text())
        self.num_layers, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.heads, self.kv_heads, self.dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        self.theta = config["rope_theta"]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.weights = {}
        for path in sorted(directory.glob("*.safetensors")):
            self.weights |= {name: weight.to(device, dtype) for name, weight in safetensors.torch.load_file(path).items()}
        self.device = device
        self.pairs = self.causal = 0
        self.selecting = 0.0  # seconds

    def clock(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def norm(self, x, name):
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weights[name] * scaled.to(x.dtype)

    def rotate(self, x):
        half = self.dim // 2
        frequencies = self.theta ** (-torch.arange(half, device=x.device).double() / half)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(self, q, k, v, selection):
        scale, n = self.dim ** -0.5, q.shape[1]
        out = torch.empty_like(q)
        for head in range(self.heads):
            keys, values = k[head * self.kv_heads // self.heads], v[head * self.kv_heads // self.heads]
            start = self.clock()
            of_head = None if selection is None else SELECTIONS[selection[0]](q[head], keys, scale, *selection[1])
            self.selecting += self.clock() - start
            for first in range(0, n, ROWS):
                end = min(n, first + ROWS)
                mask = torch.arange(end, device=q.device) <= torch.arange(first, end, device=q.device)[:, None]
                if of_head is not None:
                    mask &= of_head.mask(first, end)
                self.pairs += int(mask.sum())
                scores = (q[head, first:end] @ keys[:end].T).float() * scale
                out[head, first:end] = scores.masked_fill_(~mask, -math.inf).softmax(-1).to(values.dtype) @ values[:end]
            self.causal += n * (n + 1) // 2
        return out

    def __call__(self, ids, positions, selection=None):
        """Log probabilities [positions, vocabulary]."""
        w = self.weights
        self.pairs = self.causal = self.selecting = 0
        x = w["model.embed_tokens.weight"][ids]
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm.weight")
            q, k, v = ((h @ w[name + f"self_attn.{p}_proj.weight"].T).view(len(ids), -1, self.dim).transpose(0, 1) for p in "qkv")
            out = self.attend(self.rotate(q), self.rotate(k), v.contiguous(), selection)
            x = x + out.transpose(0, 1).reshape(len(ids), -1) @ w[name + "self_attn.o_proj.weight"].T
            h = self.norm(x, name + "post_attention_layernorm.weight")
            x = x + (F.silu(h @ w[name + "mlp.gate_proj.weight"].T) * (h @ w[name + "mlp.up_proj.weight"].T)) @ w[name + "mlp.down_proj.weight"].T
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return (self.norm(x[positions], "model.norm.weight") @ head.T).float().log_softmax(-1)


def parse(text):
    name, _, numbers = text.partition(":")
    if name not in SELECTIONS:
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(SELECTIONS)}")
    fp8 = name == "block-share" and numbers.endswith(",fp8")
    numbers = [float(x) if "." in x else int(x) for x in numbers.removesuffix(",fp8" if fp8 else "").split(",") if x]
    return text, (name, numbers + [0] * (4 - len(numbers)) + [True] if fp8 else numbers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--prompts", required=True, type=pathlib.Path)
    parser.add_argument("--selection", action="append", type=parse, default=[])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    model = Model(arguments.model, arguments.device)
    prompt = json.loads((arguments.prompts / "answers.json").read_text())[0]
    ids = array.array("i")
    ids.frombytes((arguments.prompts / prompt["file"]).read_bytes())
    ids = torch.tensor(ids, device=arguments.device).long()
    positions = [question["position"] + i for question in prompt["questions"] for i in (0, 1)]
    answers = torch.tensor([question["answer"] for question in prompt["questions"]], device=arguments.device)
    passes = lambda logits: (logits.argmax(-1).view(-1, 2) == answers).all(1)

    dense = model(ids, positions)
    passed = passes(dense)
    print(f"{len(ids):,} tokens: dense answers {int(passed.sum())} of {len(passed)}")
    print("| selection | kept | KL | density | selecting, s | all, s |\n|---|---|---|---|---|---|", flush=True)
    for text, selection in arguments.selection:
        start = time.monotonic()
        logits = model(ids, positions, selection)
        kept = int((passes(logits) & passed).sum())
        divergence = float((dense.exp() * (dense - logits)).sum(-1).mean())
        print(f"| `{text}` | {kept} of {int(passed.sum())} | {divergence:.5f} | {model.pairs / model.causal:.4f} |",
              f"{model.selecting:.2f} | {time.monotonic() - start:.0f} |", flush=True)


if __name__ == "__main__":
    main()
