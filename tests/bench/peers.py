#!/usr/bin/env python3
"""Times the attention of PyTorch on random Q, K and V: what the figures of `longfill bench attention` stand beside.

    peers.py --out PEERS.json                            # cuDNN, FlashAttention-2, FlexAttention
    peers.py --only cudnn,flash --repeat 20
    peers.py --device cpu --small                        # the logic of this script, without a GPU

Shapes are those of the reference: 8 query and KV heads, batch 1, causal. TFLOP/s count 4 D for each (query, key) pair of the
mask. R, the reference of all ratios, is cuDNN at head dim 128 and 131,072 tokens. Times are of device events, runs follow
each other without a pause; answers are checked against fp64 on sampled rows. FlashAttention-3 and flash-attn-4 are timed where
they can be imported. The table comes last.
"""

import argparse
import importlib
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

HEADS = 8
SAMPLED_ROWS = 64
MAX_ERROR = 2e-2  # relative, of a row: twice and more what bfloat16 gives
MIN_BLOCKS = 32
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
FLASH_PACKAGES = {"flash-attention-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}
LAYOUTS = [(128, 128), (128, 64), (64, 64)]  # query rows, key columns of a block


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PEER,...",
                        help=f"some of {', '.join(SDPA)}, flex, {', '.join(FLASH_PACKAGES)} (default: all but math)")
    parser.add_argument("--tokens", default="32768,131072", metavar="N,...", help="lengths of the dense peers")
    parser.add_argument("--head-dims", default="128,64", metavar="D,...", help="of the dense peers")
    parser.add_argument("--percent", default="10", metavar="P,...", help="of key blocks in FlexAttention's lists")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, help="the same as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes: a test of this script")
    return parser.parse_args()


class Problem:
    """Random Q, K and V of one length and head dim: [1, HEADS, tokens, head_dim]."""

    def __init__(self, tokens, head_dim, device):
        generator = torch.Generator(device=device).manual_seed(1)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.tokens, self.head_dim, self.device = tokens, head_dim, device
        self.q, self.k, self.v = (torch.randn(1, HEADS, tokens, head_dim, generator=generator, device=device, dtype=dtype)
                                  for _ in range(3))

    def sampled_rows(self):
        generator = torch.Generator().manual_seed(2)
        drawn = torch.randint(0, self.tokens, (SAMPLED_ROWS,), generator=generator).tolist()
        return sorted(row for row in {0, 1, 63, 64, 127, 128, self.tokens - 1, *drawn} if row < self.tokens)

    def largest_error(self, out, visible):
        """Of sampled rows, relative; visible(rows, head) is their mask [rows, tokens]."""
        rows = torch.tensor(self.sampled_rows(), device=self.device)
        worst = 0.0
        for head in (0, HEADS - 1):
            scores = self.q[0, head, rows].double() @ self.k[0, head].double().T / self.head_dim**0.5
            scores.masked_fill_(~visible(rows, head), float("-inf"))
            want = torch.softmax(scores, dim=-1) @ self.v[0, head].double()
            difference = (out[0, head, rows].double() - want).norm(dim=-1) / want.norm(dim=-1)
            worst = max(worst, float(difference.nan_to_num(nan=float("inf")).max()))
        return worst

    def causal(self, rows, _head):
        return torch.arange(self.tokens, device=self.device)[None] <= rows[:, None]


def seconds_of(call, repeat, device):
    """Of each of `repeat` runs after three that warm up."""
    for _ in range(3):
        call()
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(repeat):
            call()
            marks.append(time.perf_counter())
        return [b - a for a, b in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])]


def measure(name, case, problem, call, mask, pairs, repeat):
    """The record of one peer on one case; `pairs` are those of all heads."""
    seconds = seconds_of(call, repeat, problem.device)
    error = problem.largest_error(call(), mask)
    median = statistics.median(seconds)
    return {"peer": name, "case": case, "tokens": problem.tokens, "head_dim": problem.head_dim, "heads": HEADS,
            "seconds": {"median": median, "min": min(seconds), "max": max(seconds)}, "pairs": pairs,
            "tflops": 4e-12 * problem.head_dim * pairs / median, "error": error, "passed": error <= MAX_ERROR}


def causal_pairs(tokens):
    return tokens * (tokens + 1) // 2


def dense_call(name, problem):
    if name in SDPA:
        def call():
            with sdpa_kernel(SDPA[name]):
                return functional.scaled_dot_product_attention(problem.q, problem.k, problem.v, is_causal=True)
        return call
    function = importlib.import_module(FLASH_PACKAGES[name]).flash_attn_func
    q, k, v = (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))

    def call_flash():
        result = function(q, k, v, causal=True)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)
    return call_flash


def run_dense(name, tokens, head_dim, arguments):
    problem = Problem(tokens, head_dim, arguments.device)
    call = dense_call(name, problem)
    return measure(name, "dense", problem, call, problem.causal, HEADS * causal_pairs(tokens), arguments.repeat)


def random_lists(tokens, layout, percent, device):
    """touched [HEADS, query blocks, key blocks]: at random `percent` of the key blocks up to the row's own, but no fewer than
    MIN_BLOCKS where there are so many."""
    rows, columns = layout
    generator = torch.Generator(device=device).manual_seed(3)
    query_blocks, key_blocks = -(-tokens // rows), -(-tokens // columns)
    last_rows = torch.clamp((torch.arange(query_blocks, device=device) + 1) * rows - 1, max=tokens - 1)
    visible = last_rows // columns + 1
    wanted = torch.maximum((visible * percent / 100).round().long(), torch.full_like(visible, MIN_BLOCKS))
    draws = torch.rand(HEADS, query_blocks, key_blocks, generator=generator, device=device)
    draws.masked_fill_(torch.arange(key_blocks, device=device)[None, None] >= visible[None, :, None], 2.0)
    rank = draws.argsort(dim=-1).argsort(dim=-1)
    return (rank < wanted[None, :, None]) & (draws < 2.0)


def flex_lists(touched):
    """Counts [1, HEADS, query blocks] and indices [1, HEADS, query blocks, key blocks] of a boolean mask of blocks."""
    counts = touched.sum(-1, dtype=torch.int32)[None]
    order = torch.argsort(touched.int(), dim=-1, descending=True, stable=True).int()[None]
    return counts, order.contiguous()


def causal_rule(_batch, _head, query, key):
    return query >= key


def run_flex(layout, percent, tokens, arguments):
    problem = Problem(tokens, 128, arguments.device)
    rows, columns = layout
    touched = random_lists(tokens, layout, percent, arguments.device)
    first_row = torch.arange(touched.shape[1], device=arguments.device)[:, None] * rows
    key_end = torch.clamp((torch.arange(touched.shape[2], device=arguments.device)[None] + 1) * columns, max=tokens)
    whole = key_end - 1 <= first_row  # every row of the block sees every key
    partial_counts, partial_indices = flex_lists(touched & ~whole)
    full_counts, full_indices = flex_lists(touched & whole)
    mask = BlockMask.from_kv_blocks(partial_counts, partial_indices, full_counts, full_indices, BLOCK_SIZE=layout,
                                    mask_mod=causal_rule, seq_lengths=(tokens, tokens))
    function = torch.compile(flex_attention, dynamic=False) if arguments.device == "cuda" else flex_attention
    # The default tiles are as large as 128 x 128: they must divide the blocks.
    tiles = {name: size for name, size in zip(("BLOCK_M", "BLOCK_N"), layout) if size < 128} or None

    def visible(sampled, head):
        blocks = touched[head, sampled // rows].repeat_interleave(columns, dim=-1)[:, :tokens]
        return blocks & problem.causal(sampled, head)

    whole_pairs = int((touched & whole).sum()) * rows * columns
    pairs = whole_pairs + diagonal_pairs(touched & ~whole, rows, columns, tokens)

    def call():
        return function(problem.q, problem.k, problem.v, block_mask=mask, kernel_options=tiles)
    return measure("flex", f"random-blocks:{percent:g},{rows}x{columns}", problem, call, visible, pairs, arguments.repeat)


def diagonal_pairs(touched, rows, columns, tokens):
    """Causal pairs of the touched blocks that the diagonal crosses."""
    total = 0
    for _, query_block, key_block in touched.nonzero().tolist():
        row_end, begin = min((query_block + 1) * rows, tokens), key_block * columns
        for row in range(max(query_block * rows, begin), row_end):
            total += min(row - begin + 1, columns, tokens - begin)
    return total


def tasks(arguments):
    """(peer, function, arguments...) in the order of the table."""
    names = arguments.only.split(",") if arguments.only else [n for n in (*SDPA, "flex", *FLASH_PACKAGES) if n != "math"]
    unknown = sorted(set(names) - {*SDPA, *FLASH_PACKAGES, "flex"})
    if unknown:
        sys.exit(f"peers.py: no such peer: {', '.join(unknown)}")
    lengths = [512, 1024] if arguments.small else [int(n) for n in arguments.tokens.split(",")]
    for name in names:
        if name == "flex":
            for percent in arguments.percent.split(","):
                for layout in LAYOUTS:
                    yield name, run_flex, (layout, float(percent), lengths[-1])
            continue
        for head_dim in arguments.head_dims.split(","):
            for tokens in lengths:
                yield name, run_dense, (name, tokens, int(head_dim))


def main():
    arguments = parse_arguments()
    versions = {"torch": torch.__version__}
    versions["device"] = "CPU"
    if arguments.device == "cuda":
        versions |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    records, missing = [], []
    for name, function, options in tasks(arguments):
        try:
            record = function(*options, arguments)
        except Exception as error:  # pylint: disable=broad-except  # no such kernel here, or none for this shape
            why = " ".join(f"{type(error).__name__}: {error}".split())
            missing.append({"peer": name, "options": repr(options), "why": why[:300]})
            continue
        records.append(record)
        print(f"{record['peer']} {record['case']} {record['tokens']}: {record['tflops']:.1f} TFLOP/s", flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    reference = [r for r in records if r["peer"] in ("cudnn", "math") and r["head_dim"] == 128]
    report = {**versions, "reference_tflops": reference[-1]["tflops"] if reference else None, "peers": records,
              "missing": missing}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(report)
    return 0 if records and all(r["passed"] for r in records) else 1


def print_table(report):
    print(f"\n{report['device']}, torch {report['torch']}")
    print(f"{'peer':18s} {'case':24s} {'tokens':>7s} {'D':>4s} {'ms':>10s} {'spread':>7s} {'TFLOP/s':>8s} {'error':>8s}")
    for r in report["peers"]:
        spread = (r["seconds"]["max"] - r["seconds"]["min"]) / r["seconds"]["median"]
        print(f"{r['peer']:18s} {r['case']:24s} {r['tokens']:7d} {r['head_dim']:4d} {1e3 * r['seconds']['median']:10.3f} "
              f"{100 * spread:6.1f}% {r['tflops']:8.1f} {r['error']:8.1e}{'' if r['passed'] else ' WRONG'}")
    for m in report["missing"]:
        print(f"{m['peer']:18s} not measured: {m['options']}: {m['why'][:120]}")
    if report["reference_tflops"]:
        print(f"R = {report['reference_tflops']:.1f} TFLOP/s")


if __name__ == "__main__":
    sys.exit(main())
