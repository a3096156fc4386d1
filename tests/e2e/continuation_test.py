#!/usr/bin/env python3
"""transformers goes on from our KV cache as from its own: 64 greedy tokens, float32, dense, through the service."""

import unittest

import support
import torch
import transformers
from support import SHARED_DIR, Service

import longfill

NUM_TOKENS = 64
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def transformers_alone(model, ids):
    cache = transformers.DynamicCache()
    with torch.no_grad():
        logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits
    return support.greedy_continuation(model, cache, int(logits[0, -1].argmax()), NUM_TOKENS)


class Continuation(unittest.TestCase):
    def check(self, directory, ids, **service_options):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, torch_dtype=torch.float32, attn_implementation="eager").eval()
        expected = transformers_alone(model, ids)
        with Service(directory, **service_options) as service, longfill.Client(service.target) as client:
            prefilled = client.prefill(ids, attention="dense")
        cache = prefilled.to_dynamic_cache(model.config)
        self.assertEqual(cache.get_seq_length(), len(ids))
        got = support.greedy_continuation(model, cache, prefilled.next_token(), NUM_TOKENS)
        self.assertEqual(got, expected)

    def test_smollm2(self):
        directory = support.smollm2_model()
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        text = (support.ROOT / "tests" / "golden" / "README.md").read_text(encoding="utf-8")
        message = [{"role": "user", "content": text + "\n\nWhat does this document describe?"}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
        self.check(directory, ids, ranks=4, mesh="sequence=2,head=2")

    def test_needle_20m(self):
        directory = support.needle_model()
        filler = (SHARED_DIR / "eval" / "filler.u16").read_bytes()[:2 * 2000]
        ids = memoryview(filler).cast("H").tolist()
        self.check(directory, ids, ranks=2, mesh="head=2")


if __name__ == "__main__":
    support.main()
