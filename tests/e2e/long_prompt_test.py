#!/usr/bin/env python3
"""A prompt of 1,048,576 tokens on a tiny checkpoint, from submit to the KV cache read back."""

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


if __name__ == "__main__":
    support.main()
