#!/usr/bin/env python3
"""The Python package by itself: files, dtypes, the transformers cache, and what it refuses. No service needed."""

import dataclasses
import json
import struct
import time
import types
import unittest
from unittest import mock

import grpc
import numpy
import support
import torch
import transformers

import longfill
from longfill import kv_reader, safetensors_io
from longfill.errors import PrefillError
from longfill.v1 import kv_pb2, prefill_pb2


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


class FakeCall:
    """In the place of a gRPC call: gives these events."""

    def __init__(self, events):
        self._events = events

    def __iter__(self):
        return iter(self._events)

    def cancel(self):
        pass


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

    def test_manifests_that_say_what_cannot_be_are_named(self):
        directory = self.tmp / "out"
        make_prefilled().save(directory)
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())
        first, *others = manifest["files"]

        def check(word, changed):
            path.write_text(json.dumps(changed))
            with self.subTest(word), self.assertRaisesRegex(ValueError, word) as caught:
                longfill.load_manifest(directory)
            self.assertIn(str(path), str(caught.exception))

        def check_file(word, **changes):
            check(word, manifest | {"files": [first | changes, *others]})

        check("not a KV manifest", [1])
        check("num_tokens is 'x'", manifest | {"num_tokens": "x"})
        check("head_dim is -4", manifest | {"head_dim": -4})
        check("num_layers is 2.5", manifest | {"num_layers": 2.5})
        check("'num_layers' is missing", {k: v for k, v in manifest.items() if k != "num_layers"})
        check_file(r"layers \[7, 8\)", layers=[7, 8])
        check_file(r"layers \[0\] is no pair", layers=[0])
        check_file(r"kv_heads \[0, 4\)", kv_heads=[0, 4])
        check_file(r"token_ranges \[3, 6\)", token_ranges=[[3, 6]])
        check_file(r"token_ranges \[4, 2\)", token_ranges=[[4, 2]])
        check_file("is no name of a file", name="../out/" + first["name"])

    def test_broken_safetensors_are_named(self):
        path = self.tmp / "broken.safetensors"

        def check(word, header, data=bytes(8)):
            text = header if isinstance(header, bytes) else json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
            with self.subTest(word), self.assertRaisesRegex(ValueError, word) as caught:
                safetensors_io.read(path)
            self.assertIn(str(path), str(caught.exception))

        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        check("no JSON object", [1])
        check("bad safetensors header", b"{]")
        check("bad safetensors header", 100_000 * b"[")
        check("tensor a: 5 is no JSON object", {"a": 5})
        check("dtype 'F64'", {"a": entry | {"dtype": "F64"}})
        check(r"dtype \['F32'\]", {"a": entry | {"dtype": ["F32"]}})
        check(r"shape \[-2\]", {"a": entry | {"shape": [-2]}})
        check("shape 2 ", {"a": entry | {"shape": 2}})
        check("data_offsets None", {"a": {"dtype": "F32", "shape": [2]}})
        check(r"data_offsets \[0\]", {"a": entry | {"data_offsets": [0]}})
        check("data_offsets", {"a": entry | {"data_offsets": ["0", "8"]}})
        check(r"bytes \[0, 8\) of 4", {"a": entry}, bytes(4))
        check("do not hold", {"a": entry | {"shape": [3]}})

    def test_logits_that_are_none_are_named(self):
        directory = self.tmp / "out"
        make_prefilled().save(directory)
        path = directory / "logits.safetensors"
        positions, logits = ("I64", numpy.array([4])), ("F32", numpy.zeros((1, 7)))
        for tensors in ({"logits": logits}, {"positions": positions}, {"positions": positions, "logits": ("F32", numpy.zeros(7))},
                        {"positions": ("I64", numpy.array([3, 4])), "logits": logits},
                        {"positions": positions, "logits": ("F16", numpy.zeros((1, 7)))}):
            safetensors_io.write(path, tensors)
            with self.assertRaisesRegex(ValueError, "logits.safetensors: positions are .* and logits"):
                longfill.load_manifest(directory)

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

    def test_a_config_of_remote_code_is_read_in_its_own_spelling(self):
        config = transformers.PretrainedConfig(num_layers=2, num_attention_heads=6, multi_query_group_num=3, kv_channels=4)
        cache = make_prefilled()
        self.assertEqual(cache.to_dynamic_cache(config).get_seq_length(), 5)
        config.kv_channels = 8
        with self.assertRaises(ValueError):
            cache.to_dynamic_cache(config)

    def test_keys_of_dual_chunks_are_refused_for_transformers_and_said_by_the_manifest(self):
        prefilled = make_prefilled(num_tokens=5)
        self.assertNotIn("rotary_chunk_tokens", prefilled.manifest.to_json())
        for chunk, original, refused in ((5, None, False), (4, None, True), (5, 5, False), (5, 4, True)):
            manifest = dataclasses.replace(prefilled.manifest, rotary_chunk_tokens=chunk)
            self.assertEqual(longfill.KvManifest.from_json(manifest.to_json(), "it"), manifest)
            config = types.SimpleNamespace(num_hidden_layers=2, num_key_value_heads=3, head_dim=4)
            if original is not None:
                config.dual_chunk_attention_config = {"original_max_position_embeddings": original}
            chunked = dataclasses.replace(prefilled, manifest=manifest)
            if refused:
                with self.assertRaisesRegex(ValueError, "dual chunk attention, which is plain up to 4 tokens"):
                    chunked.to_dynamic_cache(config)
            else:
                self.assertEqual(chunked.to_dynamic_cache(config).get_seq_length(), 5)

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
            for arguments in (dict(kv_dtype="int8"), dict(coverage="all"), dict(logits="first"), dict(kv="keep"),
                              dict(min_recall=0), dict(min_recall=1.5)):
                with self.assertRaises(ValueError):
                    client.prefill([1], **arguments)

    def test_wrong_ids_and_positions_are_named_before_any_call(self):
        with longfill.Client("127.0.0.1:1") as client:
            for ids, word in (([1, 2.5], r"ids\[0\] is 1, |ids\[1\] is 2.5, expected an integer"),
                              (numpy.array([3.0]), r"ids\[0\] is .*3.0.*, expected an integer"),
                              (numpy.ones((2, 3), dtype=int), r"ids has the shape \[2, 3\]"), ([[1], [2]], r"shape \[2, 1\]"),
                              ([7, 1 << 40], rf"ids\[1\] is {1 << 40}, which 32 bits do not hold"),
                              ([1 << 70], r"ids\[0\] is \d+, which"), (["a"], r"ids\[0\] is 'a'"), ([1, None], r"ids\[1\] is None"),
                              ([-(1 << 31) - 1], r"ids\[0\]"), (5, "ids has the shape"), ("12", "ids has the shape"),
                              ([True, None], r"ids\[0\] is True")):
                with self.subTest(word), self.assertRaisesRegex(ValueError, word):
                    client.prefill(ids)
            for logits, word in (([1.5], r"logits\[0\] is 1.5"), ([0, 1 << 63], r"logits\[1\]"), ([[0]], "logits has the shape")):
                with self.subTest(word), self.assertRaisesRegex(ValueError, word):
                    client.prefill([1, 2], logits=logits)

    def test_ids_of_every_integer_type_are_sent_as_they_are(self):
        sent = []

        def take(requests, timeout=None):
            sent.append([token for request in requests for token in request.tokens.ids])
            return FakeCall([])

        with longfill.Client("127.0.0.1:1") as client:
            client._stub = types.SimpleNamespace(Prefill=take)
            for ids in ([1, 2], (1, 2), range(1, 3), numpy.array([1, 2], dtype=numpy.uint64), numpy.array([1, 2], dtype=">i2"),
                        torch.tensor([1, 2])):
                with self.assertRaisesRegex(PrefillError, "without a result"):
                    client.prefill(ids)
        self.assertEqual(sent, 6 * [[1, 2]])

    def test_the_timeout_is_for_prefill_and_cache_together(self):
        manifest = kv_pb2.KvManifest(version=1, dtype=kv_pb2.DATA_TYPE_FLOAT32)

        def events():
            yield prefill_pb2.PrefillEvent(accepted=prefill_pb2.Accepted(manifest=manifest))
            time.sleep(0.3)
            yield prefill_pb2.PrefillEvent(result=prefill_pb2.PrefillResult())

        with longfill.Client("127.0.0.1:1") as client, mock.patch("longfill.client.KvReader") as reader:
            client._stub = types.SimpleNamespace(Prefill=lambda requests, timeout: FakeCall(events()))
            for timeout in (100, 0.1, None):
                reader.reset_mock()
                client.prefill([1], timeout=timeout)
                left, = reader.return_value.finish.call_args.args
                if timeout is None:
                    self.assertIsNone(left)
                else:
                    self.assertTrue(0 <= left <= max(0, timeout - 0.3), left)

    def test_nobody_at_the_target_is_an_error(self):
        with longfill.Client("127.0.0.1:1") as client, self.assertRaises(PrefillError) as caught:
            client.prefill([1, 2, 3], timeout=5)
        self.assertIn(caught.exception.code, (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED))

    def test_wildcard_endpoints_are_at_the_host_of_rank_0(self):
        for endpoint, expected in (("0.0.0.0:7", "node1:7"), ("[::]:7", "node1:7"), (":7", "node1:7"), ("node2:7", "node2:7")):
            self.assertEqual(kv_reader.resolve_endpoint(endpoint, "node1:5"), expected)


if __name__ == "__main__":
    support.main()
