"""`longfill bench prefill` on one GPU and on all: seconds by part, efficiency, imbalance, and exposed communication, in which
compute stands still; waiting for slower peers counts. On all of them with weights replicated and sharded.
"""

import json

from section_bench import PATTERNS, SMALL_GEOMETRY

# Ranks -> least efficiency against one GPU, at 1,048,576 tokens.
MIN_EFFICIENCY = {2: 0.95, 4: 0.95, 8: 0.90}
MAX_IMBALANCE = 1.08
MAX_EXPOSED = 0.05  # of the whole time
MAX_SECONDS = {8: 6.0}
LONG = 1048576
PARTS = ("index", "attention", "gemm", "other", "communication", "exposed_communication", "exposed_copy")


def run(pack, checks, arguments):
    for num_tokens, options in cases(pack, arguments.small).items():
        one = bench(pack, num_tokens, options, None)
        describe(checks, num_tokens, 1, one)
        all_ranks = bench(pack, num_tokens, options, arguments.ranks)
        describe(checks, num_tokens, arguments.ranks, all_ranks)
        compare(pack, checks, num_tokens, arguments.ranks, one, all_ranks)
        sharded = bench(pack, num_tokens, [*options, "--weights", "sharded"], arguments.ranks)
        compare_weights(pack, checks, f"{num_tokens} tokens, {arguments.ranks} ranks", all_ranks, sharded)


def cases(pack, small):
    """Tokens -> further arguments of `longfill bench prefill`."""
    if small:
        geometry = pack.work / "geometry.json"
        geometry.write_text(json.dumps(SMALL_GEOMETRY), encoding="utf-8")
        return {4096: ["--geometry", geometry, "--attention", "vertical-slash:100,200"]}
    patterns = ["--geometry", "llama3-8b", "--patterns", pack.path("patterns", PATTERNS)]
    return {tokens: [*patterns, "--indices", pack.path("data", f"needle_indices_{tokens}.safetensors")]
            for tokens in (131072, LONG)}


def bench(pack, num_tokens, options, ranks):
    arguments = ["bench", "prefill", "--device", pack.device, "--tokens", num_tokens, "--json", *options]
    return json.loads(pack.run("longfill", *arguments, ranks=ranks).stdout)["runs"][0]


def describe(checks, num_tokens, ranks, figures):
    parts = ", ".join(f"{part} {figures[part + '_seconds']:.3f}" for part in PARTS)
    checks.info(f"{num_tokens} tokens, {ranks} ranks: seconds", figures["seconds"],
                f"{parts}; density {figures['covered_density']:.5f}, {figures['communicator']}")


def compare(pack, checks, num_tokens, ranks, one, all_ranks):
    name = f"{num_tokens} tokens, {ranks} ranks"
    bounded = num_tokens == LONG
    efficiency = one["seconds"] / (ranks * all_ranks["seconds"])
    exposed = all_ranks["exposed_communication_seconds"] / all_ranks["seconds"]
    if pack.device == "cuda":
        checks.equal(f"{name}: exchange", all_ranks["communicator"], "nccl")
    checks.equal(f"{name}: covered pairs as on 1 rank", all_ranks["covered_pairs"], one["covered_pairs"])
    if not bounded:
        checks.info(f"{name}: efficiency", efficiency)
        checks.info(f"{name}: exposed communication, share", exposed)
        checks.info(f"{name}: imbalance of pairs", all_ranks["imbalance"])
        return
    checks.at_least(f"{name}: efficiency", efficiency, MIN_EFFICIENCY.get(ranks, 0.90))
    checks.at_most(f"{name}: exposed communication, share", exposed, MAX_EXPOSED)
    checks.at_most(f"{name}: imbalance of pairs", all_ranks["imbalance"], MAX_IMBALANCE)
    if ranks in MAX_SECONDS:
        checks.at_most(f"{name}: seconds", all_ranks["seconds"], MAX_SECONDS[ranks])


def compare_weights(pack, checks, name, replicated, sharded):
    """Sharded weights against replicated ones; a layer's gathering is meant to hide behind the layer before."""
    parts = ", ".join(f"{part} {sharded[part + '_seconds']:.3f}" for part in PARTS)
    checks.info(f"{name}, weights sharded: seconds", sharded["seconds"], parts)
    checks.info(f"{name}, weights sharded: time, share of replicated", sharded["seconds"] / replicated["seconds"])
    checks.equal(f"{name}, weights sharded: covered pairs", sharded["covered_pairs"], replicated["covered_pairs"])
    if pack.device == "cuda":  # the small geometry has two layers: nothing to win
        checks.at_most(f"{name}, weights sharded: device bytes, share of replicated",
                       sharded["peak_device_bytes"] / replicated["peak_device_bytes"], 1)
