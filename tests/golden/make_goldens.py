#!/usr/bin/env python3
"""Makes the tiny random checkpoints of tests/golden/data and what transformers computes for them.

    .venv/bin/python tests/golden/make_goldens.py [--out DIR] [CASE ...]

README.md beside this file says what a case holds. Needs the package index: the formulas of scaled rotary embeddings
come from a newer transformers than the one that computes the rest, see load_rope_functions().
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib

import numpy
import torch
from run_transformers import load_model, prefill
from safetensors.torch import save_file

# The pinned transformers predates yarn's mscale, truncate and original_max_position_embeddings.
ROPE_ORACLE = "transformers==5.23.0"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Small enough to commit, odd enough to catch mistakes: the vocabulary divides by nothing, head_dim is not
# hidden_size / num_attention_heads.
BASE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)

# Case: changes to BASE. Besides keys of config.json: family (llama), dtype (bfloat16), num_tokens (101), shards (1) and
# spelling, `v4` (rope_theta, rope_scaling, torch_dtype) or `v5` (rope_parameters, dtype).
CASES = {
    "llama-gqa4": dict(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=32, num_tokens=257),
    # head_dim left out: hidden_size / num_attention_heads
    "llama-mha-tied-fp16": dict(
        num_hidden_layers=2, hidden_size=64, num_key_value_heads=2, head_dim=None, tie_word_embeddings=True,
        dtype="float16",
    ),
    "llama-gqa7-tied": dict(num_hidden_layers=2, num_attention_heads=7, tie_word_embeddings=True),
    "llama-head-dim-96-fp32": dict(head_dim=96, dtype="float32"),
    "llama-head-dim-128": dict(head_dim=128),
    "llama-attention-bias": dict(attention_bias=True, num_key_value_heads=2),
    "llama-all-biases-fp32": dict(attention_bias=True, mlp_bias=True, dtype="float32"),
    "llama-sharded-v5": dict(num_hidden_layers=3, num_attention_heads=4, head_dim=32, shards=3, spelling="v5"),
    "llama-rope-linear": dict(rope_scaling=dict(type="linear", factor=4.0)),
    "llama-rope-linear-v5": dict(rope_scaling=dict(rope_type="linear", factor=2.5), spelling="v5", dtype="float16"),
    "llama-rope-llama3": dict(rope_scaling=LLAMA3, rope_theta=500000.0),
    "llama-rope-llama3-v5": dict(
        rope_scaling=dict(LLAMA3, factor=32.0, original_max_position_embeddings=256), spelling="v5"
    ),
    "llama-rope-yarn": dict(rope_scaling=YARN),
    "llama-rope-yarn-within-original": dict(
        rope_scaling=dict(YARN, factor=4.0, original_max_position_embeddings=4096), max_position_embeddings=16384
    ),
    "llama-rope-yarn-no-original": dict(rope_scaling=dict(rope_type="yarn", factor=8.0), max_position_embeddings=128),
    "llama-rope-yarn-attention-factor-v5": dict(rope_scaling=dict(YARN, attention_factor=0.75), spelling="v5"),
    "llama-rope-yarn-mscale": dict(rope_scaling=dict(YARN, mscale=1.5, mscale_all_dim=0.5)),
    # one of the two alone is ignored
    "llama-rope-yarn-mscale-alone": dict(rope_scaling=dict(YARN, mscale=1.5)),
    "llama-rope-yarn-betas-no-truncate-v5": dict(
        rope_scaling=dict(YARN, beta_fast=16.0, beta_slow=2.0, truncate=False), spelling="v5"
    ),
    # biases of Q, K and V without a key that says so; a sliding window that is named and not used
    "qwen2-gqa2": dict(
        family="qwen2", num_hidden_layers=2, hidden_size=128, head_dim=None, sliding_window=32,
        use_sliding_window=False, max_window_layers=2,
    ),
}

# What a family changes: its name in config.json, biases that it has whatever the config says, keys that it lacks.
FAMILIES = {
    "llama": dict(architecture="LlamaForCausalLM", biases=(), without=()),
    "qwen2": dict(architecture="Qwen2ForCausalLM", biases=("q", "k", "v"), without=("attention_bias", "mlp_bias")),
}


def load_rope_functions():
    """The rotary-embedding module of ROPE_ORACLE, which itself does not run on the pinned torch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, ROPE_ORACLE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(pathlib.Path(folder).glob("*.whl"))) as wheel:
            source = wheel.extract("transformers/modeling_rope_utils.py", folder)
        # Inside the pinned package, whose helpers its relative imports then find.
        spec = importlib.util.spec_from_file_location("transformers.rope_oracle", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def rope_parameters(rope, config):
    """(inv_freq, attention factor) of a config in the v4 spelling; None where rope_scaling is absent."""
    if config["rope_scaling"] is None:
        return None

    class Config(rope.RotaryEmbeddingConfigMixin):
        pass

    oracle = Config()
    oracle.rope_parameters = None
    for name in ("hidden_size", "num_attention_heads", "max_position_embeddings", "head_dim"):
        if name in config:
            setattr(oracle, name, config[name])
    oracle.convert_rope_params_to_dict(rope_scaling=dict(config["rope_scaling"]), rope_theta=config["rope_theta"])
    return rope.ROPE_INIT_FUNCTIONS[oracle.rope_parameters["rope_type"]](oracle)


def random_weights(config, family, dtype, random):
    """All tensors by Hugging Face name, scaled so that activations stay near 1 and attention is not flat."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    weights = {}

    def add(name, shape, scale, offset=0.0):
        values = offset + scale * random.standard_normal(shape)
        weights[name] = torch.from_numpy(values.astype(numpy.float32)).to(dtype)

    def add_linear(name, rows, columns, bias):
        add(name + ".weight", (rows, columns), 1.2 / columns**0.5)
        if bias:
            add(name + ".bias", (rows,), 0.5)

    add("model.embed_tokens.weight", (config["vocab_size"], hidden), 1.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        add(prefix + "input_layernorm.weight", (hidden,), 0.2, 1.0)
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            bias = config["attention_bias"] or name in FAMILIES[family]["biases"]
            add_linear(f"{prefix}self_attn.{name}_proj", rows, columns, bias)
        add(prefix + "post_attention_layernorm.weight", (hidden,), 0.2, 1.0)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            add_linear(f"{prefix}mlp.{name}_proj", rows, columns, config["mlp_bias"])
    add("model.norm.weight", (hidden,), 0.2, 1.0)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", (config["vocab_size"], hidden), 1.0 / hidden**0.5)
    return weights


def write_weights(directory, weights, shards):
    """model.safetensors, or `shards` files dealt round robin (so that layers straddle files) with their index."""
    if shards == 1:
        save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(weights)[shard::shards]
        save_file({name: weights[name] for name in names}, str(directory / file), metadata={"format": "pt"})
        weight_map.update({name: file for name in names})
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def config_json(config, family, dtype, spelling):
    """The content of config.json. The pinned transformers reads v4 only."""
    content = dict(config, architectures=[FAMILIES[family]["architecture"]], model_type=family, hidden_act="silu")
    for key in FAMILIES[family]["without"]:
        del content[key]
    content.update(bos_token_id=1, eos_token_id=2)
    if spelling == "v4":
        return dict(content, torch_dtype=dtype)
    scaling = content.pop("rope_scaling") or {"rope_type": "default"}
    return dict(content, rope_parameters=dict(scaling, rope_theta=content.pop("rope_theta")), dtype=dtype)


def relative_error(got, want):
    """The largest difference over the largest value, over all tensors that depend on weights."""
    names = [name for name in want if name == "logits" or name.startswith("layer.")]
    return max(float((got[n].double() - want[n].double()).abs().max() / want[n].double().abs().max()) for n in names)


def run_case(directory, tokens, positions, rotary, dtype):
    model = load_model(directory, dtype)
    if rotary is not None:
        model.model.rotary_emb.inv_freq = rotary[0]
        model.model.rotary_emb.attention_scaling = rotary[1]
    return prefill(model, tokens, positions)


def make_case(name, directory, rope):
    """Writes one case into the empty `directory` and prints how sensitive it is."""
    config = dict(BASE, **CASES[name])
    dtype, spelling = config.pop("dtype", "bfloat16"), config.pop("spelling", "v4")
    num_tokens, shards = config.pop("num_tokens", 101), config.pop("shards", 1)
    family = config.pop("family", "llama")
    if config["head_dim"] is None:
        del config["head_dim"]
    random = numpy.random.Generator(numpy.random.PCG64(zlib.crc32(name.encode())))
    write_weights(directory, random_weights(config, family, DTYPES[dtype], random), shards)
    tokens = random.integers(0, config["vocab_size"], num_tokens)
    tokens.astype("<i4").tofile(directory / "tokens.i32")
    positions = [num_tokens - 1, 0, 1, 63, 64, num_tokens // 2]

    # rope_scaling is applied from ROPE_ORACLE, not by the pinned transformers, whose yarn differs.
    rotary = rope_parameters(rope, config)
    write_json(directory / "config.json", config_json(dict(config, rope_scaling=None), family, dtype, "v4"))
    golden = run_case(directory, tokens, positions, rotary, torch.float32)
    save_file(golden, str(directory / "golden.safetensors"))
    rounding = relative_error(golden, run_case(directory, tokens, positions, rotary, torch.float64))
    line = f"{name}: float32 differs from float64 by {rounding:.1e}"
    if rotary is not None:
        unscaled = relative_error(run_case(directory, tokens, positions, None, torch.float32), golden)
        assert unscaled > 1e-2, f"{name}: the rope scaling makes no difference"
        line += f", from unscaled rope by {unscaled:.2f}"
    print(line)
    write_json(directory / "config.json", config_json(config, family, dtype, spelling))


def main():
    parser = argparse.ArgumentParser(description="Make the tiny checkpoints of tests/golden/data.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "data")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - set(CASES))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    rope = load_rope_functions()
    for name in arguments.cases or CASES:
        directory = arguments.out / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        make_case(name, directory, rope)


if __name__ == "__main__":
    main()
