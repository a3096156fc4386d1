#!/usr/bin/env python3
"""`longfill bench attention`, `index` and `shares` on the CPU: what they print, check and refuse."""

import json

import support
from bench_test import tile_pairs, write_recording
from support import run

from longfill import safetensors_io

SHAPE = ("--q-heads", "2", "--kv-heads", "1", "--head-dim", "32")
QUICK = ("--repeat", "2", "--bit-runs", "2", "--sample-rows", "300")
TOKENS = 1000


class BenchAttention(support.TemporaryDirectoryTest):
    def bench(self, *options, tokens=TOKENS, shape=SHAPE):
        return run("bench", "attention", "--tokens", tokens, *shape, *QUICK, *options)

    def cases(self, *options, **more):
        result = self.bench(*options, "--json", **more)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)["cases"]

    def test_every_case_is_timed_counted_and_checked(self):
        cases = self.cases("--attention", "dense", "--attention", "a-shape:16,100", "--attention", "vertical-slash:40,60",
                           "--attention", "random-blocks:50,128x64", "--reference-tflops", "2", tokens="500,1000")
        self.assertEqual([(c["name"].split(":")[0], c["tokens"]) for c in cases],
                         [(name, n) for n in (500, 1000) for name in ("dense", "a-shape", "vertical-slash", "random-blocks")])
        for case in cases:
            with self.subTest(case["name"]):
                self.assertTrue(case["check"]["passed"])
                self.assertGreaterEqual(case["check"]["rows"], 300)
                self.assertEqual((case["check"]["bit_runs"], case["check"]["compared_heads"]), (2, 2))
                self.assertLessEqual(case["covered"]["pairs"], case["computed"]["pairs"])
                self.assertAlmostEqual(case["effective_ratio"], case["effective_tflops"] / 2)
                self.assertEqual("index_seconds" in case, case["name"].startswith("vertical"))
                seconds = case["attention_seconds"]
                self.assertAlmostEqual(case["covered"]["tflops"],
                                       4e-12 * 32 * case["covered"]["pairs"] / seconds["median"], places=6)
        self.assertEqual(cases[0]["covered"], cases[0]["covered"] | {"pairs": 2 * 500 * 501 // 2, "density": 1.0})

    def test_recorded_selections_stand_for_their_heads(self):
        recording = write_recording(self.tmp / "recorded.safetensors", tokens=TOKENS)
        case, = self.cases("--attention", "vertical-slash:300,50", "--indices", recording, "--heads", "8")
        self.assertEqual((case["heads"], case["calls"], case["selections"]), (8, 4, str(recording)))
        vertical, slash = (safetensors_io.read(recording)[name][1] for name in ("vertical", "slash"))
        places = [(head // 3 % 2, head % 3) for head in range(8)]  # 2 layers of 3 heads, and around
        pairs = [tile_pairs(vertical[place][:300], slash[place][:50], TOKENS) for place in places]
        self.assertEqual(case["covered"]["pairs"], sum(pairs))
        parity, = self.cases("--attention", "vertical-slash:300,50", "--indices", recording, "--coverage", "parity")
        self.assertEqual(parity["covered"]["pairs"], parity["published"]["pairs"])
        with self.subTest("a shorter prompt takes them scaled"):
            shorter, = self.cases("--attention", "vertical-slash:30,50", "--indices", recording, tokens=500)
            self.assertTrue(shorter["check"]["passed"])

    def test_the_most_uneven_heads_of_a_pattern_file_share_a_call(self):
        recording = write_recording(self.tmp / "recorded.safetensors", tokens=TOKENS)
        even = {str(h): ["stream_llm", 16, 64, 1] for h in range(32)}
        uneven = even | {"6": ["vertical_and_slash", 300, 400, 1]}
        patterns = self.tmp / "patterns.json"
        patterns.write_text(json.dumps([even] * 20 + [uneven] + [even] * 11))
        options = ("--patterns", patterns, "--indices", recording)
        four, = self.cases(*options, shape=("--q-heads", "4", "--kv-heads", "1", "--head-dim", "32"))
        self.assertEqual(four["name"], "mixed, layer 20, heads 4 to 7")
        self.assertIn("index_seconds", four)
        other, = self.cases(*options, "--layer", "3")
        self.assertIn("layer 3,", other["name"])
        self.assertNotIn("index_seconds", other)

    def test_the_text_says_what_was_measured(self):
        result = self.bench("--attention", "vertical-slash:40,60", "--reference-tflops", "1")
        self.assertEqual(result.returncode, 0, result.stderr)
        for words in ("CPU", "1000 tokens", "index", "attention", "published", "covered", "computed", "effective", " R",
                      "error", "naive", "bits", "passed", "as built"):
            self.assertIn(words, result.stdout)
        self.assertNotIn("check", self.bench("--attention", "dense", "--unchecked").stdout)

    def test_what_cannot_be_measured_is_refused(self):
        recording = write_recording(self.tmp / "recorded.safetensors", tokens=TOKENS)
        replay = ("--attention", "vertical-slash:40,60", "--indices")
        for options, words in (
            ((), ("--attention", "--patterns")),
            (("--attention", "nonsense"), ("nonsense",)),
            (("--attention", "block-sparse:4"), ("random-blocks",)),
            (("--attention", "random-blocks:5,32x32"), ("random-blocks:5,32x32", "64 or 128")),
            (("--attention", "dense", "--heads", "3"), ("--heads 3", "--q-heads 2")),
            (("--attention", "dense", "--kernels", "generic"), ("--kernels generic", "cuda")),
            (("--attention", "dense", "--kernels", "fast"), ("fast",)),
            (("--attention", "dense", "--repeat", "0"), ("--repeat",)),
            (("--attention", "dense", "--reference-tflops", "-1"), ("--reference-tflops",)),
            ((*replay, self.tmp / "none"), ("none",)),
            (("--attention", "vertical-slash:301,200", "--indices", recording), ("301", "300 keys")),
            (("--patterns", "x.json"), ("--indices",)),
            (("--patterns", self.tmp / "x.json", "--indices", recording), ("x.json",)),
        ):
            with self.subTest(options=options):
                result = self.bench(*options)
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                for word in words:
                    self.assertIn(word, result.stderr)
        with self.subTest("KV heads that do not divide the query heads"):
            result = self.bench("--attention", "dense", shape=("--q-heads", "4", "--kv-heads", "3"))
            self.assertEqual(result.returncode, 2)
            self.assertIn("--kv-heads 3", result.stderr)
        with self.subTest("a prompt longer than the recorded one: both are named"):
            result = self.bench(*replay, recording, tokens=1001)
            self.assertEqual(result.returncode, 2)
            self.assertIn("1000", result.stderr)
            self.assertIn("1001", result.stderr)
        with self.subTest("ranks"):
            result = run("bench", "attention", "--tokens", "100", "--attention", "dense", ranks=2)
            self.assertEqual(result.returncode, 2)
            self.assertIn("one rank", result.stderr)


class BenchIndex(support.TemporaryDirectoryTest):
    def test_steps_and_sums_of_every_case(self):
        result = run("bench", "index", "--tokens", "700,1500", "--budget", "mixed", "--budget", "100,200", *SHAPE,
                     "--repeat", "2", "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        cases = json.loads(result.stdout)["cases"]
        self.assertEqual([(c["tokens"], c["budget"]) for c in cases],
                         [(n, budget) for n in (700, 1500) for budget in ("mixed", "100,200")])
        for case in cases:
            self.assertEqual(list(case["step_seconds"]),
                             ["row max", "row sum", "scores", "join", "cuts", "mark", "build", "count pairs"])
            self.assertLess(case["score_error"], 1e-4)
            self.assertGreater(case["index_seconds"]["median"], 0)

    def test_what_cannot_be_measured_is_refused(self):
        for options, word in ((("--budget", "some"), "some"), (("--q-heads", "3", "--kv-heads", "2"), "--q-heads 3"),
                              (("--tokens", "0"), "--tokens"), (("--kernels", "generic"), "--kernels generic")):
            with self.subTest(options=options):
                result = run("bench", "index", *options)
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                self.assertIn(word, result.stderr)


class BenchShares(support.TemporaryDirectoryTest):
    def test_every_length_is_timed_and_checked(self):
        self.check_attention("block-share:2,0.1", 3)
        self.check_attention("block-share:2,0.2,8", 10)
        self.check_attention("block-share:2,0.2,8,fp8", 10)

    def test_two_levels_are_timed_and_checked(self):
        self.check_two_levels("block-share:2,0.5,0,4")
        self.check_two_levels("block-share:2,0.5,4,4")
        self.check_two_levels("block-share:2,0.5,4,4,fp8")

    def check_two_levels(self, attention):
        options = ("--tokens", "300,9000", "--attention", attention, *SHAPE, "--repeat", "1")
        result = run("bench", "shares", *options, "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        short, long = json.loads(result.stdout)["cases"]
        for case in (short, long):  # the short one has no coarse block
            self.assertEqual(list(case["step_seconds"]), ["representatives", "coarse representatives", "selection", "lists"])
            self.assertNotIn("score_tflops", case)
        self.assertGreater(long["checked_pairs"], 0)
        text = run("bench", "shares", *options).stdout
        self.assertIn("coarse representatives", text)
        self.assertNotIn("TFLOP/s", text)

    def check_attention(self, attention, representatives):
        result = run("bench", "shares", "--tokens", "700,3000", "--attention", attention, *SHAPE, "--repeat", "2", "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        short, long = json.loads(result.stdout)["cases"]
        self.assertEqual((short["tokens"], long["tokens"]), (700, 3000))
        for case in (short, long):
            self.assertEqual(list(case["step_seconds"]), ["representatives", "selection", "lists"])
            self.assertGreater(case["index_seconds"]["median"], 0)
            self.assertGreater(case["checked_pairs"], 0)
            # One sweep of two heads: 64 rows by the representatives of each block before a row block.
            blocks = -(-case["tokens"] // 64)
            flop = 2 * 32 * 64 * 2 * representatives * blocks * (blocks - 1) // 2
            self.assertAlmostEqual(case["score_tflops"], 1e-12 * flop / case["step_seconds"]["selection"]["median"], places=9)
        self.assertGreater(short["density"], long["density"])

    def test_the_text_says_what_was_measured(self):
        result = run("bench", "shares", "--tokens", "500", *SHAPE, "--repeat", "1")
        self.assertEqual(result.returncode, 0, result.stderr)
        for words in ("CPU", "block-share:4,0.1", "500 tokens", "index of the layer", "representatives", "selection", "TFLOP/s"):
            self.assertIn(words, result.stdout)

    def test_what_cannot_be_measured_is_refused(self):
        for options, word in ((("--attention", "dense"), "dense is not block-share:R,TAU"),
                              (("--attention", "block-share:99,0.1"), "outliers 99"), (("--tokens", "0"), "--tokens"),
                              (("--q-heads", "3", "--kv-heads", "2"), "--q-heads 3")):
            with self.subTest(options=options):
                result = run("bench", "shares", *options)
                self.assertEqual((result.returncode, result.stdout), (2, ""), result.stderr)
                self.assertIn(word, result.stderr)


if __name__ == "__main__":
    support.main()
