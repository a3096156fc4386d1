"""Logits and every layer's K and V of dense prefills against transformers: at most twice the error of its own bfloat16 run.

The reference is transformers in float32: the golden files for the tiny random checkpoints, a run on the same device for real
ones. Errors are norms of differences, and largest differences, each relative to the reference.
"""

import json

import numpy
import oracle
import tokenizers
import torch
from checks import error_ratio

REAL_MODELS = ("needle-20m", "SmolLM2-135M-Instruct")
GPU_HEAD_DIMS = (64, 96, 128, 256)  # that attention on a GPU has kernels for
NUM_TOKENS = 4096
NUM_POSITIONS = 64


def run(pack, checks, arguments):
    pack.use_python_packages()
    wanted = None if arguments.goldens is None else arguments.goldens.split(",")
    directories = [directory for directory in sorted(pack.path("golden").iterdir())
                   if directory.is_dir() and (wanted is None or directory.name in wanted)]
    supported = [directory for directory in directories if pack.device == "cpu" or head_dim(directory) in GPU_HEAD_DIMS]
    for directory in directories:
        if directory not in supported:
            check_refused(pack, checks, directory)
    drifts = [(check_tiny(pack, checks, directory), directory.name) for directory in supported]
    if drifts:
        worst, name = max(drifts)
        # That this transformers and the one that made the golden files agree, or the bounds would mean nothing.
        checks.at_most(f"{len(drifts)} golden files: float32 here against them, max", worst, 1e-4, name)
    for name in REAL_MODELS:
        if wanted is not None and name not in wanted:
            continue
        directory = pack.model(name)
        if directory is not None:
            check_real(pack, checks, directory, 512 if arguments.small else NUM_TOKENS)
        else:
            checks.not_run(name, "the model is not in this pack")


def read_config(directory):
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def head_dim(directory):
    config = read_config(directory)
    return config.get("head_dim") or config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"]


def has_window(directory, num_tokens):
    """Some layers see no more than a window, so that less than all pairs is dense."""
    config = read_config(directory)
    used = config.get("use_sliding_window", config["model_type"] != "qwen2")
    return used and (config.get("sliding_window") or num_tokens) < num_tokens


def check_refused(pack, checks, directory):
    """A head dim without kernels is bad input, and the error names it."""
    result = pack.run("longfill", "prefill", "--model", directory, "--tokens", directory / "tokens.i32", "--kv", "discard",
                      "--device", pack.device, check=False)
    named = f"head_dim {head_dim(directory)}" in result.stderr
    checks.equal(f"{directory.name}: head dim {head_dim(directory)} is refused by name", (result.returncode, named), (2, True))


def check_tiny(pack, checks, directory):
    from longfill import safetensors_io  # from the pack

    golden = {name: array for name, (_, array) in safetensors_io.read(directory / "golden.safetensors").items()}
    ids = numpy.fromfile(directory / "tokens.i32", dtype="<i4")
    positions = golden["positions"].tolist()
    low, own = (oracle.prefill(oracle.load_golden_model(directory, golden, dtype, pack.device), ids, positions)[0]
                for dtype in (torch.bfloat16, torch.float32))
    got, figures = prefill(pack, "out", directory, ids, positions)
    worst = max(worst_ratio(got, golden, low, oracle.norm_error), worst_ratio(got, golden, low, oracle.max_error))
    checks.at_most(f"{directory.name}: norm and max, times bfloat16's", worst[0], 2.0, worst[1])
    if (figures["density"] != 1.0) != has_window(directory, len(ids)):
        checks.fails(f"{directory.name}: density of dense", f"{figures['density']}, of {len(ids)} tokens")
    return max(oracle.max_error(own[name], golden[name]) for name in own)


def check_real(pack, checks, directory, num_tokens):
    name = directory.name
    ids = token_ids(pack, directory, num_tokens)
    positions = numpy.linspace(0, num_tokens - 1, NUM_POSITIONS).astype(int).tolist()
    want, _ = oracle.prefill(oracle.load_model(directory, torch.float32, pack.device), ids, positions)
    low, _ = oracle.prefill(oracle.load_model(directory, torch.bfloat16, pack.device), ids, positions)
    oracle.free()
    got, figures = prefill(pack, "out", directory, ids, positions)
    checks.equal(f"{name}: density of dense", figures["density"], 1.0)
    for what, measure in (("norm", oracle.norm_error), ("max", oracle.max_error)):
        checks.at_most(f"{name}: logits, {what}", measure(got["logits"], want["logits"]),
                       2 * measure(low["logits"], want["logits"]))
        worst = worst_ratio(got, want, low, measure)
        checks.at_most(f"{name}: {len(want)} tensors, {what}, times bfloat16's", worst[0], 2.0, worst[1])


def worst_ratio(got, want, low, measure):
    """(error over that of `low`, name) of the tensor that comes closest to its bound, or goes furthest beyond."""
    return max((error_ratio(measure(got[name], want[name]), measure(low[name], want[name])), name) for name in low)


def token_ids(pack, directory, num_tokens):
    """Filler text for needle-20m, whose ids they are; elsewhere the text of the pack. Of random tokens some lie where any
    rounding decides: in SmolLM2 one of 2,048 is eight times as far off as any other where torch rounds as bfloat16 does.
    """
    if directory.name == "needle-20m":
        return numpy.fromfile(pack.path("eval", "filler.u16"), dtype="<u2")[:num_tokens].astype(numpy.int32)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return numpy.array(tokenizer.encode(pack.path("text.md").read_text(encoding="utf-8")).ids[:num_tokens], dtype=numpy.int32)


def prefill(pack, out, directory, ids, positions, attention="dense", ranks=None, mesh=None):
    """Our dense prefill: the tensors by the names of oracle.prefill, and the figures."""
    import longfill  # from the pack

    folder = pack.work / out
    tokens = pack.work / f"{out}.i32"
    numpy.asarray(ids, dtype="<i4").tofile(tokens)
    arguments = ["prefill", "--model", directory, "--tokens", tokens, "--out", folder, "--device", pack.device, "--attention",
                 attention, "--kv-dtype", "bfloat16", "--logits", ",".join(map(str, positions)), "--json", "--overwrite"]
    if mesh:
        arguments += ["--mesh", mesh]
    figures = json.loads(pack.run("longfill", *arguments, ranks=ranks).stdout)
    prefilled = longfill.load_manifest(folder)
    result = {"logits": prefilled.logits}
    for layer, (key, value) in enumerate(prefilled.to_numpy()):
        result[f"layer.{layer}.key"] = key
        result[f"layer.{layer}.value"] = value
    return result, figures
