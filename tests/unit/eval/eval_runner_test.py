#!/usr/bin/env python3
"""Metrics against torch, results that are found again, and what the loop does when something fails."""

import contextlib
import io
import json
import shutil
import signal
import unittest
from unittest import mock

import eval_support
import grpc
import numpy
import torch

from longfill.errors import PrefillError
from longfill.eval import command, interrupt, metrics, report, results, runner
from longfill.eval.errors import EvalError, UsageError
from longfill.eval.sample import Question, Sample


def sample(name="one", num_tokens=40, answers=((30, 2), (37, 3))):
    ids = (numpy.arange(num_tokens) * 5 % 290).astype(numpy.int32)
    following = [*ids.tolist(), 7]  # what FakeClient says comes after the last
    questions = tuple(Question(p, tuple(following[p + 1 : p + 1 + n]), p / num_tokens) for p, n in answers)
    return Sample("niah-spread", name, num_tokens, ids, questions)


class Metrics(unittest.TestCase):
    def test_figures_are_those_of_torch(self):
        random = numpy.random.default_rng(4)
        dense = random.normal(0, 5, (150, 97)).astype(numpy.float32)
        other = (dense + random.normal(0, 1, dense.shape)).astype(numpy.float32)
        wanted = numpy.where(random.random(150) < 0.5, other.argmax(axis=-1), random.integers(0, 97, 150))
        got = metrics.compare(dense, other, wanted)
        p, q = (torch.log_softmax(torch.tensor(a, dtype=torch.float64), dim=-1) for a in (dense, other))
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)
        nll = torch.nn.functional.nll_loss(q, torch.tensor(wanted), reduction="none")
        numpy.testing.assert_allclose(got.kl, kl.numpy(), rtol=1e-10)
        numpy.testing.assert_allclose(got.nll, nll.numpy(), rtol=1e-10)
        self.assertEqual(got.right.tolist(), (q.argmax(dim=-1).numpy() == wanted).tolist())
        self.assertEqual(got.agreement.tolist(), (q.argmax(dim=-1) == p.argmax(dim=-1)).tolist())
        self.assertTrue(0 < got.right.sum() < 150 and 0 < got.agreement.sum() < 150)

    def test_nothing_differs_from_itself(self):
        logits = numpy.random.default_rng(1).normal(size=(3, 5)).astype(numpy.float32)
        got = metrics.compare(logits, logits, numpy.zeros(3, dtype=int))
        self.assertEqual((got.kl.tolist(), got.agreement.all()), ([0.0] * 3, True))

    def test_an_answer_is_right_when_all_its_tokens_are(self):
        right = numpy.array([True, True, True, False, True])
        zeros = numpy.arange(5.0)
        rows = metrics.question_figures(sample(), metrics.Positions(right, zeros, zeros, right))
        self.assertEqual([(r["right"], r["tokens"], r["nll"]) for r in rows], [(True, 2, 0.5), (False, 3, 3.0)])
        self.assertEqual(metrics.weighted_mean(rows, "nll"), 2.0)


class Loop(eval_support.TokenizerTest):
    def run_samples(self, client, samples, methods=("a-shape:1,2",), setup=None, check=lambda: None):
        with results.open_results(self.tmp) as store:
            loop = runner.Runner(client, store, [runner.Method.create(m) for m in methods], setup or {}, lambda _: None, check)
            return loop.run(samples, len(samples))

    def test_scores_follow_from_what_ranks_first(self):
        client = eval_support.FakeClient()
        client.wrong["a-shape:1,2"] = 1
        dense, sparse = self.run_samples(client, [sample()])
        self.assertEqual([q["right"] for q in dense["questions"]], [True, True])
        self.assertEqual([q["right"] for q in sparse["questions"]], [True, False])
        self.assertEqual((dense["score"], sparse["score"], sparse["agreement"], dense["kl"]), (1.0, 0.5, 0.8, 0.0))
        self.assertGreater(sparse["kl"], 0.1)
        rows = report.summarise([dense, sparse], 0.5)
        self.assertEqual([(r["method"], r["score"], r["kept"]) for r in rows], [("dense", 1.0, 1.0), ("a-shape:1,2", 0.5, 0.5)])
        self.assertEqual(rows[1]["density"], 0.5)

    def test_what_is_there_is_not_run_again(self):
        client = eval_support.FakeClient()
        samples = [sample("one"), sample("two", 41)]
        first = self.run_samples(client, samples)
        self.assertEqual(len(client.calls), 4)
        self.assertEqual(self.run_samples(client, samples), first)
        self.assertEqual(len(client.calls), 4)
        # A method more: dense once more, to compare with, and that method.
        more = self.run_samples(client, samples, ("a-shape:1,2", "block-sparse:3"))
        self.assertEqual([c[0] for c in client.calls[4:]], ["dense", "block-sparse:3"] * 2)
        self.assertEqual([r for r in more if r["method"] != "block-sparse:3"], first)
        # Anything else that a result depends on: all of it.
        self.run_samples(client, samples, setup={"serve": ["--device", "cuda"]})
        self.assertEqual(len(client.calls), 12)

    def test_results_of_auto_are_of_one_instance_of_a_service_that_was_not_started_here(self):
        client = eval_support.FakeClient()
        for epoch, calls in (("e", 2), ("e", 2), ("f", 4)):  # dense runs again to compare with
            client.epoch = epoch
            self.run_samples(client, [sample()], ("auto",))
            self.assertEqual(len(client.calls), calls)
        self.assertEqual([r["method"] for r in results.read_records(self.tmp)], ["dense", "auto", "auto"])

    def test_a_disk_that_takes_no_more_ends_the_run(self):
        with results.open_results(self.tmp) as store, open("/dev/full", "wb", buffering=0) as full:
            store._file, kept = full, store._file
            with self.assertRaisesRegex(EvalError, "results.jsonl: No space left"):
                store.add({"key": "x"})
            store._file = kept

    def test_a_run_that_failed_goes_on(self):
        client = eval_support.FakeClient()
        client.error = (3, PrefillError(grpc.StatusCode.UNAVAILABLE, "rank 1 was lost"))
        samples = [sample("one"), sample("two", 41)]
        with self.assertRaisesRegex(EvalError, "two.*rank 1 was lost"):
            self.run_samples(client, samples)
        client.error = None
        # The kill came in the middle of a line.
        with open(self.tmp / results.FILE_NAME, "ab") as file:
            file.write(b'{"key": "x"')
        done = self.run_samples(client, samples)
        self.assertEqual([c[0] for c in client.calls], ["dense", "a-shape:1,2", "dense", "dense", "a-shape:1,2"])
        self.assertEqual(results.read_records(self.tmp), done)

    def test_a_run_that_is_told_to_stop_stops_within_a_prefill(self):
        client = eval_support.FakeClient()

        def check():
            if len(client.calls) == 2:
                raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            self.run_samples(client, [sample()], check=check)
        self.assertEqual([r["method"] for r in results.read_records(self.tmp)], ["dense"])

    def test_the_first_signal_is_seen_by_check_and_the_second_at_once(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        signals = interrupt.StopSignals()
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        with self.assertRaises(KeyboardInterrupt):
            signals.check()
        with self.assertRaises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def test_wrong_attention_is_refused_before_any_sample(self):
        client = eval_support.FakeClient()
        client.error = (1, PrefillError(grpc.StatusCode.INVALID_ARGUMENT, "attention 'x' is none"))
        with results.open_results(self.tmp) as store:
            loop = runner.Runner(client, store, [runner.Method.create("x")], {}, lambda _: None, lambda: None)
            with self.assertRaisesRegex(UsageError, "--attention x: attention 'x' is none"):
                loop.try_methods()

    def test_two_processes_do_not_write_to_one_folder(self):
        with results.open_results(self.tmp), self.assertRaisesRegex(UsageError, "another longfill eval"):
            results.Results(self.tmp)

    def test_a_line_of_something_else_is_named_with_what_it_lacks(self):
        right, _ = self.run_samples(eval_support.FakeClient(), [sample()])
        for name in right:
            self.refuses_line({k: v for k, v in right.items() if k != name}, f"it has no {name}")
        for name in right["figures"]:
            self.refuses_line(right | {"figures": {k: v for k, v in right["figures"].items() if k != name}}, f"figures has no {name}")
        for name in right["questions"][0]:
            question = {k: v for k, v in right["questions"][0].items() if k != name}
            self.refuses_line(right | {"questions": [question]}, f"a question has no {name}")
        for wrong, word in (([1], "it is no JSON object"), (right | {"length": "8K"}, 'it has length "8K"'),
                            (right | {"questions": []}, "it has no questions"), (right | {"questions": [3]}, "a question is no JSON object")):
            self.refuses_line(wrong, word)
        (self.tmp / results.FILE_NAME).write_bytes(b"\xff\n")
        with self.assertRaisesRegex(UsageError, "line 1"):
            results.read_records(self.tmp)

    def refuses_line(self, line, word):
        (self.tmp / results.FILE_NAME).write_text(json.dumps(line) + "\n")
        with self.assertRaisesRegex(UsageError, f"line 1: this is no result of longfill eval: {word}"):
            results.read_records(self.tmp)

    def test_where_dense_fails_there_is_nothing_to_compare(self):
        client = eval_support.FakeClient()
        client.wrong["dense"] = 5
        rows = report.summarise(self.run_samples(client, [sample()]), 0.5)
        self.assertEqual([row["comparable"] for row in rows], [False, False])
        self.assertIn("niah-spread, 40 tokens: dense fails, nothing to compare", report.table(rows))


class CommandLine(eval_support.TokenizerTest):
    def refused(self, *arguments):
        """The line on standard error of a command that must end with 2."""
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            self.assertEqual(command.main(["--no-plots", *(str(a) for a in arguments)]), 2)
        line, = stderr.getvalue().splitlines()
        self.assertTrue(line.startswith("longfill: eval: "), line)
        return line

    def test_bad_usage_is_one_line_that_names_the_value(self):
        out, model = self.tmp / "out", self.models[0]
        whole = ("--out", out, "--model", model, "--length", "4K")
        self.assertIn("--out", self.refused())
        self.assertIn("--model is missing", self.refused("--out", out, "--length", 100))
        self.assertIn("--length is missing", self.refused("--out", out, "--model", model))
        self.assertIn("'4Q'", self.refused("--out", out, "--model", model, "--length", "8K,4Q"))
        self.assertIn("nothing-like-it", self.refused(*whole, "--task", "niah-end,nothing-like-it"))
        self.assertIn("'0'", self.refused(*whole, "--depths", "0"))
        self.assertIn("1.5", self.refused(*whole, "--dense-floor", "1.5"))
        self.assertIn("--target", self.refused(*whole, "--target", "h:1", "--", "--device", "cuda"))
        self.assertIn("absent", self.refused("--out", out, "--model", self.tmp / "absent", "--length", "4K"))
        self.assertIn("tokenizer.json", self.refused("--out", out, "--model", self.tmp, "--length", "4K"))
        self.assertIn("absent.json", self.refused(*whole, "--attention", "absent.json"))
        self.assertIn("cannot run no-such-program", self.refused(*whole, "--program", "no-such-program"))
        self.assertIn("there are no results", self.refused("--out", self.tmp / "empty", "--report"))

    def test_a_program_that_cannot_serve_is_quoted(self):
        program = self.tmp / "program"
        program.write_text("#!/bin/sh\necho 'longfill: --model: no such model' >&2\nexit 2\n")
        program.chmod(0o755)
        line = self.refused("--out", self.tmp, "--model", self.models[0], "--length", "4K", "--program", program)
        self.assertTrue(line.endswith("the service did not start: --model: no such model"), line)

    def test_what_auto_means_belongs_to_a_result(self):
        client, model = eval_support.FakeClient(vocab_size=1600), self.tmp / "model"
        shutil.copytree(self.models[1], model)
        folder = self.tmp / "patterns"
        folder.mkdir()
        file, own = folder / "model.json", model / "patterns.json"
        text = self.tmp / "text.txt"
        text.write_text("\n".join(f"Line {i} says little." for i in range(500)))

        def methods_run(*serve_options):
            begin = len(client.calls)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
                code = command.main(["--no-plots", "--out", str(self.tmp / "out"), "--model", str(model), "--length", "1K", "--task",
                                     "niah-end", "--depths", "1", "--text", str(text), "--", *map(str, serve_options)])
            self.assertEqual(code, 0, stderr.getvalue())
            return [method for method, tokens in client.calls[begin:] if tokens == 1024]

        with (mock.patch.object(command, "Client", lambda _: client),
              mock.patch.object(command, "running_service", lambda *_: contextlib.nullcontext("h:1"))):
            self.assertEqual(methods_run(), ["dense", "auto"])
            own.write_text("[1]")
            self.assertEqual(methods_run(), ["dense", "auto"])
            self.assertEqual(methods_run(), [])
            own.write_text("[2]")
            self.assertEqual(methods_run(), ["dense", "auto"])
            for options in ((f"--patterns={file}",), ("--patterns", file), ("--patterns", folder)):
                file.write_text("[3]")
                self.assertEqual(methods_run(*options), ["dense", "auto"])
                own.write_text(f"{options}")  # which is not used then
                self.assertEqual(methods_run(*options), [])
                file.write_text("[4]")
                self.assertEqual(methods_run(*options), ["dense", "auto"])
                file.write_text("[3]")
                self.assertEqual(methods_run(*options), [])
        lines = results.read_records(self.tmp / "out")
        self.assertEqual(sum(r["method"] == "auto" for r in lines), 9)
        self.assertIn("absent", self.refused("--out", self.tmp / "out", "--model", model, "--length", "1K", "--", "--patterns",
                                             self.tmp / "absent"))

    def test_what_goes_wrong_with_files_is_one_line_that_names_the_file(self):
        file = self.tmp / "file"
        file.write_text("")
        self.assertIn(f"--out {file}: File exists", self.refused("--out", file, "--model", self.models[0], "--length", "1K"))
        self.assertIn("Not a directory", self.refused("--out", file, "--report"))
        with (mock.patch.object(command, "running_service", side_effect=PermissionError(13, "Permission denied", "a/file")),
              contextlib.redirect_stderr(io.StringIO()) as stderr):
            code = command.main(["--no-plots", "--out", str(self.tmp), "--model", str(self.models[0]), "--length", "1K"])
        self.assertEqual((code, stderr.getvalue()), (1, "longfill: eval: a/file: Permission denied\n"))

    def test_lengths_may_be_written_short(self):
        for text, expected in (("8192", 8192), ("8K", 8192), ("1m", 1 << 20)):
            self.assertEqual(command._length(text), expected)


if __name__ == "__main__":
    unittest.main()
