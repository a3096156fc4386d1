#!/usr/bin/env python3
"""`longfill bench scaling` on the CPU: what it prints, and what it refuses."""

import json

import support
from bench_test import GEOMETRY, write_recording
from support import run

TOKENS = 2000
NUM_LAYERS = 3  # of GEOMETRY
KV_ROW_BYTES = 2 * 2 * 16 * 4  # K and V of a token: 2 heads of 16, fp32


class BenchScaling(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.geometry = self.tmp / "geometry.json"
        self.geometry.write_text(json.dumps(GEOMETRY))

    def bench(self, *options, tokens=TOKENS, **more):
        return run("bench", "scaling", "--geometry", self.geometry, "--tokens", str(tokens), *options, **more)

    def report(self, *options, **more):
        result = self.bench(*options, "--json", **more)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)

    def replay(self, vertical=100, slash=200):
        recording = write_recording(self.tmp / "recorded.safetensors", tokens=TOKENS)
        return "--attention", f"vertical-slash:{vertical},{slash}", "--indices", recording

    def test_every_number_of_ranks_is_split_by_sequence_and_by_head(self):
        report = self.report("--ranks", "1,2,4", "--links", "100,10,2")
        meshes = [(r["ranks"], r["sequence"], r["head"]) for r in report["runs"]]
        self.assertEqual(meshes, [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 4, 1), (4, 1, 4), (4, 2, 2)])
        self.assertEqual((report["layers"], report["executed_layers"]), (NUM_LAYERS, 1))  # all dense
        self.assertEqual(report["links"]["ranks_per_node"], 2)
        one = report["runs"][0]
        self.assertEqual((one["efficiency"], one["imbalance"], one["node_bytes"]), (1, 1, 0))
        for figures in report["runs"]:
            with self.subTest(sequence=figures["sequence"], head=figures["head"]):
                self.assertAlmostEqual(figures["efficiency"], one["seconds"] / figures["ranks"] / figures["seconds"])
                self.assertGreaterEqual(figures["imbalance"], 1)
                self.assertGreaterEqual(figures["exposed_communication_seconds"], 0)
                self.assertLess(figures["exposed_communication_seconds"], figures["seconds"])
                for part in ("attention", "gemm", "index", "other", "copy"):
                    seconds = figures[part + "_seconds"]
                    self.assertLessEqual(seconds["mean"], seconds["slowest"] + 1e-12)
                    self.assertLessEqual(seconds["slowest"], figures["seconds"])
                self.assertEqual(figures["network_bytes"] > 0, figures["ranks"] > 2)

    def test_by_sequence_ranks_receive_keys_and_values_of_the_others(self):
        figures, = self.report("--mesh", "sequence=4", "--links", "nvlink")["runs"]
        self.assertIsNone(figures["efficiency"])
        self.assertEqual(figures["network_bytes"], 0)
        # 2000 tokens are 15 blocks of 128 and 80 tokens: ranks have 512, one 464.
        gathered = (TOKENS - 464) * KV_ROW_BYTES
        # Seven agreements of 8 bytes, and two pairs of int64 of 4 heads, each 2 (n - 1) / n times.
        reduced = 1.5 * (7 * 8 + 2 * 4 * 2 * 8)
        self.assertEqual(figures["node_bytes"], NUM_LAYERS * (gathered + reduced))

    def test_recorded_indices_are_replayed(self):
        report = self.report("--ranks", "1,2", "--seed", "4", *self.replay())
        self.assertEqual(report["executed_layers"], 2)  # two are recorded
        self.assertEqual(report["indices"], str(self.tmp / "recorded.safetensors"))
        for figures in report["runs"]:
            self.assertGreater(figures["index_seconds"]["mean"], 0)
        self.assertEqual(self.report("--mesh", "head=2", "--layers", "1", *self.replay())["executed_layers"], 1)

    def test_the_key_blocks_that_ranks_reference_are_told_by_kv_group(self):
        heads = {str(head): ["stream_llm", 1 if head < 2 else 2000, 64, 1] for head in range(4)}
        patterns = self.tmp / "patterns.json"
        patterns.write_text(json.dumps([heads] * NUM_LAYERS))
        by_head, by_sequence = (
            self.report("--mesh", mesh, "--patterns", patterns)["runs"][0] for mesh in ("head=2", "sequence=2"))
        self.assertIsNone(by_head["referenced_key_blocks"])  # nothing is gathered
        # Blocks of 128 go 0 1 1 0 ...: of the 16 blocks each rank has 8. The first KV group sees block 0, and the
        # last 64 keys before each row: the block before each of its own. Rank 1 (blocks 1 2 5 6 9 10 13 14) needs
        # 0 4 8 12 of the other's, rank 0 (0 3 4 7 8 11 12 15) 2 6 10 14. The second sees all but those after it:
        # all of rank 1's are before block 15, and of rank 0's block 15 is not before 14.
        referenced = by_sequence["referenced_key_blocks"]
        self.assertEqual(referenced["by_kv_group"], [0.5, (1 + 7 / 8) / 2])
        self.assertEqual((referenced["least"], referenced["under_half"]), (0.5, 0))
        text = self.bench("--mesh", "sequence=2", "--patterns", patterns).stdout
        self.assertIn("of other ranks' key blocks are referenced (least 0.500), by KV group 0.500 0.938", text)

    def test_one_kv_group_a_rank_of_which_one_is_dense_does_not_balance(self):
        patterns = self.tmp / "patterns.json"
        heads = {"0": ["stream_llm", 2000, 2000, 1], "1": ["stream_llm", 2000, 2000, 1],
                 "2": ["stream_llm", 1, 1, 1], "3": ["stream_llm", 1, 1, 1]}
        patterns.write_text(json.dumps([heads] * NUM_LAYERS))
        figures, = self.report("--mesh", "head=4", "--patterns", patterns)["runs"]
        self.assertGreater(figures["imbalance"], 1.5)  # two ranks have nearly all of it

    def test_the_text_says_what_was_measured(self):
        result = self.bench("--ranks", "1,2")
        self.assertEqual(result.returncode, 0, result.stderr)
        for words in ("2000 tokens", "dense", "1 of 3 layers", "nodes of 8", "1 ranks", "2 ranks, sequence=2,head=1",
                      "sequence=1,head=2", "efficiency", "imbalance", "exposed communication", "attention", "copied at"):
            self.assertIn(words, result.stdout)

    def test_what_cannot_be_told_is_refused(self):
        for options, words in (
            (("--links", "ethernet"), ("--links", "ethernet")),
            (("--links", "100,0,8"), ("--links", "network_gbs is 0")),
            (("--ranks", "0"), ("--ranks",)),
            (("--ranks", "2,x"), ("--ranks",)),
            (("--ranks", "2", "--mesh", "head=2"), ("--mesh",)),
            (("--mesh", "head=none"), ("--mesh", "none")),
            (("--communicator", "mpi"), ("--communicator mpi",)),
            (("--layers", "0"), ("--layers", "0")),
            (("--attention", "vertical-slash:100,200"), ("recorded indices", "layer 0, head 0")),
            (("--attention", "block-sparse:4"), ("block-sparse", "key blocks")),
            (("--ranks", "8", *self.replay(30, 400)), ("400", "208 tokens")),
            ((*self.replay(301, 200),), ("301", "300 keys")),
            (("--attention", "nonsense"), ("nonsense",)),
        ):
            with self.subTest(options=options):
                result = self.bench(*options)
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                for word in words:
                    self.assertIn(word, result.stderr)
        with self.subTest("beyond the model's positions"):
            result = self.bench(tokens=5000)
            self.assertEqual(result.returncode, 2)
            self.assertIn("4096", result.stderr)
        with self.subTest("several processes"):
            result = self.bench(ranks=2)
            self.assertNotEqual(result.returncode, 0)
            self.assertIn("one rank", result.stderr)


if __name__ == "__main__":
    support.main()
