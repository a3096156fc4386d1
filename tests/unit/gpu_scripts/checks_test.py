#!/usr/bin/env python3
"""What is no number fails its check, and one broken part or reference does not hide the others."""

import json
import math
import pathlib
import sys
import tempfile
import types
import unittest
from unittest import mock

import numpy

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import oracle  # noqa: E402
import section_attention  # noqa: E402
import section_goldens  # noqa: E402
import section_meshes  # noqa: E402
import section_sanitizer  # noqa: E402
import section_service  # noqa: E402
import section_spread  # noqa: E402
from checks import Checks, error_ratio  # noqa: E402

NAN, INF = math.nan, math.inf


class ChecksTest(unittest.TestCase):
    """Test case with `self.checks`, and outcomes() of what it was told."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="longfill-checks-")
        self.addCleanup(directory.cleanup)
        self.tmp = pathlib.Path(directory.name)
        self.lines = self.tmp / "lines"
        self.checks = Checks("test", self.lines)
        self.addCleanup(lambda: self.checks._file.close())  # the section's process does it by ending

    def outcomes(self):
        return {r["check"]: r["outcome"] for r in map(json.loads, self.lines.read_text().splitlines())}


class Numbers(ChecksTest):
    def test_errors_that_are_no_number_are_infinite(self):
        want = numpy.array([[3.0, 4.0], [0.0, 0.0]])
        for measure in (oracle.norm_error, oracle.max_error):
            for bad in (NAN, INF, -INF):
                got = want.copy()
                got[1, 0] = bad
                self.assertEqual(measure(got.astype(numpy.float32), want), INF)
                self.assertEqual(measure(want, got), INF)
            self.assertEqual(measure(want, want), 0)
        self.assertAlmostEqual(oracle.norm_error(want + 1, want), 2 / 5)
        self.assertAlmostEqual(oracle.max_error(want + 1, want), 1 / 4)

    def test_a_ratio_of_what_is_no_number_is_infinite(self):
        self.assertEqual(error_ratio(3, 2), 1.5)
        self.assertEqual(error_ratio(0.0, 0.0), 0)
        self.assertGreater(error_ratio(1e-9, 0.0), 1e100)
        for error, reference in ((None, 1), (1, None), (NAN, 1), (1, NAN), (INF, 1), (1, INF), (INF, INF)):
            self.assertEqual(error_ratio(error, reference), INF)

    def test_infinity_is_no_bound(self):
        for name, value, bound in (("nan", NAN, 1), ("inf", INF, INF), ("one", 1, INF), ("bound nan", 1, NAN), ("right", 1, 1)):
            self.checks.at_most(name, value, bound)
        self.assertEqual({name for name, outcome in self.outcomes().items() if outcome == "pass"}, {"right"})

    def test_the_worst_tensor_is_the_one_with_nan(self):
        want = {"a": numpy.ones(3), "b": numpy.ones(3), "c": numpy.ones(3)}
        low = {name: array * 1.01 for name, array in want.items()}
        for name in want:
            got = {other: array * 1.001 for other, array in want.items()} | {name: numpy.array([1, NAN, 1])}
            self.assertEqual(section_goldens.worst_ratio(got, want, low, oracle.max_error), (INF, name))
        broken = low | {"b": numpy.full(3, NAN)}
        self.assertEqual(section_goldens.worst_ratio(want, want, broken, oracle.norm_error), (INF, "b"))

    def test_a_mesh_that_gives_nan_fails(self):
        figures = {"ranks": 2, "communicator": "c", "covered_pairs": 10}
        one = {"logits": numpy.ones(3), "layer.0.key": numpy.ones(3)}
        for name in one:
            results = iter([(one, figures), (one | {name: numpy.array([1, NAN, 1])}, figures)])
            with mock.patch.object(section_service, "prefill", lambda *_, results=results, **__: next(results)):
                section_service.check_meshes(None, self.checks, None, [1] * 40, name, dict.fromkeys(one, 0.1), [(2, "m")])
            self.assertEqual(self.outcomes()[f"2 ranks, m, {name}: against 1 rank, times bfloat16's error"], "FAIL")


class Attention(ChecksTest):
    def case(self, **check):
        timing = {"median": 1.0, "min": 1.0, "max": 1.0}
        right = {"max_error": 1.0, "naive_max_error": 1.0, "rms_error": 1.0, "naive_rms_error": 1.0, "rows": 1, "passed": True,
                 "bits_equal": True, "bit_runs": 1, "compared_heads": 1, "lse_error": 0.0, "lse_limit": 1.0}
        return {"name": "dense", "tokens": 5, "head_dim": 64, "check": right | check, "sum_seconds": timing, "attention_seconds": timing,
                "covered": {"pairs": 1, "tflops": 1.0}, "published": {"pairs": 1}, "computed": {"pairs": 1}, "effective_tflops": 1.0}

    def run_parts(self, cases):
        report = types.SimpleNamespace(stdout=json.dumps({"cases": cases}), stderr="", returncode=1)
        pack = types.SimpleNamespace(device="cpu", path=lambda *parts: pathlib.Path(*parts), run=lambda *_, **__: report)
        arguments = types.SimpleNamespace(small=True, reference_tflops=None, attention="index,dense,parity", figures=None)
        section_attention.run(pack, self.checks, arguments)
        return self.outcomes()

    def test_an_answer_without_numbers_is_a_failed_check_and_the_others_go_on(self):
        wrong = self.case(max_error=None, rms_error=None, lse_error=None, passed=False) | {"name": "wrong"}
        outcomes = self.run_parts([wrong, self.case(), self.case(naive_max_error=None) | {"name": "naive"}])
        self.assertEqual(outcomes["dense, wrong, 5 tokens, D 64: error over the naive one"], "FAIL")
        self.assertEqual(outcomes["dense, wrong, 5 tokens, D 64: right"], "FAIL")
        self.assertEqual(outcomes["dense, naive, 5 tokens, D 64: error over the naive one"], "FAIL")
        self.assertEqual(outcomes["dense, dense, 5 tokens, D 64: error over the naive one"], "pass")
        self.assertNotIn("part dense came to an end", outcomes)

    def test_a_part_that_breaks_is_one_failed_check(self):
        outcomes = self.run_parts([self.case()])  # which is no case of the index
        self.assertEqual([name for name in outcomes if "came to an end" in name], ["part index came to an end"])
        self.assertEqual(outcomes["dense, dense, 5 tokens, D 64: right"], "pass")
        self.assertEqual(outcomes["parity: covered pairs less published ones"], "pass")


class NothingToCompare(ChecksTest):
    def test_a_length_at_which_dense_answers_nothing_fails(self):
        folder = self.tmp / "spread-5"
        folder.mkdir()
        (folder / "answers.json").write_text(json.dumps([{"file": "f", "questions": []}]))
        pack = types.SimpleNamespace(work=self.tmp, path=lambda *parts: pathlib.Path(*parts))
        asked = []

        def ask(_, __, attention):
            asked.append(attention)
            return [(False, None)], {"attention_seconds": 1.0}

        with mock.patch.object(section_spread.subprocess, "run"), mock.patch.object(section_spread, "ask", ask):
            section_spread.check_length(pack, self.checks, 5, 1)
        self.assertEqual(self.outcomes(), {"5 tokens, spread, dense: questions answered": "FAIL"})
        self.assertEqual(asked, ["dense"])

    def test_meshes_that_agree_on_wrong_answers_fail(self):
        logits = [numpy.eye(2, 5)]  # ranks 0 and 1 first
        for answer, outcome in (([3, 4], "FAIL"), ([0, 1], "pass")):
            with mock.patch.object(section_meshes, "prefill", lambda *_, **__: (logits, 1.0)):
                section_meshes.check_needles(None, self.checks, [(None, None, answer)], 5, [(2, "m")])
            self.assertEqual(self.outcomes()["needle, 5 tokens, 1 rank: prompts passed"], outcome)

    def test_a_sanitizer_under_which_no_test_passed_fails(self):
        pack = types.SimpleNamespace(work=self.tmp, environment=dict, command=lambda *_: [])
        for suite, text, outcome in (("One", "", "FAIL"), ("Two", "[       OK ] Two.a (1 ms)\n", "pass")):
            def run_with_limit(_, out, __, text=text):
                out.write(text + "[  PASSED  ] tests.\n========= ERROR SUMMARY: 0 errors\n")
                return 0

            with mock.patch.object(section_sanitizer, "run_with_limit", run_with_limit):
                section_sanitizer.sanitize(pack, self.checks, "tool", "memcheck", f"{suite}.*/x")
            self.assertEqual(self.outcomes()[f"memcheck, {suite}: tests that passed"], outcome)
            self.assertEqual(self.outcomes()[f"memcheck, {suite}: errors"], "pass")


if __name__ == "__main__":
    unittest.main()
