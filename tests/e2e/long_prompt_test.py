#!/usr/bin/env python3
"""Long prompts on a tiny checkpoint: 1,048,576 tokens from submit to the KV cache read back, and ranks that hold long blocks."""

import json

import numpy
import support
from support import Service, run, some_tokens, write_model, write_tokens

import longfill

NUM_TOKENS = 1 << 20


class LongPrompt(support.TemporaryDirectoryTest):
    def test_a_million_tokens_go_from_submit_to_the_cache_read_back(self):
        model = write_model(self.tmp / "model", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                            max_position_embeddings=NUM_TOKENS)
        ids = some_tokens(NUM_TOKENS)
        tokens = write_tokens(self.tmp / "prompt.i32", ids)
        with Service(model, ranks=2) as service:
            for attention in ("a-shape:64,256", "vertical-slash:30,100"):
                with self.subTest(attention):
                    out = self.tmp / "out"
                    result = run("submit", "--target", service.target, "--tokens", tokens, "--out", out, "--overwrite",
                                 "--attention", attention, timeout=3000)
                    self.assertEqual(result.returncode, 0, result.stderr)
                    print(result.stdout, flush=True)
                    submitted = longfill.load_manifest(out)
                    self.assertEqual(submitted.manifest.num_tokens, NUM_TOKENS)
            with longfill.Client(service.target) as client:
                fetched = client.prefill(ids, attention="vertical-slash:30,100")
            for pair, expected in zip(fetched.kv, submitted.kv, strict=True):
                for array, expected_array in zip(pair, expected):
                    numpy.testing.assert_array_equal(array, expected_array)
            self.assertTrue(numpy.isfinite(fetched.logits).all())

    def test_ranks_that_are_dealt_longer_blocks_give_what_one_gives(self):
        num_tokens = 140_001
        model = write_model(self.tmp / "model", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            max_position_embeddings=NUM_TOKENS)
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(num_tokens))
        results = {}
        for mesh, deal_block in (("sequence=1", None), ("sequence=2", 2176), ("sequence=2,head=2", 896)):
            out = self.tmp / f"out-{mesh}"
            ranks = {"sequence=1": None, "sequence=2": 2}.get(mesh, 4)
            result = run("prefill", "--model", model, "--tokens", tokens, "--out", out, "--mesh", mesh, "--attention",
                         "vertical-slash:30,100", "--logits", f"0,70000,{num_tokens - 1}", ranks=ranks)
            self.assertEqual(result.returncode, 0, result.stderr)
            results[mesh] = longfill.load_manifest(out)
            if deal_block:
                first = json.loads((out / "manifest.json").read_text())["files"][0]["token_ranges"][0]
                self.assertEqual(first, [0, deal_block])
        want = results.pop("sequence=1")
        for mesh, got in results.items():
            with self.subTest(mesh):
                numpy.testing.assert_allclose(got.logits, want.logits, atol=1e-5 * numpy.abs(want.logits).max())
                for pair, expected in zip(got.to_numpy(), want.to_numpy(), strict=True):
                    for array, expected_array in zip(pair, expected):
                        numpy.testing.assert_allclose(array, expected_array, atol=1e-5 * numpy.abs(expected_array).max())


if __name__ == "__main__":
    support.main()
