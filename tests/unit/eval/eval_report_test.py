#!/usr/bin/env python3
"""Rows, tables and plots from records that are written down here."""

import contextlib
import importlib.util
import io
import json
import math
import pathlib
import subprocess
import sys
import unittest

import eval_support
import numpy

from longfill.eval import command, plots, report, results


def record(task, length, sample, method, questions, seconds=1.0, digest="d"):
    """questions: (depth, right, nll)."""
    rows = [{"depth": d, "tokens": 2, "right": right, "nll": nll, "kl": 0.0 if method == "dense" else 0.5, "agreement": 1.0}
            for d, right, nll in questions]
    figures = {"seconds": seconds, "index_seconds": 0.0, "attention_seconds": seconds / 2, "density": 1.0, "device": "d",
               "compute_dtype": "float32", "ranks": 1}
    return {"key": f"{task}{sample}{method}{digest}", "digest": digest, "task": task, "sample": sample, "length": length, "tokens": length, "method": method,
            "model": "m", "score": 0.0, "kl": 0.0, "agreement": 1.0, "nll": 0.0, "figures": figures, "questions": rows,
            "date": "2026-01-01"}


RECORDS = [
    record("niah-end", 8192, "8192/depth-0.250/0", "dense", [(0.26, True, 0.0)]),
    record("niah-end", 8192, "8192/depth-0.750/0", "dense", [(0.74, True, 0.0)], seconds=3.0),
    record("niah-end", 8192, "8192/depth-0.750/1", "dense", [(0.76, False, 0.0)], seconds=2.0),
    record("niah-end", 8192, "8192/depth-0.250/0", "block-sparse:3", [(0.26, True, 0.0)]),
    record("niah-end", 8192, "8192/depth-0.750/0", "block-sparse:3", [(0.74, False, 0.0)]),
    record("niah-end", 8192, "8192/depth-0.750/1", "block-sparse:3", [(0.76, True, 0.0)]),
    record("niah-spread", 1000, "1000/0", "dense", [(0.05, False, 0.0), (0.15, True, 0.0), (0.19, False, 0.0), (0.99, False, 0.0)]),
    record("perplexity", 1000, "1000/0", "dense", [(0.25, False, 2.0), (0.75, False, 1.0)]),
    record("perplexity", 1000, "1000/1", "dense", [(0.25, False, 4.0), (0.75, False, 1.0)]),
]


class Report(eval_support.TokenizerTest):
    def test_rows_are_means_over_questions_and_kept_is_of_what_dense_answers(self):
        rows = {(row["task"], row["method"]): row for row in report.summarise(RECORDS, 0.5)}
        self.assertEqual(list(rows), [("niah-end", "dense"), ("niah-end", "block-sparse:3"), ("niah-spread", "dense"),
                                      ("perplexity", "dense")])
        dense, sparse = rows["niah-end", "dense"], rows["niah-end", "block-sparse:3"]
        self.assertEqual((dense["samples"], dense["seconds"]), (3, 2.0))
        self.assertAlmostEqual(dense["score"], 2 / 3)
        self.assertAlmostEqual(sparse["score"], 2 / 3)
        self.assertEqual((dense["kept"], sparse["kept"], sparse["kl"]), (1.0, 0.5, 0.5))
        self.assertEqual([rows[key]["comparable"] for key in rows], [True, True, False, True])
        self.assertAlmostEqual(rows["perplexity", "dense"]["perplexity"], math.exp(2.0))

    def test_samples_of_other_runs_are_other_samples_although_their_names_are_equal(self):
        one, two = ("1000/0", "dense"), ("1000/0", "block-sparse:3")
        records = [
            record("niah-spread", 1000, *one, [(0.1, True, 0.0), (0.2, True, 0.0)], digest="seed 1"),
            record("niah-spread", 1000, *two, [(0.1, True, 0.0), (0.2, False, 0.0)], digest="seed 1"),
            record("niah-spread", 1000, *one, [(0.1, False, 0.0), (0.5, True, 0.0), (0.9, True, 0.0)], digest="seed 2"),
            record("niah-spread", 1000, *two, [(0.1, True, 0.0), (0.5, True, 0.0), (0.9, True, 0.0)], digest="seed 2"),
            record("niah-spread", 1000, *two, [(0.1, True, 0.0)], digest="seed 3"),  # dense has not run
        ]
        dense, sparse = report.summarise(records, 0.5)
        self.assertEqual((dense["samples"], dense["questions"], dense["score"]), (2, 5, 0.8))
        self.assertEqual((sparse["samples"], sparse["questions"], sparse["kept"]), (3, 6, 0.75))
        again = record("niah-spread", 1000, *two, [(0.1, True, 0.0), (0.2, True, 0.0)], digest="seed 1")
        self.assertEqual(report.latest([*records, again]), [records[0], again, *records[2:]])
        self.assertEqual(report.summarise([*records, again], 0.5)[1]["kept"], 1.0)

    def test_the_table_names_what_dense_cannot_do(self):
        text = report.table(report.summarise(RECORDS, 0.5))
        self.assertIn("niah-spread, 1,000 tokens: dense fails, nothing to compare", text)
        self.assertIn("niah-end, 8,192 tokens\n", text)
        self.assertIn("| dense | 2 | 7.3891 |", text)  # perplexity has no score

    def test_a_grid_has_a_row_for_each_depth_or_ten(self):
        lengths, grid = plots.grid_of([r for r in RECORDS if r["task"] == "niah-end" and r["method"] == "dense"])
        self.assertEqual((lengths, grid.tolist()), ([8192], [[1.0], [0.5]]))
        lengths, grid = plots.grid_of([r for r in RECORDS if r["task"] == "niah-spread"])
        self.assertEqual((lengths, grid.shape, grid[0, 0], grid[1, 0], grid[9, 0]), ([1000], (10, 1), 0.0, 0.5, 0.0))
        self.assertTrue(numpy.isnan(grid[2:9]).all())

    def test_perplexity_is_of_each_window_over_all_samples(self):
        places, values = plots.perplexity_by_position([r for r in RECORDS if r["task"] == "perplexity"])
        self.assertEqual(places, [250.0, 750.0])
        numpy.testing.assert_allclose(values, [math.exp(3.0), math.exp(1.0)])

    def write(self, records):
        (self.tmp / results.FILE_NAME).write_text("".join(json.dumps(r) + "\n" for r in records))

    def run_report(self, *options):
        with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
            code = command.main(["--out", str(self.tmp), "--report", *options])
        return code, stdout.getvalue(), stderr.getvalue()

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_plots_are_drawn_from_what_is_there(self):
        self.write(RECORDS)
        code, _, stderr = self.run_report()
        self.assertEqual(code, 0, stderr)
        names = {"grid-niah-end.png", "grid-niah-spread.png", "scores.png", "costs.png", "perplexity.png"}
        self.assertEqual({p.name for p in self.tmp.glob("*.png")}, names)
        for path in self.tmp.glob("*.png"):
            self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
            self.assertTrue(3000 < path.stat().st_size < 150_000, path)

    @unittest.skipIf(importlib.util.find_spec("matplotlib"), "matplotlib is installed")
    def test_missing_matplotlib_is_named_before_any_work(self):
        code, _, stderr = self.run_report()
        self.assertEqual(code, 2)
        self.assertIn("pip install matplotlib, or --no-plots", stderr)

    def test_the_summary_holds_the_numbers(self):
        self.write(RECORDS)
        code, stdout, stderr = self.run_report("--no-plots")
        self.assertEqual((code, stderr), (0, ""))
        self.assertEqual(json.loads((self.tmp / "summary.json").read_text()), report.summarise(RECORDS, 0.5))
        self.assertIn(report.table(report.summarise(RECORDS, 0.5)), stdout)

    def test_a_reader_that_goes_away_is_no_error_to_talk_about(self):
        self.write([record("niah-end", n, f"{n}/0", "dense", [(0.5, True, 0.0)]) for n in range(1000, 3000)])
        program = "import sys; import eval_support; from longfill.eval import command; sys.exit(command.main())"
        with subprocess.Popen([sys.executable, "-c", program, "--out", self.tmp, "--report", "--no-plots"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=pathlib.Path(__file__).parent) as process:
            self.assertEqual(process.stdout.readline(), "niah-end, 1,000 tokens\n")
            process.stdout.close()  # as head -1 does; the table does not fit into the pipe
            errors = process.stderr.read()
        self.assertEqual((process.returncode, errors), (141, ""))
        self.assertEqual(len(json.loads((self.tmp / "summary.json").read_text())), 2000)

    def test_a_summary_that_cannot_be_written_is_named(self):
        self.write(RECORDS)
        (self.tmp / "summary.json").mkdir()
        code, stdout, stderr = self.run_report("--no-plots")
        self.assertEqual((code, stdout), (1, ""))
        self.assertRegex(stderr, "^longfill: eval: .*summary.json: Is a directory;.*\n$")

    def test_results_of_two_models_are_not_mixed(self):
        self.write([*RECORDS, RECORDS[0] | {"model": "other"}])
        code, _, stderr = self.run_report("--no-plots")
        self.assertEqual(code, 2)
        self.assertIn("2 models", stderr)


if __name__ == "__main__":
    unittest.main()
