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
SPREAD_PROMPTS = 8 if LONG else 1
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
                for budget in BUDGETS:
                    limit = max(1.5 * REFERENCE_KL.get((num_tokens, budget), 0.0), FLOOR)
                    mean = float(numpy.mean(divergence[budget]))
                    print(f"{num_tokens} tokens, vertical-slash {budget}: {sum(passed[budget])} of {count} passed, KL {mean:.6f}",
                          flush=True)
                    with self.subTest(tokens=num_tokens, budget=budget):
                        lost = [i for i in range(count) if passed["dense"][i] and not passed[budget][i]]
                        self.assertEqual(lost, [], "prompts that dense passes")
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

    def test_dense_answers_questions_anywhere(self):
        right = asked = 0
        with Service(support.needle_model(), ranks=2) as service, longfill.Client(service.target) as client:
            for ids, answer in self.make_prompts(8192, SPREAD_PROMPTS, "--layout", "spread"):
                questions = answer["questions"]
                positions = [p for q in questions for p in (q["position"], q["position"] + 1)]
                logits = client.prefill(ids, attention="dense", logits=positions, kv="drop").logits
                best = logits.argmax(axis=-1).reshape(-1, 2).tolist()
                right += sum(pair == q["answer"] for pair, q in zip(best, questions, strict=True))
                asked += len(questions)
        print(f"8192 tokens, spread layout, dense: {right} of {asked} questions", flush=True)
        self.assertGreaterEqual(right, 0.99 * asked)


if __name__ == "__main__":
    if LONG:
        sys.argv.remove("--long")
    support.main()
