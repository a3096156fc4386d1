#!/usr/bin/env python3
"""`longfill bench prefill` on the CPU: what it prints, and what it refuses."""

import json

import numpy
import support
from support import run

from longfill import safetensors_io

TOKENS = 2000
GEOMETRY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 97, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "initializer_range": 0.02,
}


def write_recording(path, tokens=TOKENS, layers=2, heads=3, vertical=300, slash=400):
    """Random selections in the form of recorded ones; the package's writer has no metadata, which this adds."""
    random = numpy.random.default_rng(5)
    rows = [[numpy.stack([random.permutation(tokens)[:count] for _ in range(heads)]) for _ in range(layers)]
            for count in (vertical, slash)]
    safetensors_io.write(path, {name: ("I32", numpy.array(value)) for name, value in zip(("vertical", "slash"), rows)})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length]) | {"__metadata__": {"tokens": str(tokens)}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length:])
    return path


def tile_pairs(columns, distances, tokens):
    """Pairs of one head by the definition: rows of 64 take keys of the pieces of their distances, and columns."""
    pieces = []  # kernels/sparse/sparse_index.h, CoarseRuns
    for distance in sorted(map(int, numpy.append(distances, 0)), reverse=True):
        if not pieces or distance < pieces[-1]:
            pieces.append(min(distance, pieces[-1] - 64) if pieces else distance)
    total = 0
    for begin in range(0, tokens, 64):
        keys = numpy.zeros(tokens, dtype=bool)
        keys[columns] = True
        for piece in pieces:
            keys[max(0, begin - piece):max(0, begin - piece + 64)] = True
        total += sum(int(keys[:query + 1].sum()) for query in range(begin, min(begin + 64, tokens)))
    return total


class Bench(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.geometry = self.tmp / "geometry.json"
        self.geometry.write_text(json.dumps(GEOMETRY))

    def bench(self, *options, tokens=TOKENS, **more):
        return run("bench", "prefill", "--geometry", self.geometry, "--tokens", str(tokens), *options, **more)

    def report(self, *options, **more):
        result = self.bench(*options, "--json", **more)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)

    def test_json_has_every_part_and_sums_up(self):
        report = self.report("--seed", "3")
        figures, = report["runs"]
        self.assertEqual((report["tokens"], report["seed"], report["indices"], report["ranks"]), (TOKENS, 3, "built", 1))
        parts = sum(figures[part + "_seconds"] for part in ("index", "attention", "gemm", "other"))
        self.assertLess(parts, figures["seconds"])
        self.assertEqual(figures["covered_density"], 1.0)
        self.assertEqual(figures["covered_pairs"], 3 * 4 * TOKENS * (TOKENS + 1) // 2)
        self.assertEqual(figures["kv_bytes"], 2 * 3 * 2 * TOKENS * 16 * 4)
        self.assertEqual(len(figures["kv_checksums"]), 1)
        self.assertNotIn("kv_copy", report)

    def test_equal_seeds_give_equal_caches(self):
        checksums = {seed: self.report("--seed", seed)["runs"][0]["kv_checksums"] for seed in ("1", "2")}
        self.assertEqual(self.report("--seed", "1", "--repeat", "2")["runs"][1]["kv_checksums"], checksums["1"])
        self.assertNotEqual(checksums["1"], checksums["2"])

    def test_copies_are_compared_by_turns(self):
        report = self.report("--compare-kv-copy", "--repeat", "2")
        self.assertEqual([f["kv"] for f in report["runs"]], ["discard", "none", "none", "discard"])
        self.assertEqual(set(report["kv_copy"]), {"attention_slowdown", "gemm_slowdown", "slowdown"})
        self.assertEqual(report["runs"][1]["kv_bytes"], 0)
        self.assertEqual(report["runs"][1]["kv_checksums"], [])

    def test_recorded_indices_take_the_place_of_those_that_are_built(self):
        recording = write_recording(self.tmp / "recorded.safetensors")
        patterns = self.tmp / "patterns.json"
        patterns.write_text(json.dumps([{"0": ["vertical_and_slash", 100, 200, 1], "1": ["stream_llm", 16, 128, 1],
                                         "2": ["vertical_and_slash", 300, 60, 1], "3": ["vertical_and_slash", 30, 400, 1]}] * 3))
        built = self.report("--patterns", patterns)
        replayed = self.report("--patterns", patterns, "--indices", recording)
        self.assertEqual(replayed["indices"], str(recording))
        self.assertNotEqual(replayed["runs"][0]["covered_pairs"], built["runs"][0]["covered_pairs"])
        self.assertEqual(self.report("--attention", "vertical-slash:300,400", "--indices", recording)["runs"][0]["covered_pairs"],
                         self.count_pairs(recording, 300, 400))
        ranks = self.report("--patterns", patterns, "--indices", recording, ranks=2)
        self.assertEqual(ranks["runs"][0]["covered_pairs"], replayed["runs"][0]["covered_pairs"])

    def test_recall_is_watched_of_built_and_of_recorded_indices(self):
        recording = write_recording(self.tmp / "recorded.safetensors")
        attention = ("--attention", "vertical-slash:100,200")
        self.assertIsNone(self.report(*attention)["runs"][0]["recall"])
        for options in ((), ("--indices", recording)):
            with self.subTest(options=options):
                recall = self.report(*attention, *options, "--recall-monitor")["runs"][0]["recall"]
                self.assertTrue(0 < recall["mean"] < 1 and 0 < recall["pair_share"] < 1 and recall["seconds"] > 0, recall)
                self.assertIn("recall monitor", self.bench(*attention, *options, "--recall-monitor").stdout)
        refused = self.bench(*attention, "--indices", recording, "--min-recall", "0.9")
        self.assertEqual((refused.returncode, refused.stdout), (2, ""), refused.stderr)
        self.assertIn("min_recall 0.9: no index is widened where indices are replaced", refused.stderr)

    def count_pairs(self, recording, num_vertical, num_slash):
        tensors = safetensors_io.read(recording)
        return sum(tile_pairs(tensors["vertical"][1][layer % 2, head % 3][:num_vertical],
                              tensors["slash"][1][layer % 2, head % 3][:num_slash], TOKENS)
                   for layer in range(3) for head in range(4))

    def test_the_text_says_what_was_measured(self):
        result = self.bench("--attention", "vertical-slash:100,200")
        self.assertEqual(result.returncode, 0, result.stderr)
        for words in ("2000 tokens", "index", "attention", "GEMM", "exposed copy", "published", "covered", "computed", "floor",
                      "planned", "CRC-32C", "indices: as built"):
            self.assertIn(words, result.stdout)

    def test_what_cannot_be_measured_is_refused(self):
        recording = write_recording(self.tmp / "recorded.safetensors")
        broken = self.tmp / "broken.safetensors"
        broken.write_bytes(recording.read_bytes()[:-4])
        replay = ("--attention", "vertical-slash:100,200", "--indices")
        for options, words in (
            (("--indices", recording), ("nothing to replay",)),
            ((*replay, self.tmp / "none"), ("none",)),
            ((*replay, broken), ("broken.safetensors",)),
            (("--attention", "vertical-slash:301,200", "--indices", recording), ("301", "300 keys")),
            (("--attention", "block-sparse:4", "--indices", recording), ("block",)),
            (("--attention", "nonsense"), ("nonsense",)),
            (("--kv", "somewhere"), ("somewhere",)),
            (("--repeat", "0"), ("--repeat",)),
            (("--gemm-tflops", "-1"), ("--gemm-tflops",)),
            (("--attention", "dense", "--patterns", "x.json"), ("--patterns",)),
        ):
            with self.subTest(options=options):
                result = self.bench(*options)
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                for word in words:
                    self.assertIn(word, result.stderr)
        with self.subTest("another length: both are named"):
            result = self.bench(*replay, recording, tokens=1999)
            self.assertEqual(result.returncode, 2)
            self.assertIn("2000", result.stderr)
            self.assertIn("1999", result.stderr)
        with self.subTest("beyond the model's positions"):
            result = self.bench(tokens=5000)
            self.assertEqual(result.returncode, 2)
            self.assertIn("4096", result.stderr)


if __name__ == "__main__":
    support.main()
