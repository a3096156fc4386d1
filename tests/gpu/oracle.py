"""Hugging Face transformers as the judge, of versions 4 and 5, on a GPU or on the CPU."""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy
import torch
import transformers
from checks import error_ratio

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "golden"))
import dual_chunk  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# fp32 is the reference: no TF32 in its place.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

VERSION = int(transformers.__version__.split(".", maxsplit=1)[0])


def load_model(directory, dtype, device, attention="eager", **options):
    options |= {"dtype" if VERSION >= 5 else "torch_dtype": dtype, "attn_implementation": attention}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval().to(device)


def load_golden_model(directory, golden, dtype, device):
    """The checkpoint of a golden case. Its scaled rotary frequencies come from the golden file: not every transformers
    computes them, nor reads every spelling of config.json. What only remote code reads is loaded in its native form, and
    dual chunk attention, which transformers lacks, is ours, by definition."""
    if json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"] == "chatglm":
        directory = directory.parent / "glm-native"
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    parameters = config.pop("rope_parameters", None)
    if parameters is not None:
        config["rope_theta"] = parameters["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")
    config["rope_scaling"] = None
    # Version 5 refuses a hidden size that the heads do not divide, although head_dim is given and is what counts.
    heads = config["num_attention_heads"]
    if "head_dim" in config:
        config["num_attention_heads"] = config["num_key_value_heads"]
    dual_chunks = "dual_chunk_attention_config" in config
    if dual_chunks:
        device = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        for path in directory.glob("model*"):
            shutil.copy(path, folder)
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        checked = transformers.AutoConfig.from_pretrained(folder)
        checked.num_attention_heads = heads
        model = load_model(folder, dtype, device, config=checked)
    rotary = model.model.rotary_emb
    rotary.inv_freq = torch.from_numpy(numpy.array(golden["rope.inv_freq"])).to(device)
    rotary.attention_scaling = float(golden["rope.attention_factor"][0])
    if dual_chunks:
        dual_chunk.install(model)
    return model


def new_cache():
    return transformers.DynamicCache()


def cache_layers(cache):
    """For each layer (key, value), [1, kv_heads, tokens, head_dim]."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def prefill(model, ids, positions, keep_kv=True):
    """{"logits": [P, vocab], "layer.N.key" and "layer.N.value": [kv_heads, tokens, head_dim]} in float32 on the host, and
    the cache."""
    cache = new_cache() if keep_kv else None
    with torch.no_grad():
        tokens = torch.tensor(numpy.asarray(ids, dtype=numpy.int64)[None], device=model.device)
        hidden = model.model(tokens, past_key_values=cache, use_cache=keep_kv)[0][0]
        result = {"logits": to_numpy(model.lm_head(hidden[list(positions)]))}
    if keep_kv:
        for layer, (key, value) in enumerate(cache_layers(cache)):
            result[f"layer.{layer}.key"] = to_numpy(key[0])
            result[f"layer.{layer}.value"] = to_numpy(value[0])
    return result, cache


def to_numpy(tensor):
    return tensor.float().cpu().numpy()


def step(model, cache, token):
    """The logits [vocab] after one more token."""
    with torch.no_grad():
        tokens = torch.tensor([[token]], device=model.device)
        return to_numpy(model(tokens, past_key_values=cache, use_cache=True).logits[0, -1])


def norm_error(got, want):
    """|got - want| over |want|, Euclidean, in float64; infinity where that is no number."""
    want = numpy.asarray(want, dtype=numpy.float64)
    return error_ratio(float(numpy.linalg.norm(got - want)), float(numpy.linalg.norm(want)))


def max_error(got, want):
    """The largest difference over the largest value; infinity where that is no number."""
    want = numpy.asarray(want, dtype=numpy.float64)
    return error_ratio(float(numpy.abs(got - want).max()), float(numpy.abs(want).max()))


def log_softmax(logits):
    logits = logits.astype(numpy.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(axis=-1, keepdims=True))


def divergence(dense, sparse):
    """KL(dense || sparse), summed over the vocabulary, averaged over positions."""
    p, q = log_softmax(dense), log_softmax(sparse)
    return float((numpy.exp(p) * (p - q)).sum(axis=-1).mean())


def free():
    """Gives back what models that are gone had on the GPU; our programs want it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
