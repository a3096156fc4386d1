"""`longfill bench prefill`: a million tokens of Llama-3-8B's shapes with published patterns and recorded selections."""

import json
import statistics

PATTERNS = "Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json"
GIB = 1 << 30
SMALL_GEOMETRY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 1000, "max_position_embeddings": 1048576, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16", "initializer_range": 0.02,
}
MAX_INDEX_SECONDS = 0.005  # a layer, at 1,048,576 tokens, 32 query and 8 KV heads
MAX_DEVICE_BYTES = 56 * GIB
MAX_PLAN_ERROR = 0.03
MAX_SLOWDOWN = 0.01
REPEAT = {"sparse": 1, "dense": 2}  # short runs vary more


def run(pack, checks, arguments):
    for name, options in cases(pack, arguments.small).items():
        if arguments.bench is None or name in arguments.bench.split(","):
            repeat = arguments.bench_repeat or REPEAT[name]
            check_case(pack, checks, name, [*options, "--repeat", repeat], arguments.small)
    if arguments.bench is None:
        check_refusals(pack, checks)


def cases(pack, small):
    """Name -> arguments of `longfill bench prefill`."""
    if small:
        geometry = pack.work / "geometry.json"
        geometry.write_text(json.dumps(SMALL_GEOMETRY), encoding="utf-8")
        return {
            "sparse": ["--geometry", geometry, "--tokens", 4096, "--attention", "vertical-slash:100,200", "--compare-kv-copy"],
            "dense": ["--geometry", geometry, "--tokens", 1024, "--compare-kv-copy"],
        }
    sparse = ["--geometry", "llama3-8b", "--tokens", 1048576, "--patterns", pack.path("patterns", PATTERNS), "--indices",
              pack.path("data", "needle_indices_1048576.safetensors")]
    dense = ["--geometry", "llama3-8b", "--tokens", 131072]
    return {"sparse": [*sparse, "--compare-kv-copy"], "dense": [*dense, "--compare-kv-copy"]}


def check_case(pack, checks, name, options, small):
    arguments = ["bench", "prefill", "--device", pack.device, "--json", *options]
    report = json.loads(pack.run("longfill", *arguments).stdout)
    layers = None
    for number, figures in enumerate(report["runs"]):
        describe(checks, f"{name}, run {number}, kv {figures['kv']}", figures)
        layers = figures["index_seconds_per_layer"]
    copied = [f for f in report["runs"] if f["kv"] == "discard"]
    first = copied[0]
    checks.equal(f"{name}: KV checksums of all runs", len({tuple(f["kv_checksums"]) for f in copied}), 1,
                 f"{first['kv_bytes']} bytes, CRC-32C " + " ".join(f"{c:08x}" for c in first["kv_checksums"]))
    if pack.device == "cuda":
        held = max(f["held_device_bytes"] for f in report["runs"])
        outside = max(f["outside_device_bytes"] for f in report["runs"])
        checks.at_most(f"{name}: peak device memory, GiB", (held + outside) / GIB, MAX_DEVICE_BYTES / GIB,
                       f"held of the device; {outside / GIB:.2f} of it context and libraries")
        for account in ("peak", "held"):  # what was allocated, and what the pool had of the device for it
            error = max(abs(f[f"{account}_device_bytes"] / f["planned_device_bytes"] - 1) for f in report["runs"])
            checks.at_most(f"{name}: {account} against the plan, relative", error, MAX_PLAN_ERROR)
    if small:
        checks.at_least(f"{name}: index, s a layer", layers, 0.0)
        return
    for part in ("attention", "gemm"):
        checks.at_most(f"{name}: {part}, slowed by the KV copy", report["kv_copy"][f"{part}_slowdown"], MAX_SLOWDOWN)
    if name == "sparse":
        checks.at_most(f"{name}: index, s a layer, median of the runs",
                       statistics.median(f["index_seconds_per_layer"] for f in report["runs"]), MAX_INDEX_SECONDS)


def check_refusals(pack, checks):
    """What cannot run is refused before any work, by name and number."""
    odd = pack.work / "head_dim_80.json"
    odd.write_text(json.dumps(SMALL_GEOMETRY | {"head_dim": 80}), encoding="utf-8")
    cases = {"llama3-70b, 1,048,576 tokens": (["--geometry", "llama3-70b", "--tokens", 1048576], "memory")}
    if pack.device == "cuda":  # the CPU takes any head dim, and so much memory would be filled for nothing there
        cases["head dim 80"] = (["--geometry", odd, "--tokens", 1024], "80")
        cases["llama3-8b, 1,048,576 tokens in 30 GB"] = (
            ["--geometry", "llama3-8b", "--tokens", 1048576, "--memory-limit", "30GB"], "tokens would fit")
    for name, (options, word) in cases.items():
        result = pack.run("longfill", "bench", "prefill", "--device", pack.device, *options, check=False)
        refused = result.returncode in (1, 2) and word in result.stderr
        checks.equal(f"{name}: refused, naming {word}", refused, True, result.stderr.strip()[-250:])


def describe(checks, name, figures):
    """The figures of one run, with the floors of index, attention, GEMM and other."""
    floor = figures["floor"]
    parts = ", ".join(f"{part} {figures[part + '_seconds']:.3f} ({floor[part + '_seconds']:.3f})"
                      for part in ("index", "attention", "gemm", "other"))
    checks.info(f"{name}: seconds", figures["seconds"],
                f"{parts}, exposed copy {figures['exposed_copy_seconds']:.3f}; floors in brackets")
    checks.info(f"{name}: tokens/s", figures["tokens_per_second"],
                f"density published {figures['published_density']:.5f}, covered {figures['covered_density']:.5f}, "
                f"computed {figures['computed_density']:.5f}")
