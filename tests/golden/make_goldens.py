#!/usr/bin/env python3
"""Makes the tiny random checkpoints of tests/golden/data and what transformers computes for them.

    .venv/bin/python tests/golden/make_goldens.py [--out DIR] [CASE ...]

README.md beside this file says what a case holds. A case is made by the transformers of one major version: those of
NATIVE_CASES by version 5, as it stands; those of CASES by the pinned version 4, with rotary frequencies of version 5
(load_rope_functions(), needs the package index). The script makes the cases of the version that it runs with.
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

import dual_chunk
import numpy
import torch
import transformers
from run_transformers import load_model, prefill
from safetensors.torch import load_file, save_file

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
    # chunks of 256 tokens, the third of them partial: distances beyond 352 are capped, prompts beyond 400 scaled
    "qwen2-dual-chunks": dict(
        family="qwen2", num_hidden_layers=2, hidden_size=128, head_dim=None, num_tokens=600,
        max_position_embeddings=4096,
        dual_chunk_attention_config=dict(chunk_size=352, local_size=96, original_max_position_embeddings=400),
    ),
}

LONGROPE = dict(
    type="longrope", short_factor=[1.0 + 0.02 * i for i in range(48)], long_factor=[1.0 + 0.5 * i for i in range(48)]
)
LONGROPE_16 = {key: value[:16] if isinstance(value, list) else value for key, value in LONGROPE.items()}
LONGROPE_24 = {key: value[:24] if isinstance(value, list) else value for key, value in LONGROPE.items()}
PHI3 = dict(
    family="phi3", head_dim=None, max_position_embeddings=512, original_max_position_embeddings=64, pad_token_id=0
)
GLM = dict(
    family="glm", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_tokens=70, attention_bias=True,
    rope_theta=5000000.0, rms_norm_eps=1.5625e-07, partial_rotary_factor=0.5, pad_token_id=0,
)

# The same for families that version 4 lacks or computes otherwise. `off` says what in config.json would switch off
# the matter of the case, which must make a difference; `written` what config.json says in the end, in spellings that
# version 5 no longer reads; `same_as` names the case whose model and prompt this one has in
# another form.
NATIVE_CASES = {
    "mistral-window": dict(
        family="mistral", num_hidden_layers=2, num_attention_heads=4, sliding_window=37, num_tokens=201,
        off=dict(sliding_window=None),
    ),
    "mistral-window-of-the-prompt": dict(family="mistral", sliding_window=101),
    "mistral-null-window-head-dim-128": dict(family="mistral", head_dim=128, sliding_window=None),
    # upper layers alone have a window: by max_window_layers, by layer_types
    "qwen2-window-of-upper-layers": dict(
        family="qwen2", num_hidden_layers=3, num_tokens=150, sliding_window=70,
        use_sliding_window=True, max_window_layers=1, off=dict(use_sliding_window=False),
    ),
    "qwen2-window-by-layer-types-v5": dict(
        family="qwen2", num_hidden_layers=3, num_tokens=150, sliding_window=33,
        use_sliding_window=True, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        spelling="v5", off=dict(use_sliding_window=False, layer_types=["full_attention"] * 3),
    ),
    # as Qwen2.5 is published: max_position_embeddings stays at the original length
    "qwen2-yarn-beyond-original": dict(
        family="qwen2", rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=64),
        max_position_embeddings=64, off=dict(rope_scaling=None),
    ),
    "qwen2-yarn-within-original": dict(
        family="qwen2", rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=128),
        max_position_embeddings=128, off=dict(rope_scaling=None),
    ),
    # dual chunk attention, which is plain attention within its first chunk of 128 tokens
    "qwen2-first-of-dual-chunks": dict(
        family="qwen2",
        dual_chunk_attention_config=dict(chunk_size=160, local_size=32, original_max_position_embeddings=160),
    ),
    # the last prompt of the short factors, the first one of the long ones
    "phi3-longrope-short-factors": dict(
        PHI3, hidden_size=96, num_attention_heads=1, rope_scaling=LONGROPE, num_tokens=64, off=dict(rope_scaling=None),
    ),
    "phi3-longrope-long-factors": dict(
        PHI3, hidden_size=192, num_tokens=65, rope_scaling=LONGROPE,
        sliding_window=512, off=dict(rope_scaling=dict(LONGROPE, long_factor=LONGROPE["short_factor"])),
    ),
    "phi3-su-window": dict(
        PHI3, num_hidden_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_tokens=110,
        rope_scaling=LONGROPE_16, sliding_window=66, off=dict(sliding_window=None),
        written=dict(rope_scaling=dict(LONGROPE_16, type="su")),
    ),
    "phi3-partial-rotary-attention-factor-v5": dict(
        PHI3, hidden_size=128, tie_word_embeddings=True, partial_rotary_factor=0.75, spelling="v5",
        rope_scaling=dict(LONGROPE_24, attention_factor=1.25), off=dict(partial_rotary_factor=1.0, rope_scaling=None),
    ),
    "phi3-no-scaling": dict(PHI3, num_key_value_heads=2, original_max_position_embeddings=512),
    "qwen3-tied": dict(
        family="qwen3", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_tokens=70,
        tie_word_embeddings=True,
    ),
    "qwen3-head-dim-128-yarn-bias-v5": dict(
        family="qwen3", attention_bias=True, rope_scaling=YARN, head_dim=128, spelling="v5",
        off=dict(rope_scaling=None),
    ),
    "glm-native": dict(GLM, off=dict(partial_rotary_factor=1.0)),
    "glm-native-four-groups-no-bias-v5": dict(
        GLM, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, attention_bias=False, spelling="v5",
        off=dict(partial_rotary_factor=1.0),
    ),
    # remote-code checkpoints: the native one, renamed and fused
    "chatglm-remote-code": dict(same_as="glm-native"),
}

FUSED_MLP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
FUSED_QKV = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}

# What a family changes: its name in config.json, biases that it has whatever the config says or cannot have, keys
# that it lacks, tensors that it stores as one.
FAMILIES = {
    "llama": dict(architecture="LlamaForCausalLM"),
    "qwen2": dict(
        architecture="Qwen2ForCausalLM", biases=("q", "k", "v"), without=("attention_bias", "mlp_bias"),
    ),
    "mistral": dict(architecture="MistralForCausalLM", without=("attention_bias", "mlp_bias")),
    "phi3": dict(
        architecture="Phi3ForCausalLM", without=("attention_bias", "mlp_bias"),
        fused=FUSED_QKV | FUSED_MLP,
    ),
    "qwen3": dict(architecture="Qwen3ForCausalLM", without=("mlp_bias",), qk_norm=True),
    "glm": dict(
        architecture="GlmForCausalLM", without=("mlp_bias",), never_biased=("o",), fused=FUSED_MLP,
    ),
}

# From a native GLM-4 checkpoint to the form of its remote code: names of tensors (after fusion), keys of config.json.
CHATGLM_TENSORS = {
    "model.embed_tokens.": "transformer.embedding.word_embeddings.",
    "model.norm.": "transformer.encoder.final_layernorm.",
    "lm_head.": "transformer.output_layer.",
    "model.layers.": "transformer.encoder.layers.",
    "self_attn.qkv_proj.": "self_attention.query_key_value.",
    "self_attn.o_proj.": "self_attention.dense.",
    "mlp.gate_up_proj.": "mlp.dense_h_to_4h.",
    "mlp.down_proj.": "mlp.dense_4h_to_h.",
}
CHATGLM_KEYS = dict(
    num_layers="num_hidden_layers", hidden_size="hidden_size", ffn_hidden_size="intermediate_size",
    num_attention_heads="num_attention_heads", multi_query_group_num="num_key_value_heads", kv_channels="head_dim",
    padded_vocab_size="vocab_size", seq_length="max_position_embeddings", layernorm_epsilon="rms_norm_eps",
    add_qkv_bias="attention_bias", tie_word_embeddings="tie_word_embeddings", torch_dtype="torch_dtype",
)


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
    traits = FAMILIES[family]
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
            bias = name in traits.get("biases", ()) or (
                config["attention_bias"] and name not in traits.get("never_biased", ())
            )
            add_linear(f"{prefix}self_attn.{name}_proj", rows, columns, bias)
        for name in ("q", "k") if traits.get("qk_norm") else ():
            add(f"{prefix}self_attn.{name}_norm.weight", (head_dim,), 0.2, 1.0)
        add(prefix + "post_attention_layernorm.weight", (hidden,), 0.2, 1.0)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            add_linear(f"{prefix}mlp.{name}_proj", rows, columns, config["mlp_bias"])
    add("model.norm.weight", (hidden,), 0.2, 1.0)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", (config["vocab_size"], hidden), 1.0 / hidden**0.5)
    return fuse(weights, traits.get("fused", {}))


def fuse(weights, fused):
    """Rows of several tensors in one: fused maps the new part of a name to the parts that it takes the place of."""
    weights = dict(weights)
    for whole, parts in fused.items():
        for name in [name for name in weights if parts[0] + "." in name]:
            rows = [weights.pop(name.replace(parts[0], part)) for part in parts]
            weights[name.replace(parts[0], whole)] = torch.cat(rows)
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
    for key in FAMILIES[family].get("without", ()):
        del content[key]
    content.update(bos_token_id=1, eos_token_id=2)
    if spelling == "v4":
        return dict(content, torch_dtype=dtype)
    scaling = dict(content.pop("rope_scaling") or {"rope_type": "default"})
    if "type" in scaling:
        scaling["rope_type"] = scaling.pop("type")
    if "partial_rotary_factor" in content:
        scaling["partial_rotary_factor"] = content.pop("partial_rotary_factor")
    return dict(content, rope_parameters=dict(scaling, rope_theta=content.pop("rope_theta")), dtype=dtype)


def relative_error(got, want):
    """The largest difference over the largest value, over all tensors that depend on weights."""
    names = [name for name in want if name == "logits" or name.startswith("layer.")]
    return max(float((got[n].double() - want[n].double()).abs().max() / want[n].double().abs().max()) for n in names)


def run_case(directory, tokens, positions, rotary, dtype, dual_chunks=False):
    model = load_model(directory, dtype)
    if rotary is not None:
        model.model.rotary_emb.inv_freq = rotary[0]
        model.model.rotary_emb.attention_scaling = rotary[1]
    if not dual_chunks:
        return prefill(model, tokens, positions)
    dual_chunk.install(model)
    factor = dual_chunk.key_scale(
        len(tokens), model.config.dual_chunk_attention_config["original_max_position_embeddings"]
    )
    return dict(prefill(model, tokens, positions), **{"rope.attention_factor": torch.tensor([factor])})


def write_prompt(directory, config, random, num_tokens):
    """tokens.i32; returns them and the positions whose logits are kept."""
    tokens = random.integers(0, config["vocab_size"], num_tokens)
    tokens.astype("<i4").tofile(directory / "tokens.i32")
    return tokens, [num_tokens - 1, 0, 1, min(63, num_tokens - 2), min(64, num_tokens - 1), num_tokens // 2]


def make_native_case(name, directory):
    """The same as make_case for a family that the running transformers computes by itself."""
    case = dict(NATIVE_CASES[name])
    if "same_as" in case:
        return make_remote_code_case(name, directory, directory.parent / case["same_as"])
    config = dict(BASE, **case)
    dtype, spelling = config.pop("dtype", "bfloat16"), config.pop("spelling", "v4")
    num_tokens, family, off = config.pop("num_tokens", 101), config.pop("family"), config.pop("off", None)
    written = config.pop("written", {})
    if config["head_dim"] is None:
        del config["head_dim"]
    random = numpy.random.Generator(numpy.random.PCG64(zlib.crc32(name.encode())))
    write_weights(directory, random_weights(config, family, DTYPES[dtype], random), 1)
    tokens, positions = write_prompt(directory, config, random, num_tokens)

    def run(changes, dtype_of_run):
        write_json(directory / "config.json", config_json(dict(config, **changes), family, dtype, spelling))
        return run_case(directory, tokens, positions, None, dtype_of_run)

    line = name
    if off is not None:
        without = run(off, torch.float32)
    golden = run({}, torch.float32)
    save_file(golden, str(directory / "golden.safetensors"))
    if off is not None:
        difference = relative_error(without, golden)
        assert difference > 1e-2, f"{name}: {off} makes no difference"
        line += f": differs from {', '.join(off)} off by {difference:.2f},"
    print(f"{line} float32 from float64 by {relative_error(golden, run({}, torch.float64)):.1e}")
    write_json(directory / "config.json", config_json(dict(config, **written), family, dtype, spelling))


def make_remote_code_case(name, directory, native):
    """`native`, a GLM-4 case, in the form of its remote code; the golden tensors are those of the native one."""
    for file in ("tokens.i32", "golden.safetensors"):
        shutil.copy(native / file, directory / file)
    weights = fuse(load_file(str(native / "model.safetensors")), FUSED_QKV)
    for old, new in CHATGLM_TENSORS.items():
        weights = {tensor.replace(old, new): value for tensor, value in weights.items()}
    config = json.loads((native / "config.json").read_text(encoding="utf-8"))
    rotary_dim = config["head_dim"] // 2
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    weights["transformer.rotary_pos_emb.inv_freq"] = (1.0 / 10000.0**exponents).to(torch.bfloat16)  # stored, unused
    write_weights(directory, weights, 1)
    remote = dict(architectures=["ChatGLMModel"], model_type="chatglm")
    remote.update({new: config[old] for new, old in CHATGLM_KEYS.items()})
    remote.update(
        multi_query_attention=True, rmsnorm=True, post_layer_norm=True, add_bias_linear=False, original_rope=True,
        apply_residual_connection_post_layernorm=False, apply_query_key_layer_scaling=True,
        rope_ratio=config["rope_theta"] / 10000.0,
    )
    write_json(directory / "config.json", remote)
    print(f"{name}: {native.name} in another form")


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
    tokens, positions = write_prompt(directory, config, random, num_tokens)

    # rope_scaling is applied from ROPE_ORACLE, not by the pinned transformers, whose yarn differs.
    rotary = rope_parameters(rope, config)
    write_json(directory / "config.json", config_json(dict(config, rope_scaling=None), family, dtype, "v4"))
    dual_chunks = "dual_chunk_attention_config" in config
    golden = run_case(directory, tokens, positions, rotary, torch.float32, dual_chunks)
    save_file(golden, str(directory / "golden.safetensors"))
    rounding = relative_error(golden, run_case(directory, tokens, positions, rotary, torch.float64, dual_chunks))
    line = f"{name}: float32 differs from float64 by {rounding:.1e}"
    if dual_chunks:
        plain = relative_error(run_case(directory, tokens, positions, rotary, torch.float32), golden)
        assert plain > 1e-2, f"{name}: dual chunks make no difference"
        line += f", from plain attention by {plain:.2f}"
    if rotary is not None:
        unscaled = relative_error(run_case(directory, tokens, positions, None, torch.float32), golden)
        assert unscaled > 1e-2, f"{name}: the rope scaling makes no difference"
        line += f", from unscaled rope by {unscaled:.2f}"
    print(line)
    write_json(directory / "config.json", config_json(config, family, dtype, spelling))


def main():
    parser = argparse.ArgumentParser(description="Make the tiny checkpoints of tests/golden/data.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "data")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all of this version of transformers")
    arguments = parser.parse_args()
    version = int(transformers.__version__.split(".")[0])
    cases = NATIVE_CASES if version >= 5 else CASES
    unknown = sorted(set(arguments.cases) - set(cases))
    if unknown:
        parser.error(f"transformers {version} makes no case {', '.join(unknown)}; it makes {', '.join(cases)}")
    torch.set_num_threads(1)
    rope = None if version >= 5 else load_rope_functions()
    for name in arguments.cases or cases:
        directory = arguments.out / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if version >= 5:
            make_native_case(name, directory)
        else:
            make_case(name, directory, rope)


if __name__ == "__main__":
    main()
