#!/usr/bin/env python3
"""`longfill eval` as a user runs it: needle-20m at 8,192 tokens, against what a client measures; stopping, going on, bad usage."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy
import support
from needle_test import kl
from support import LONGFILL, SMOLLM2, Service

import longfill
from longfill.eval import tasks
from longfill.eval.tokens import TextTokenizer

ENVIRONMENT = support.ENVIRONMENT | {"LONGFILL_PYTHON": sys.executable}
SPARSE = "vertical-slash:1000,6096"


def start(*arguments, environment=ENVIRONMENT):
    return subprocess.Popen([str(LONGFILL), "eval", *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment)


def run(*arguments, environment=ENVIRONMENT):
    """(exit code, standard output, standard error)."""
    with start(*arguments, environment=environment) as process:
        try:
            out, err = process.communicate(timeout=600)
        except BaseException:
            process.send_signal(signal.SIGINT)  # its service goes with it
            raise
    return process.returncode, out, err


class Eval(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.out = self.tmp / "out"

    def records(self):
        return [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]

    def summary(self):
        return {(row["task"], row["length"], row["method"]): row for row in json.loads((self.out / "summary.json").read_text())}

    def test_needles_are_found_and_a_second_run_finds_the_results(self):
        arguments = ["--model", support.needle_model(), "--out", self.out, "--length", "8K", "--task", "niah-end", "--depths", 1,
                     "--attention", SPARSE]
        code, table, errors = run(*arguments)
        self.assertEqual(code, 0, errors)
        rows = self.summary()
        for method in ("dense", SPARSE):
            row = rows["niah-end", 8192, method]
            self.assertEqual((row["score"], row["kept"], row["samples"]), (1.0, 1.0, 1))
            self.assertIn(f"| {method} | 1 | 1 | 1.000 | 1.000 |", table)
        self.assertLess(rows["niah-end", 8192, SPARSE]["kl"], 0.002)
        self.assertLess(rows["niah-end", 8192, SPARSE]["density"], 1)
        self.assertEqual(rows["niah-end", 8192, "dense"]["density"], 1)
        self.assertEqual({p.name for p in self.out.glob("*.png")}, {"grid-niah-end.png", "scores.png", "costs.png"})
        first = self.records()
        self.assertEqual([r["method"] for r in first], ["dense", SPARSE])
        code, again, errors = run(*arguments)
        self.assertEqual((code, again, self.records()), (0, table, first), errors)

    def test_figures_are_what_a_client_measures(self):
        model, text = support.needle_model(), self.tmp / "text.txt"
        text.write_text("\n".join((support.ROOT / name).read_text() for name in ("README.md", "deploy/README.md", "tests/README.md")))
        names = ["niah-spread", "perplexity", "ruler:vt"]
        with Service(model) as service:
            code, table, errors = run("--model", model, "--out", self.out, "--target", service.target, "--length", "2K", "--task",
                                      ",".join(names), "--attention", "a-shape:64,256", "--text", text, "--windows", 4, "--window", 8,
                                      "--no-plots")
            self.assertEqual(code, 0, errors)
            settings = tasks.Settings(model, (2048,), text=text, windows=4, window=8)
            samples = [build() for build in tasks.plan(names, tasks.Source(settings, TextTokenizer(model), 1000))]
            with longfill.Client(service.target) as client:
                logits = [[client.prefill(s.ids, attention=method, logits=s.positions(), kv="drop").logits
                           for method in ("dense", "a-shape:64,256")] for s in samples]
        self.assertIn("ruler:vt, 2,048 tokens: dense fails, nothing to compare", table)
        rows = self.summary()
        for sample, (dense, sparse) in zip(samples, logits, strict=True):
            row = rows[sample.task, 2048, "a-shape:64,256"]
            self.assertAlmostEqual(row["kl"], kl(dense, sparse), delta=1e-9 + 1e-6 * row["kl"])
            self.assertEqual(row["agreement"], float((dense.argmax(axis=-1) == sparse.argmax(axis=-1)).mean()))
            best, begin, right = sparse.argmax(axis=-1), 0, []
            for question in sample.questions:
                right.append(best[begin : begin + len(question.answer)].tolist() == list(question.answer))
                begin += len(question.answer)
            self.assertEqual(row["score"], float(numpy.mean(right)))
        self.assertEqual(rows["niah-spread", 2048, "dense"]["score"], 1.0)
        self.assertGreater(rows["perplexity", 2048, "a-shape:64,256"]["perplexity"], 1)

    def test_a_run_that_is_interrupted_leaves_no_service_and_goes_on(self):
        arguments = ["--model", support.needle_model(), "--out", self.out, "--length", "1K", "--task", "niah-end", "--depths", 4,
                     "--attention", "a-shape:64,256", "--ranks", 2, "--no-plots"]
        with start(*arguments) as process:
            results = self.out / "results.jsonl"
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                if results.is_file() and results.read_bytes().count(b"\n") >= 2:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)  # as Ctrl-C
            try:
                _, errors = process.communicate(timeout=120)
            except BaseException:
                process.send_signal(signal.SIGTERM)  # at once
                raise
        self.assertEqual(process.returncode, 1, errors)
        self.assertIn("interrupted", errors.splitlines()[-1])
        configuration = json.loads((self.out / "service.log").read_text().splitlines()[0])
        self.assertFalse(pathlib.Path(f"/proc/{configuration['pid']}").exists(), "the service lives on")
        before = self.records()
        self.assertTrue(2 <= len(before) < 8, len(before))
        code, _, errors = run(*arguments)
        self.assertEqual(code, 0, errors)
        after = self.records()
        self.assertEqual(after[: len(before)], before)
        self.assertEqual(len({(r["sample"], r["method"]) for r in after}), 8)
        self.assertEqual(len(after), 8)

    def test_a_model_with_another_tokenizer(self):
        if not (SMOLLM2 / "tokenizer.json").is_file():
            self.skipTest(f"{SMOLLM2} is not there; deploy/demo.sh makes it")
        code, _, errors = run("--model", SMOLLM2, "--out", self.out, "--length", "1K", "--task", "niah-spread", "--attention",
                              "a-shape:64,256", "--no-plots")
        self.assertEqual(code, 0, errors)
        dense, sparse = self.records()
        self.assertEqual((dense["tokens"], dense["kl"], dense["agreement"]), (1024, 0.0, 1.0))
        self.assertGreater(sparse["kl"], 0)


class Refusals(support.TemporaryDirectoryTest):
    def refused(self, word, *arguments, code=2, environment=ENVIRONMENT):
        got, out, errors = run(*arguments, "--out", self.tmp / "out", "--no-plots", environment=environment)
        self.assertEqual((got, out), (code, ""), errors)
        self.assertEqual(len(errors.splitlines()), 1, errors)
        self.assertTrue(errors.startswith("longfill: eval: "), errors)
        self.assertIn(word, errors)

    def test_what_cannot_be_is_named_in_one_line(self):
        model = support.needle_model()
        whole = ["--model", model, "--length", "2K"]
        self.refused("--length 2097152: the model takes 1048576 tokens", "--model", model, "--length", "2M")
        self.refused("--attention vertical-slash:x", *whole, "--attention", "vertical-slash:x")
        self.refused("niah-middle", *whole, "--task", "niah-middle")
        self.refused("the service does not answer", *whole, "--target", "127.0.0.1:1", code=1)
        code, _, errors = run(*whole, "--out", self.tmp / "out", "--no-plots", "--", "--bogus")
        self.assertEqual(code, 2)
        self.assertIn("--bogus", errors)

    def test_a_python_that_cannot_is_named(self):
        self.refused("cannot run no-such-python", environment=ENVIRONMENT | {"LONGFILL_PYTHON": "no-such-python"})
        bare = self.tmp / "bare"
        bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        bare.chmod(0o755)
        self.refused("there is no module", environment=ENVIRONMENT | {"LONGFILL_PYTHON": str(bare)})

    def test_ranks_are_started_by_the_evaluation(self):
        result = support.run("eval", "--help", ranks=2)
        self.assertEqual(result.returncode, 2)
        self.assertEqual(result.stderr.count("--ranks N instead of mpirun"), 1, result.stderr)

    def test_help_lists_the_options(self):
        code, out, _ = run("--help")
        self.assertEqual(code, 0)
        for option in ("--task", "--attention", "--report"):
            self.assertIn(option, out)


if __name__ == "__main__":
    support.main()
