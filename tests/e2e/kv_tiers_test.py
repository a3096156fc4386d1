#!/usr/bin/env python3
"""A prompt of 262,144 tokens on a tiny checkpoint: every tier of the KV store gives the same cache, and its plan."""

import numpy
import support
from support import Service, run, some_tokens, write_model

import longfill

NUM_TOKENS = 1 << 18
DIMS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


class KvTiers(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.model = write_model(self.tmp / "model", max_position_embeddings=NUM_TOKENS, **DIMS)
        (self.tmp / "caches").mkdir()
        # Rings and budgets in bytes of one of two ranks; its cache has 2 * 2 * 131072 * head_dim * 4.
        self.tiers = ["host", "pageable", f"file:{self.tmp / 'caches'}", "device:128MB", "reader:8MiB"]

    def test_every_tier_gives_the_same_cache_at_256k_tokens(self):
        ids = some_tokens(NUM_TOKENS)
        expected = None
        for tier in self.tiers:
            with self.subTest(tier):
                with Service(self.model, "--kv-memory", tier, ranks=2) as service, \
                        longfill.Client(service.target) as client:
                    for _ in range(2):  # the memory of the first prompt is the second one's
                        got = client.prefill(ids, attention="a-shape:64,256", kv_dtype="bfloat16")
                self.assertEqual(got.manifest.num_tokens, NUM_TOKENS)
                expected = got.kv if expected is None else expected
                for pair, expected_pair in zip(got.kv, expected, strict=True):
                    for array, expected_array in zip(pair, expected_pair):
                        numpy.testing.assert_array_equal(array, expected_array)

    def test_inspect_counts_every_tier(self):
        for tier in self.tiers:
            with self.subTest(tier):
                result = run("inspect", "--model", self.model, "--tokens", NUM_TOKENS, "--mesh", "sequence=2,head=1",
                             "--kv-memory", tier)
                self.assertEqual(result.returncode, 0, result.stderr)
                served = result.stdout.split(f"serve --kv-memory {tier}")[1]
                store = int(next(line for line in served.splitlines() if "KV store" in line).split()[2])
                budget = [int(line.split()[4]) for line in served.splitlines() if "budget of KV caches" in line]
                if tier.startswith("device"):
                    self.assertEqual((store, budget), (0, [128_000_000]))
                elif tier.startswith("reader"):
                    self.assertEqual((store, budget), (8 << 20, []))
                elif tier.startswith("file"):
                    self.assertEqual((store, budget), (0, []))
                else:
                    self.assertEqual(budget, [])
                    self.assertGreater(store, 8 << 20)

    def test_a_prompt_beyond_the_budget_is_refused_before_work(self):
        with Service(self.model, "--kv-memory", "device:1MB") as service, longfill.Client(service.target) as client:
            with self.assertRaises(longfill.PrefillError) as caught:
                client.prefill(some_tokens(NUM_TOKENS), attention="a-shape:64,256")
            self.assertEqual(caught.exception.code.name, "RESOURCE_EXHAUSTED")
            self.assertIn("1000000 are kept for KV caches on the device", caught.exception.message)
            self.assertGreater(caught.exception.max_tokens, 0)
            fits = client.prefill(some_tokens(caught.exception.max_tokens), attention="a-shape:64,256")
            self.assertEqual(fits.manifest.num_tokens, caught.exception.max_tokens)


if __name__ == "__main__":
    support.main()
