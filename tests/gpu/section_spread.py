"""Questions anywhere: what dense attention answers all through a prompt, block-share answers, at low density."""

import json
import shutil
import subprocess
import sys

import numpy
import oracle
from section_needle import MODEL, read_logits

DEFAULT_PROMPTS = "32768=2,131072=2,524288=1"
SMALL_PROMPTS = "2048=1"
MAX_DENSITY = {32768: 0.08, 131072: 0.03, 524288: 0.015}
PATTERNS = ("block-share:4,0.1", "block-share:4,0.2")


def run(pack, checks, arguments):
    pack.use_python_packages()
    for text in (arguments.spread or (SMALL_PROMPTS if arguments.small else DEFAULT_PROMPTS)).split(","):
        num_tokens, _, count = text.partition("=")
        check_length(pack, checks, int(num_tokens), int(count))


def check_length(pack, checks, num_tokens, count):
    out = pack.work / f"spread-{num_tokens}"
    subprocess.run([sys.executable, str(pack.path("eval", "needle.py")), "--tokens", str(num_tokens), "--count", str(count),
                    "--seed", "3", "--layout", "spread", "--out", str(out)], check=True)
    prompts = [(out / a["file"], a["questions"]) for a in json.loads((out / "answers.json").read_text(encoding="utf-8"))]
    name = f"{num_tokens} tokens, spread"
    dense, figures = ask(pack, prompts, "dense")
    answered = [i for i, (right, _) in enumerate(dense) if right]
    checks.at_least(f"{name}, dense: questions answered", len(answered), 1,
                    f"of {len(dense)}; {figures['attention_seconds']:.3f} s of attention a prompt")
    if not answered:  # there is nothing to compare
        shutil.rmtree(out)
        return
    for pattern in PATTERNS:
        share, figures = ask(pack, prompts, pattern)
        kept = sum(share[i][0] for i in answered)
        divergence = float(numpy.mean([oracle.divergence(d, s) for (_, d), (_, s) in zip(dense, share)]))
        checks.at_least(f"{name}, {pattern}: share of the questions that dense answers", kept / len(answered), 0.99,
                        f"{kept} of {len(answered)}, KL {divergence:.6f}")
        seconds = f"index {figures['index_seconds']:.3f} s, attention {figures['attention_seconds']:.3f} s a prompt"
        if num_tokens in MAX_DENSITY:
            checks.at_most(f"{name}, {pattern}: density", figures["density"], MAX_DENSITY[num_tokens], seconds)
        else:
            checks.info(f"{name}, {pattern}: density", figures["density"], seconds)
    shutil.rmtree(out)


def ask(pack, prompts, attention):
    """([(whether a question is answered, its logits [2, vocab])], mean figures of a prompt)."""
    out = pack.work / "spread-out"
    answers, all_figures = [], []
    for path, questions in prompts:
        positions = [p for q in questions for p in (q["position"], q["position"] + 1)]
        arguments = ["prefill", "--model", pack.path("models", MODEL), "--out", out, "--device", pack.device, "--attention",
                     attention, "--kv", "discard", "--logits", ",".join(map(str, positions)), "--json", "--tokens", path]
        all_figures.append(json.loads(pack.run("longfill", *arguments).stdout))
        logits = read_logits(out).reshape(len(questions), 2, -1)
        answers += [(two.argmax(axis=-1).tolist() == q["answer"], two) for two, q in zip(logits, questions)]
        shutil.rmtree(out)
    keys = ("index_seconds", "attention_seconds", "density")
    return answers, {key: float(numpy.mean([f[key] for f in all_figures])) for key in keys}
