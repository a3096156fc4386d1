#!/usr/bin/env python3
"""The Python package by itself: files, dtypes, the transformers cache, and what it refuses. No service needed."""

import json
import unittest

import grpc
import numpy
import support
import torch
import transformers

import longfill
from longfill import kv_reader, safetensors_io
from longfill.errors import PrefillError


def make_prefilled(dtype="float32", num_tokens=5):
    manifest = longfill.KvManifest(
        request_id="r", transfer_id="t", instance_epoch="e", architecture="LlamaForCausalLM", model_fingerprint="f",
        token_hashes=[], page_tokens=128, num_tokens=num_tokens, num_layers=2, num_kv_heads=3, head_dim=4, dtype=dtype,
        shards=[longfill.KvShard(0, "", [(0, num_tokens)])])
    random = numpy.random.default_rng(1)
    shape = (3, num_tokens, 4)
    kv = []
    for _ in range(2):
        pair = [random.normal(size=shape).astype(numpy.float32) for _ in range(2)]
        if dtype == "bfloat16":
            pair = [(a.view(numpy.uint32) >> 16).astype(numpy.uint16) for a in pair]
        kv.append(tuple(a.astype(manifest.storage_type) for a in pair))
    logits = random.normal(size=(1, 7)).astype(numpy.float32)
    return longfill.Prefilled(manifest, numpy.array([num_tokens - 1]), logits, {}, {}, kv)


def llama_config(**changes):
    return transformers.LlamaConfig(**(dict(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
                                            hidden_size=24) | changes))


class Files(support.TemporaryDirectoryTest):
    def test_what_is_saved_is_read_back(self):
        for dtype in ("float32", "float16", "bfloat16"):
            with self.subTest(dtype):
                prefilled = make_prefilled(dtype)
                prefilled.save(self.tmp / dtype)
                again = longfill.load_manifest(self.tmp / dtype)
                for pair, other in zip(prefilled.kv, again.kv, strict=True):
                    numpy.testing.assert_array_equal(pair, other)
                numpy.testing.assert_array_equal(prefilled.logits, again.logits)
                self.assertEqual(again.manifest.dtype, dtype)

    def test_safetensors_are_those_of_the_reference_package(self):
        from safetensors.numpy import load_file, save_file

        tensors = {"a": numpy.arange(6, dtype=numpy.float32).reshape(2, 3), "b": numpy.array([7], dtype=numpy.int64)}
        safetensors_io.write(self.tmp / "ours", {"a": ("F32", tensors["a"]), "b": ("I64", tensors["b"])})
        save_file(tensors, str(self.tmp / "theirs"))
        for name, expected in load_file(str(self.tmp / "ours")).items():
            numpy.testing.assert_array_equal(expected, tensors[name])
        for name, (_, array) in safetensors_io.read(self.tmp / "theirs").items():
            numpy.testing.assert_array_equal(array, tensors[name])

    def test_files_that_do_not_belong_together_are_named(self):
        directory = self.tmp / "out"
        make_prefilled().save(directory)
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())

        def check(word, **changes):
            path.write_text(json.dumps(manifest | changes))
            with self.assertRaises(ValueError) as caught:
                longfill.load_manifest(directory)
            self.assertIn(word, str(caught.exception))

        check("layer 1", files=manifest["files"][:1])
        check("2 files", files=[manifest["files"][0]] * 2 + manifest["files"][1:])
        check("expected", num_tokens=6, files=[f | {"token_ranges": [[0, 6]]} for f in manifest["files"]])
        check("version 2", version=2)
        check("dtype", dtype="int8")
        check("manifest", extra=1)

    def test_truncated_files_are_named(self):
        directory = self.tmp / "out"
        make_prefilled().save(directory)
        path = directory / "kv-layer-001-rank-000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with self.assertRaises(ValueError) as caught:
            longfill.load_manifest(directory)
        self.assertIn(path.name, str(caught.exception))


class Arrays(unittest.TestCase):
    def test_bfloat16_is_widened_without_loss(self):
        prefilled = make_prefilled("bfloat16")
        bits = prefilled.to_numpy(raw=True)[0][0]
        wide = prefilled.to_numpy()[0][0]
        self.assertEqual((bits.dtype, wide.dtype), (numpy.uint16, numpy.float32))
        numpy.testing.assert_array_equal(wide.view(numpy.uint32) >> 16, bits)

    def test_the_transformers_cache_has_batch_and_dtype(self):
        for dtype, expected in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
            prefilled = make_prefilled(dtype)
            cache = prefilled.to_dynamic_cache(llama_config())
            self.assertEqual(cache.get_seq_length(), 5)
            key, value = cache[1][0], cache[1][1]
            self.assertEqual((tuple(key.shape), key.dtype), ((1, 3, 5, 4), expected))
            numpy.testing.assert_array_equal(value[0].float().numpy(), prefilled.to_numpy()[1][1].astype(numpy.float32))
            self.assertEqual(prefilled.to_dynamic_cache(dtype=torch.float32)[0][0].dtype, torch.float32)

    def test_a_config_of_another_model_is_refused(self):
        for changes in (dict(num_hidden_layers=3), dict(num_key_value_heads=6), dict(hidden_size=48)):
            with self.assertRaises(ValueError):
                make_prefilled().to_dynamic_cache(llama_config(**changes))

    def test_the_next_token_needs_the_last_position(self):
        prefilled = make_prefilled()
        self.assertEqual(prefilled.next_token(), int(prefilled.logits[0].argmax()))
        prefilled.positions = numpy.array([2])
        with self.assertRaises(ValueError):
            prefilled.next_token()

    def test_a_cache_that_was_not_fetched_is_refused(self):
        prefilled = make_prefilled()
        prefilled.kv = []
        for call in (prefilled.to_numpy, prefilled.to_dynamic_cache):
            with self.assertRaises(ValueError):
                call()


class Calls(unittest.TestCase):
    def test_wrong_arguments_are_refused_before_any_call(self):
        with longfill.Client("127.0.0.1:1") as client:
            for arguments in (dict(kv_dtype="int8"), dict(coverage="all"), dict(logits="first"), dict(kv="keep")):
                with self.assertRaises(ValueError):
                    client.prefill([1], **arguments)

    def test_nobody_at_the_target_is_an_error(self):
        with longfill.Client("127.0.0.1:1") as client, self.assertRaises(PrefillError) as caught:
            client.prefill([1, 2, 3], timeout=5)
        self.assertIn(caught.exception.code, (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED))

    def test_wildcard_endpoints_are_at_the_host_of_rank_0(self):
        for endpoint, expected in (("0.0.0.0:7", "node1:7"), ("[::]:7", "node1:7"), (":7", "node1:7"), ("node2:7", "node2:7")):
            self.assertEqual(kv_reader.resolve_endpoint(endpoint, "node1:5"), expected)


if __name__ == "__main__":
    support.main()
