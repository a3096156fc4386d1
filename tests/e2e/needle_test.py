#!/usr/bin/env python3
"""The needle test through the service: what dense attention finds, the sparse patterns find as well.

    needle_test.py [--long]    4 prompts of 8,192 and 1 of 32,768 tokens; with --long 20 and 4, and the spread layout

Answer token one is appended to each prompt, so that the last two positions predict both answer tokens.
"""

import json
import subprocess
import sys

import numpy
import support
from support import SHARED_DIR, Service

import longfill

LONG = "--long" in sys.argv
PROMPTS = {8192: 20 if LONG else 4, 32768: 4 if LONG else 1}
SPREAD_PROMPTS = {8192: 8, 32768: 2} if LONG else {8192: 1}
# Patterns that answer questions anywhere in the prompt, and the density that they may have.
BLOCK_SHARES = {
    8192: {"block-share:4,0.1": 0.3, "block-share:4,0.2": 0.2},
    32768: {"block-share:4,0.1": 0.09, "block-share:4,0.2": 0.06},
}
# KL(dense || sparse) of eval/README.md, by (tokens, pattern); patterns that it has no figure for are held to FLOOR.
REFERENCE_KL = {
    (8192, "1000,6096"): 0.0, (8192, "3500,100"): 0.0,
    (32768, "1000,6096"): 0.0002, (32768, "3500,100"): 0.0006, (32768, "500,700"): 0.0007,
}
BUDGETS = ["1000,6096", "3500,100", "500,700"]
FLOOR = 0.002


def log_softmax(logits):
    logits = logits.astype(numpy.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(axis=-1, keepdims=True))


def kl(dense, sparse):
    """KL(dense || sparse), summed over the vocabulary, averaged over positions."""
    p, q = log_softmax(dense), log_softmax(sparse)
    return float((numpy.exp(p) * (p - q)).sum(axis=-1).mean())


class Needle(support.TemporaryDirectoryTest):
    def make_prompts(self, num_tokens, count, *options):
        out = self.tmp / f"needle-{num_tokens}"
        subprocess.run([sys.executable, SHARED_DIR / "eval" / "needle.py", "--tokens", str(num_tokens), "--count", str(count),
                        "--seed", "1", "--out", out, *options], check=True)
        answers = json.loads((out / "answers.json").read_text())
        return [(numpy.fromfile(out / a["file"], dtype="<i4").tolist(), a) for a in answers]

    def test_sparse_patterns_find_what_dense_finds(self):
        with Service(support.needle_model(), ranks=2) as service, longfill.Client(service.target) as client:
            for num_tokens, count in PROMPTS.items():
                prompts = self.make_prompts(num_tokens, count)
                passed, divergence = self.run_prompts(client, prompts)
                print(f"{num_tokens} tokens, dense: {sum(passed['dense'])} of {count} passed", flush=True)
                self.assertEqual(passed["dense"], [True] * count, f"{num_tokens} tokens: dense passes all of the published prompts")
                for budget in BUDGETS:
                    limit = max(1.5 * REFERENCE_KL.get((num_tokens, budget), 0.0), FLOOR)
                    mean = float(numpy.mean(divergence[budget]))
                    print(f"{num_tokens} tokens, vertical-slash {budget}: {sum(passed[budget])} of {count} passed, KL {mean:.6f}",
                          flush=True)
                    with self.subTest(tokens=num_tokens, budget=budget):
                        self.assertEqual(passed[budget], passed["dense"])
                        self.assertLessEqual(mean, limit)

    def run_prompts(self, client, prompts):
        """({pattern: [passed]}, {budget: [KL to dense]})."""
        passed = {name: [] for name in ["dense", *BUDGETS]}
        divergence = {budget: [] for budget in BUDGETS}
        for ids, answer in prompts:
            extended = [*ids, answer["answer"][0]]
            positions = [len(extended) - 2, len(extended) - 1]
            dense = None
            for name in passed:
                attention = name if name == "dense" else f"vertical-slash:{name}"
                logits = client.prefill(extended, attention=attention, logits=positions, kv="drop").logits
                passed[name].append(logits.argmax(axis=-1).tolist() == answer["answer"])
                if name == "dense":
                    dense = logits
                else:
                    divergence[name].append(kl(dense, logits))
        return passed, divergence

    def test_block_share_answers_questions_anywhere(self):
        with Service(support.needle_model(), ranks=2) as service, longfill.Client(service.target) as client:
            for num_tokens, count in SPREAD_PROMPTS.items():
                prompts = self.make_prompts(num_tokens, count, "--layout", "spread")
                dense, _, dense_logits = self.ask(client, prompts, "dense")
                self.assertGreaterEqual(sum(dense), 0.99 * len(dense))
                for pattern, most_density in BLOCK_SHARES[num_tokens].items():
                    answered, density, logits = self.ask(client, prompts, pattern)
                    divergence = float(numpy.mean([kl(p, q) for p, q in zip(dense_logits, logits, strict=True)]))
                    kept = [share for share, wanted in zip(answered, dense, strict=True) if wanted]
                    print(f"{num_tokens} tokens, spread layout, {pattern}: {sum(kept)} of the {len(kept)} questions that dense "
                          f"answers (of {len(dense)}), density {density:.4f}, KL {divergence:.6f}", flush=True)
                    with self.subTest(tokens=num_tokens, pattern=pattern):
                        self.assertGreaterEqual(sum(kept), 0.99 * len(kept))
                        self.assertLessEqual(density, most_density)

    def ask(self, client, prompts, attention):
        """([whether a question is answered], mean density, [logits of a prompt's questions])."""
        answered, densities, all_logits = [], [], []
        for ids, answer in prompts:
            questions = answer["questions"]
            positions = [p for q in questions for p in (q["position"], q["position"] + 1)]
            result = client.prefill(ids, attention=attention, logits=positions, kv="drop")
            best = result.logits.argmax(axis=-1).reshape(-1, 2).tolist()
            answered += [pair == q["answer"] for pair, q in zip(best, questions, strict=True)]
            densities.append(result.figures["density"])
            all_logits.append(result.logits)
        return answered, float(numpy.mean(densities)), all_logits


if __name__ == "__main__":
    if LONG:
        sys.argv.remove("--long")
    support.main()
