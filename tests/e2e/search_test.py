#!/usr/bin/env python3
"""`longfill search`: a cost table, a pattern file that `prefill` takes, resumption, ranks, and what it refuses."""

import csv
import json
import signal
import subprocess
import sys
import time

import matplotlib.colors
import matplotlib.image
import numpy
import support
from support import GOLDEN, LONGFILL, ROOT, run, write_tokens

MODEL = GOLDEN / "llama-gqa7-tied"  # 2 layers, 7 query heads, 97 words, 512 positions
LAYERS, HEADS = 2, 7
PLOT = [sys.executable, ROOT / "deploy" / "plot_tradeoff.py"]
FAMILIES = ["--candidates", "a-shape:16,64", "--candidates", "block-share:2,0.1", "--reference", "vertical-slash:64,128"]
BUDGETS = ["--budgets", "0.3,0.6,1"]


def ids(count, step):
    return [(i * step + i // 7) % 97 for i in range(count)]


class Search(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.samples = [self.tmp / "a.i32", self.tmp / "b.i32"]
        write_tokens(self.samples[0], ids(512, 11))
        write_tokens(self.samples[1], ids(400, 5))
        self.out = self.tmp / "patterns.json"

    def tokens(self):
        return [part for sample in self.samples for part in ("--tokens", sample)]

    def search(self, *more, out=None, threads=1, **options):
        return run("search", "--model", MODEL, *self.tokens(), "--out", out or self.out, *FAMILIES, "--threads", threads,
                   "--json", *more, **options)

    def calibrate(self):
        costs = self.tmp / "costs.json"
        result = run("search", "--model", MODEL, *self.tokens(), *FAMILIES, "--calibrate", "--runs", "1", "--out", costs,
                     "--threads", "1")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("vertical-slash:64,128, 512:", result.stdout)
        self.assertIn("left", result.stderr)
        return costs

    def test_finds_patterns_that_prefill_takes(self):
        costs = self.calibrate()
        result = self.search("--cost", costs, *BUDGETS, "--time", "0.7")
        self.assertEqual(result.returncode, 0, result.stderr)
        found = json.loads(result.stdout)
        self.assertLessEqual(found["share_of_reference"], 0.7)
        self.assertEqual(sum(found["patterns"].values()), LAYERS * HEADS)
        file = json.loads(self.out.read_text())
        self.assertEqual(len(file), LAYERS + 1)
        own = file[-1]["longfill"]
        self.assertEqual(own["score"], "recall")
        self.assertEqual(own["search"]["time"], 0.7)
        recalls = [file[layer][str(head)][3] for layer in range(LAYERS) for head in range(HEADS)]
        self.assertAlmostEqual(sum(recalls) / len(recalls), found["found"]["mean_recall"], 5)
        self.assertEqual(sorted(p.name for p in self.tmp.glob("patterns*")), ["patterns.json", "patterns.json.curve.csv"])
        with open(found["curve"], encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        values = [float(row["mean_value"]) for row in rows]
        self.assertEqual(values, sorted(values))

        out = self.tmp / "kv"
        prefill = run("prefill", "--model", MODEL, "--tokens", self.samples[0], "--out", out, "--attention", self.out, "--json")
        self.assertEqual(prefill.returncode, 0, prefill.stderr)
        self.assertNotIn("another model", json.loads(prefill.stdout)["attention"])

        self.check_plot(found["curve"])

        judged = run("search", "--model", MODEL, *self.tokens(), "--evaluate", self.out, "--evaluate", "vertical-slash:64,128",
                     "--evaluate", "dense", "--json")
        self.assertEqual(judged.returncode, 0, judged.stderr)
        mine, reference, dense = json.loads(judged.stdout)["results"]
        self.assertAlmostEqual(mine["mean_recall"], found["found"]["mean_recall"], 6)
        self.assertAlmostEqual(reference["mean_recall"], found["reference"]["mean_recall"], 6)
        self.assertAlmostEqual(dense["mean_recall"], 1, 5)
        self.assertEqual(dense["density"], 1)

    def test_patterns_of_their_own_for_each_length(self):
        result = self.search("--cost", self.calibrate(), *BUDGETS, "--time", "0.7", "--per-length")
        self.assertEqual(result.returncode, 0, result.stderr)
        short, long = json.loads(result.stdout)["sets"]
        self.assertEqual([found["target_tokens"] for found in (short, long)], [[400], [512]])
        for found in (short, long):
            self.assertLessEqual(found["share_of_reference"], 0.7)
        self.assertEqual(sorted(p.name for p in self.tmp.glob("patterns*")),
                         ["patterns.json", "patterns.json.400.curve.csv", "patterns.json.512.curve.csv"])
        own = json.loads(self.out.read_text())[-1]["longfill"]
        self.assertEqual(own["version"], 2)
        self.assertEqual([shorter["max_tokens"] for shorter in own["shorter"]], [452])  # between 400 and 512, by ratio
        self.assertEqual([part["target_tokens"] for part in (own["search"]["shorter"][0], own["search"])], [[400], [512]])
        for sample, expected in ((self.samples[1], "for up to 452 tokens"), (self.samples[0], self.out.name)):
            out = self.tmp / f"kv-{sample.stem}"
            prefill = run("prefill", "--model", MODEL, "--tokens", sample, "--out", out, "--attention", self.out, "--json")
            self.assertEqual(prefill.returncode, 0, prefill.stderr)
            self.assertIn(expected, json.loads(prefill.stdout)["attention"])
        judged = run("search", "--model", MODEL, *self.tokens(), "--evaluate", self.out, "--json")
        self.assertEqual(judged.returncode, 0, judged.stderr)
        mean = (short["found"]["mean_recall"] + long["found"]["mean_recall"]) / 2
        self.assertAlmostEqual(json.loads(judged.stdout)["results"][0]["mean_recall"], mean, 6)

    def check_plot(self, curve):
        """The line goes over the picture, and input that is no curve is refused."""
        picture = self.tmp / "curve.png"
        subprocess.run([*PLOT, picture, curve], check=True)
        pixels = matplotlib.image.imread(picture)[..., :3]
        first_colour = numpy.array(matplotlib.colors.to_rgb("C0"))
        rows, columns = numpy.nonzero(numpy.abs(pixels - first_colour).max(axis=-1) < 0.02)
        self.assertGreater(numpy.ptp(rows), pixels.shape[0] / 2)
        self.assertGreater(numpy.ptp(columns), pixels.shape[1] / 2)
        for arguments, reason in (((self.tmp / "curve.txt", curve), "curve.txt"), ((picture, self.out), "columns")):
            refused = subprocess.run([*PLOT, *arguments], capture_output=True, text=True, encoding="utf-8", errors="replace")
            self.assertNotEqual(refused.returncode, 0)
            self.assertIn(reason, refused.stderr)

    def test_ranks_find_what_one_finds(self):
        costs = self.calibrate()
        texts = []
        for ranks in (None, 2, 3):
            out = self.tmp / f"patterns-{ranks}.json"
            result = self.search("--cost", costs, *BUDGETS, "--head-recall", "0.98", out=out, ranks=ranks)
            self.assertEqual(result.returncode, 0, result.stderr)
            texts.append(out.read_text())
        self.assertEqual(texts[0], texts[1])
        self.assertEqual(texts[0], texts[2])

    def test_goes_on_after_a_signal(self):
        costs = self.calibrate()
        # So many units that a signal at the first one finds others to be done, on a fast machine too.
        for i in range(6):
            self.samples.append(self.tmp / f"more-{i}.i32")
            write_tokens(self.samples[-1], ids(512, 13 + i))
        num_units = LAYERS * len(self.samples)
        whole = self.tmp / "whole.json"
        budgets = [*BUDGETS, "--time", "1"]  # the default of a half may be below what a noisy cost table has
        first = self.search("--cost", costs, *budgets, out=whole)
        self.assertEqual(first.returncode, 0, first.stderr)
        state = self.tmp / "patterns.json.state"
        arguments = ["search", "--model", MODEL, *self.tokens(), "--out", self.out, *FAMILIES, "--cost", costs, *budgets,
                     "--threads", "1", "--json"]
        process = subprocess.Popen([str(LONGFILL), *map(str, arguments)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not list(state.glob("*.scores.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)  # none where it has ended
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, f"it was not interrupted: {errors}")
        done = len(list(state.glob("*.scores.json")))
        self.assertTrue(1 <= done < num_units, f"{done} of {num_units} units were done when it was interrupted: {errors}")
        self.assertFalse(self.out.exists())
        other = self.search("--cost", costs, "--budgets", "0.5", "--time", "1")
        self.assertEqual(other.returncode, 2)
        self.assertIn("another budgets", other.stderr)
        self.assertEqual(self.search("--cost", costs, *budgets).returncode, 0)
        self.assertEqual(self.out.read_text(), whole.read_text())
        self.assertFalse(state.exists())

    def test_measures_by_itself_and_says_so(self):
        result = run("search", "--model", MODEL, *self.tokens(), "--out", self.out, *FAMILIES, *BUDGETS, "--runs", "1",
                     "--value", "error")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("no --cost", result.stderr)
        self.assertIn("mean recall", result.stdout)

    def test_a_geometry_needs_no_checkpoint(self):
        result = run("search", "--geometry", MODEL / "config.json", *self.tokens(), *FAMILIES, *BUDGETS, "--runs", "1", "--json",
                     "--end-share", "0.2")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(sum(json.loads(result.stdout)["patterns"].values()), LAYERS * HEADS)

    def test_heads_that_decide_answers_are_named(self):
        costs = self.calibrate()
        arguments = ["--cost", costs, *BUDGETS, "--time", "1", "--value", "answers", "--answer-share", "0.6"]
        result = self.search(*arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        heads = json.loads(result.stdout)["decisive_heads"]
        self.assertTrue(heads)
        for layer, head, influence in heads:
            self.assertTrue(layer < LAYERS and head < HEADS and influence > 0, heads)
        search = json.loads(self.out.read_text())[-1]["longfill"]["search"]
        self.assertEqual((search["value"], search["answer_share"], search["result"]["decisive_heads"]), ("answers", 0.6, heads))
        two = self.tmp / "two.json"
        self.assertEqual(self.search(*arguments, out=two, ranks=2).returncode, 0)
        self.assertEqual(two.read_text(), self.out.read_text())
        text = run("search", "--model", MODEL, *self.tokens(), "--out", two, *FAMILIES, "--threads", "1", *arguments)
        self.assertIn(f"{len(heads)} heads decide what is said next: {heads[0][0]}/{heads[0][1]}", text.stdout)
        self.assertIn("influence: layers:", text.stderr)

    def test_a_share_is_of_one_value(self):
        for value, option, share, reason in (
                ("recall", "--end-share", "0.2", "--end-share 0.2 is a share of --value end, the value is recall"),
                ("end", "--answer-share", "0.2", "--answer-share 0.2 is a share of --value answers, the value is end"),
                ("end", "--end-share", "1.5", "--end-share"), ("answers", "--answer-share", "2", "--answer-share")):
            refused = self.search("--value", value, option, share)
            self.assertEqual(refused.returncode, 2)
            self.assertIn(reason, refused.stderr)

    def test_bad_input_is_one_line_and_exit_code_2(self):
        costs = self.calibrate()
        short = self.tmp / "short.i32"
        write_tokens(short, ids(100, 3))
        broken = self.tmp / "broken.json"
        broken.write_text('{"longfill_cost_table": {"version": 1}}')
        foreign = self.tmp / "foreign.json"
        table = json.loads(costs.read_text())
        table["longfill_cost_table"]["device"] = "another card"
        foreign.write_text(json.dumps(table))
        model = ["--model", MODEL]
        out = ["--out", self.out]
        cost = ["--cost", costs, "--threads", "1"]
        cases = {
            "short.i32: 100 tokens": [*model, "--tokens", short, *out],
            "vertical-slash:5": [*model, *self.tokens(), *out, "--candidates", "vertical-slash:5"],
            "dense need not be given": [*model, *self.tokens(), *out, "--candidates", "dense"],
            "--reference": [*model, *self.tokens(), *out, "--reference", "dense"],
            "broken.json": [*model, *self.tokens(), *out, "--cost", broken],
            "missing.json": [*model, *self.tokens(), *out, "--cost", self.tmp / "missing.json"],
            "another card": [*model, *self.tokens(), *out, *FAMILIES, "--cost", foreign],
            "cost table has no block-sparse:3": [*model, *self.tokens(), *out, *cost, "--candidates", "block-sparse:3",
                                                 "--reference", "vertical-slash:64,128"],
            "no sample has 300 tokens": [*model, *self.tokens(), *out, *FAMILIES, *cost, "--target-tokens", "300"],
            "the target is": [*model, *self.tokens(), *out, *FAMILIES, *cost, *BUDGETS, "--time", "0.00001"],
            "--out is missing": [*model, *self.tokens()],
            "either --model or --geometry": [*self.tokens(), *out],
            "for no model": ["--geometry", "llama3-8b", *self.tokens(), *out],
            "config.json": ["--model", self.tmp, *self.tokens(), *out],
            "--evaluate": [*model, *self.tokens(), "--evaluate", "vertical-slash:1"],
            "--recall": [*model, *self.tokens(), *out, "--recall", "1.5"],
        }
        for what, arguments in cases.items():
            with self.subTest(what):
                result = run("search", *arguments)
                self.assertEqual(result.returncode, 2, result.stderr)
                lines = [line for line in result.stderr.splitlines() if line.startswith("longfill: ")]
                self.assertEqual(len(lines), 1, result.stderr)
                self.assertIn(what, lines[0])
                self.assertFalse(self.out.exists())

    def test_another_target_needs_no_new_scores(self):
        costs = self.calibrate()
        refused = self.search("--cost", costs, *BUDGETS, "--time", "0.00001")
        self.assertEqual(refused.returncode, 2, refused.stderr)
        kept = {path.name: path.stat().st_mtime_ns for path in (self.tmp / "patterns.json.state").glob("*.scores.json")}
        self.assertEqual(len(kept), LAYERS * len(self.samples))
        again = self.search("--cost", costs, *BUDGETS, "--time", "0.000001")
        self.assertEqual(again.returncode, 2, again.stderr)
        now = {path.name: path.stat().st_mtime_ns for path in (self.tmp / "patterns.json.state").glob("*.scores.json")}
        self.assertEqual(now, kept)
        self.assertEqual(self.search("--cost", costs, *BUDGETS, "--time", "0.9").returncode, 0)
        self.assertFalse((self.tmp / "patterns.json.state").exists())

    def test_what_measures_time_runs_on_one_rank(self):
        for arguments in (["--calibrate", "--out", self.out], ["--evaluate", "dense"], ["--out", self.out]):
            with self.subTest(arguments[0]):
                result = run("search", "--model", MODEL, *self.tokens(), *arguments, ranks=2)
                self.assertEqual(result.returncode, 2, result.stderr)
                self.assertIn("rank", result.stderr)


if __name__ == "__main__":
    support.main()
