"""Tests of deploy/model_from_gguf.py on a tiny GGUF made here, and on the demo model's tokenizer.

    .venv/bin/python tests/golden/model_from_gguf_test.py
"""

import json
import pathlib
import sys
import tempfile
import unittest

import gguf
import numpy
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "deploy"))
import model_from_gguf  # noqa: E402

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16


def q4_1(shape, random):
    """Random Q4_1 blocks of a [rows, columns] weight, and their values by the format's definition."""
    rows, blocks = shape[0], shape[1] // 32
    scale = random.uniform(0.01, 0.02, (rows, blocks, 1)).astype("<f2")
    minimum = random.uniform(-0.2, -0.1, (rows, blocks, 1)).astype("<f2")
    quants = random.integers(0, 16, (rows, blocks, 32)).astype(numpy.uint8)
    nibbles = quants[..., :16] | quants[..., 16:] << 4  # elements j and j + 16 share a byte
    raw = numpy.concatenate([scale.view(numpy.uint8), minimum.view(numpy.uint8), nibbles], axis=-1)
    values = scale.astype(numpy.float32) * quants + minimum.astype(numpy.float32)
    return raw.reshape(rows, -1), values.reshape(shape), gguf.GGMLQuantizationType.Q4_1


def q8_0(shape, random):
    """As q4_1(), for Q8_0 blocks."""
    rows, blocks = shape[0], shape[1] // 32
    scale = random.uniform(0.001, 0.01, (rows, blocks, 1)).astype("<f2")
    quants = random.integers(-127, 128, (rows, blocks, 32)).astype(numpy.int8)
    raw = numpy.concatenate([scale.view(numpy.uint8), quants.view(numpy.uint8)], axis=-1)
    return raw.reshape(rows, -1), (scale.astype(numpy.float32) * quants).reshape(shape), gguf.GGMLQuantizationType.Q8_0


def f32(shape, random):
    values = random.standard_normal(shape).astype(numpy.float32)
    return values, values, None


def tiny_vocabulary():
    """Tokens, their types and merges of a byte-level BPE with three control tokens."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o"]
    tokens = control + alphabet + [merge.replace(" ", "") for merge in merges]
    return tokens, [3] * len(control) + [1] * (len(tokens) - len(control)), merges


def gguf_row_order(weight, heads):
    """The rows of a Hugging Face Q or K weight as a GGUF has them: i and i + head_dim/2 become neighbours."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * rows // 2 + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(path, edit=lambda tensors, writer: None):
    """Writes a one-layer model; returns Hugging Face name -> float32 values. edit changes it before it is written."""
    random = numpy.random.default_rng(5)
    writer = gguf.GGUFWriter(str(path), "llama")
    tokens, kinds, merges = tiny_vocabulary()
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    kv = KV_HEADS * HEAD_DIM
    tensors = {
        "token_embd.weight": q8_0((len(tokens), HIDDEN), random),
        "output_norm.weight": f32((HIDDEN,), random),
        "blk.0.attn_norm.weight": f32((HIDDEN,), random),
        "blk.0.attn_q.weight": q4_1((HIDDEN, HIDDEN), random),
        "blk.0.attn_k.weight": q4_1((kv, HIDDEN), random),
        "blk.0.attn_v.weight": q4_1((kv, HIDDEN), random),
        "blk.0.attn_output.weight": q4_1((HIDDEN, HIDDEN), random),
        "blk.0.ffn_norm.weight": f32((HIDDEN,), random),
        "blk.0.ffn_gate.weight": q4_1((INNER, HIDDEN), random),
        "blk.0.ffn_up.weight": q4_1((INNER, HIDDEN), random),
        "blk.0.ffn_down.weight": q4_1((HIDDEN, INNER), random),
    }
    edit(tensors, writer)
    for name, (raw, _, kind) in tensors.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        writer.add_tensor(name, gguf_row_order(raw, heads) if heads else raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {model_from_gguf.hugging_face_name(name): values for name, (_, values, _) in tensors.items()}


class ModelFromGgufTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.gguf = pathlib.Path(folder.name) / "tiny.gguf"
        self.out = pathlib.Path(folder.name) / "models" / "tiny"

    def refused(self, edit):
        """The message with which a GGUF edited so is refused; checks that nothing is left behind."""
        write_gguf(self.gguf, edit)
        with self.assertRaises(model_from_gguf.ConversionError) as caught:
            model_from_gguf.make_model(self.gguf, self.out)
        self.assertEqual(list(self.out.parent.iterdir()), [])
        return str(caught.exception)

    def test_weights_are_the_dequantised_ones_in_hugging_face_row_order(self):
        expected = write_gguf(self.gguf)
        self.assertTrue(model_from_gguf.make_model(self.gguf, self.out))
        got = load_file(self.out / "model.safetensors")
        self.assertEqual(sorted(got), sorted(expected))
        for name, values in expected.items():
            self.assertTrue(torch.equal(got[name], torch.from_numpy(values).to(torch.bfloat16)), name)

    def test_transformers_loads_model_and_tokenizer(self):
        write_gguf(self.gguf)
        model_from_gguf.make_model(self.gguf, self.out)
        model, report = AutoModelForCausalLM.from_pretrained(self.out, output_loading_info=True)
        self.assertEqual((report["missing_keys"], report["unexpected_keys"]), ([], []))
        self.assertEqual((model.config.rope_theta, model.config.rms_norm_eps), (5000.0, 1e-5))
        self.assertTrue(model.config.tie_word_embeddings)
        tokenizer = AutoTokenizer.from_pretrained(self.out)
        hello = tokenizer.convert_tokens_to_ids("hello")
        self.assertEqual(tokenizer("<|im_start|>hello<|im_end|>").input_ids, [1, hello, 2])
        text = "hello  world 1234\n naïve 日本 🙂"
        self.assertEqual(tokenizer.decode(tokenizer(text).input_ids), text)
        self.assertEqual(tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]), [hello])

    def test_existing_model_is_left_alone(self):
        write_gguf(self.gguf)
        self.assertTrue(model_from_gguf.make_model(self.gguf, self.out))
        (self.out / "config.json").write_text("{}")
        self.assertFalse(model_from_gguf.make_model(self.gguf, self.out))
        self.assertEqual(json.loads((self.out / "config.json").read_text()), {})
        self.assertEqual([p.name for p in self.out.parent.iterdir()], ["tiny"])

    def test_what_is_not_converted_is_refused_by_name(self):
        def drop_tensor(tensors, _):
            del tensors["blk.0.ffn_up.weight"]

        def add_rope_scaling(_, writer):
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

        self.out.parent.mkdir()
        self.assertIn("llama.rope.scaling.type", self.refused(add_rope_scaling))
        self.assertIn("10 tensors", self.refused(drop_tensor))
        with self.assertRaisesRegex(model_from_gguf.ConversionError, "rope_freqs.weight"):
            model_from_gguf.hugging_face_name("rope_freqs.weight")

    def test_demo_model_has_smollm2s_tokenizer_and_shape(self):
        reader = gguf.GGUFReader(str(model_from_gguf.bundled_gguf()))
        metadata = model_from_gguf.read_metadata(reader)
        config = model_from_gguf.make_config(metadata, tied=True)
        tokenizer = model_from_gguf.make_tokenizer(metadata)
        self.assertEqual((config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]), (30, 9, 64))
        self.assertEqual((config["num_key_value_heads"], config["rope_theta"]), (3, 100000.0))
        self.assertEqual((config["bos_token_id"], config["eos_token_id"], config["vocab_size"]), (1, 2, 49152))
        self.assertEqual(tokenizer.encode("<|im_start|>user\nHello world<|im_end|>").ids, [1, 4093, 198, 19556, 905, 2])


if __name__ == "__main__":
    unittest.main()
