#!/usr/bin/env python3
"""The service under faults: bad requests, clients that vanish, ranks that die, SIGTERM, a full queue."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy
import support
from support import LONGFILL, Service, is_idle, run, server_status, some_tokens, wait_until, write_model, write_tokens

import longfill
from longfill.v1 import admin_pb2, kv_pb2, kv_pb2_grpc, prefill_pb2, prefill_pb2_grpc


class SlowModel(support.TemporaryDirectoryTest):
    """A model on which a prompt of LONG tokens takes many seconds."""

    LONG = 60000

    def setUp(self):
        super().setUp()
        self.model = write_model(self.tmp / "model", num_hidden_layers=4, max_position_embeddings=1 << 17)


class Requests(SlowModel):
    def test_the_client_gets_what_the_batch_job_writes(self):
        ids = some_tokens(1000)
        tokens = write_tokens(self.tmp / "prompt.i32", ids)
        result = run("prefill", "--model", self.model, "--tokens", tokens, "--out", self.tmp / "out", "--logits", "7,999",
                     "--kv-dtype", "bfloat16")
        self.assertEqual(result.returncode, 0, result.stderr)
        expected = longfill.load_manifest(self.tmp / "out")
        seen = []
        with Service(self.model, ranks=3) as service, longfill.Client(service.target) as client:
            info = client.model_info()
            self.assertEqual((info.num_layers, info.num_kv_heads, info.ranks), (4, 2, 3))
            got = client.prefill(ids, logits=[7, 999], kv_dtype="bfloat16", on_progress=seen.append)
            wait_until(lambda: is_idle(service.target), what="idle service")
            self.assertEqual(got.manifest.token_hashes, expected.manifest.token_hashes)
            self.assertEqual(got.manifest.model_fingerprint, expected.manifest.model_fingerprint)
            self.assertEqual(seen[-1].layers_done, 4)
            result = run("submit", "--target", service.target, "--tokens", tokens, "--out", self.tmp / "submitted",
                         "--logits", "7,999", "--kv-dtype", "bfloat16")
            self.assertEqual(result.returncode, 0, result.stderr)
        for other in (got, longfill.load_manifest(self.tmp / "submitted")):
            self.assertEqual(other.positions.tolist(), [7, 999])
            numpy.testing.assert_allclose(other.logits, expected.logits, atol=1e-3 * numpy.abs(expected.logits).max())
            for pair, expected_pair in zip(other.to_numpy(), expected.to_numpy(), strict=True):
                for array, expected_array in zip(pair, expected_pair):
                    # One unit in the last place of bfloat16, where the fp32 values differ in their last bits.
                    numpy.testing.assert_allclose(array, expected_array, rtol=2**-7, atol=1e-3 * numpy.abs(expected_array).max())
        saved = self.tmp / "saved"
        got.save(saved)
        for pair, again in zip(got.kv, longfill.load_manifest(saved).kv, strict=True):
            numpy.testing.assert_array_equal(pair[0], again[0])

    def test_recall_is_watched_as_asked_or_as_the_service_was_started(self):
        ids = some_tokens(2000)
        sparse = "vertical-slash:30,50"
        with Service(self.model, "--min-recall", "1", ranks=2) as service, longfill.Client(service.target) as client:
            dense = client.prefill(ids, attention="dense", recall_monitor=False)
            self.assertNotIn("recall", dense.figures)
            guarded = client.prefill(ids, attention=sparse)
            self.assertEqual(guarded.figures["recall"]["min"], 1)
            self.assertGreater(guarded.figures["recall"]["recomputed"], 0)
            for head in guarded.figures["recall"]["layers"][0]["recomputed"]:
                self.assertEqual(head["density"], 1)
            numpy.testing.assert_allclose(guarded.logits, dense.logits, atol=1e-3 * numpy.abs(dense.logits).max())
            watched = client.prefill(ids, attention=sparse, recall_monitor=True).figures["recall"]
            self.assertLess(watched["min"], 1)
            self.assertEqual(watched["layers"][watched["min_layer"]]["min_head"], watched["min_head"])
            self.assertEqual(watched["recomputed"], 0)
            tokens = write_tokens(self.tmp / "prompt.i32", ids)
            for options, recomputed in (([], True), (["--recall-monitor"], False)):
                result = run("submit", "--target", service.target, "--tokens", tokens, "--out", self.tmp / "submitted",
                             "--attention", sparse, "--json", "--overwrite", *options)
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertEqual(json.loads(result.stdout)["recall"]["recomputed"] > 0, recomputed)

    def test_caches_may_be_in_files_that_nobody_sees(self):
        ids = some_tokens(300)
        with Service(self.model) as service, longfill.Client(service.target) as client:
            expected = client.prefill(ids)
        directory = self.tmp / "caches"
        directory.mkdir()
        with Service(self.model, "--kv-memory", f"file:{directory}", ranks=2) as service, \
                longfill.Client(service.target) as client:
            got = client.prefill(ids)
            self.assertEqual(got.figures["compute_dtype"], "float32")
            self.assertEqual(list(directory.iterdir()), [])
            wait_until(lambda: is_idle(service.target), what="idle service")
        for pair, expected_pair in zip(got.to_numpy(), expected.to_numpy(), strict=True):
            for array, expected_array in zip(pair, expected_pair):
                numpy.testing.assert_allclose(array, expected_array, atol=1e-3 * numpy.abs(expected_array).max())
        for memory, word in (("device", "device:BYTES"), ("device:many", "device:2GB"), ("reader:1kB", "8388608"),
                             ("file:/no/such/directory", "/no/such/directory"), ("ram", "ram")):
            result = run("serve", "--model", self.model, "--kv-memory", memory)
            self.assertEqual(result.returncode, 2, result.stderr)
            self.assertIn(word, result.stderr)

    def test_bad_requests_are_refused_by_name_and_leave_nothing(self):
        cases = [
            (dict(ids=[]), "INVALID_ARGUMENT", "token"),
            (dict(ids=[1, 2, 97]), "INVALID_ARGUMENT", "97"),
            (dict(ids=[1, -2]), "INVALID_ARGUMENT", "-2"),
            (dict(ids=[1] * ((1 << 17) + 1)), "INVALID_ARGUMENT", str(1 << 17)),
            (dict(ids=[1, 2, 3], logits=[3]), "INVALID_ARGUMENT", "3"),
            (dict(ids=[1, 2, 3], logits=[-1]), "INVALID_ARGUMENT", "-1"),
            (dict(ids=[1, 2, 3], attention="a-shape:-1,2"), "INVALID_ARGUMENT", "-1"),
            (dict(ids=[1, 2, 3], attention="/etc/passwd"), "INVALID_ARGUMENT", "/etc/passwd"),
            (dict(ids=[1, 2, 3], request_id="a b"), "INVALID_ARGUMENT", "request_id"),
        ]
        with Service(self.model, "--memory-limit", "2GB") as service, longfill.Client(service.target) as client:
            for arguments, code, word in cases:
                with self.subTest(word):
                    with self.assertRaises(longfill.PrefillError) as caught:
                        client.prefill(**arguments, timeout=30)
                    self.assertEqual(caught.exception.code.name, code, caught.exception)
                    self.assertIn(word, caught.exception.message)
            patterns = self.tmp / "patterns.json"
            patterns.write_text('[{"0": ["vertical_and_slash", 30, 100, 1.0]}]')
            with self.assertRaises(longfill.PrefillError) as caught:
                client.prefill([1, 2, 3], attention=patterns)
            self.assertIn("layer", caught.exception.message)
            wait_until(lambda: is_idle(service.target), what="idle service")
            self.assertEqual(client.prefill([1, 2, 3]).manifest.num_tokens, 3)

    def test_submit_refuses_bad_input_like_prefill(self):
        with Service(self.model) as service:
            for content, word in (("[]", "no token ids"), ("[1, 97]", "97"), ("[1.5]", "1.5")):
                tokens = self.tmp / "prompt.json"
                tokens.write_text(content)
                result = run("submit", "--target", service.target, "--tokens", tokens, "--out", self.tmp / "out")
                self.assertEqual(result.returncode, 2, result.stderr)
                self.assertIn(word, result.stderr)
                self.assertFalse((self.tmp / "out").exists())

    def test_prompts_beyond_memory_name_what_would_fit(self):
        with Service(self.model, "--memory-limit", "40MB") as service, longfill.Client(service.target) as client:
            with self.assertRaises(longfill.PrefillError) as caught:
                client.prefill(some_tokens(100000))
            self.assertEqual(caught.exception.code.name, "RESOURCE_EXHAUSTED")
            longest = caught.exception.max_tokens
            self.assertTrue(0 < longest < 100000, longest)
            self.assertIsNone(caught.exception.retry_after)


class Vanishing(SlowModel):
    def prefill_in_thread(self, target, **options):
        """Starts a long prefill; returns (thread, list for its exception, event that is set once it computes)."""
        errors, computing = [], threading.Event()

        def work():
            try:
                with longfill.Client(target) as client:
                    client.prefill(some_tokens(self.LONG), attention="dense", on_progress=lambda p: computing.set(), **options)
            except longfill.PrefillError as error:
                errors.append((error, time.monotonic()))

        thread = threading.Thread(target=work)
        thread.start()
        self.addCleanup(thread.join)
        return thread, errors, computing

    def test_a_client_that_is_killed_frees_its_prompt(self):
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(self.LONG))
        with Service(self.model, ranks=2) as service:
            for signal_number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)):
                out = self.tmp / f"out-{signal_number}"
                client = subprocess.Popen([LONGFILL, "submit", "--target", service.target, "--tokens", tokens, "--out", out,
                                           "--attention", "dense"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                wait_until(lambda: server_status(service.target).HasField("running"), what="running prompt")
                client.send_signal(signal_number)
                _, stderr = client.communicate(timeout=20)
                self.assertEqual(client.returncode, code, stderr)
                wait_until(lambda: is_idle(service.target), what="idle service")
            self.assertFalse(out.exists(), "an interrupted submit leaves no output")
            with longfill.Client(service.target) as client:
                self.assertEqual(client.prefill([1, 2, 3]).manifest.num_tokens, 3)

    def test_a_reader_that_goes_leaves_the_service_well(self):
        with Service(self.model, "--lease", "2", ranks=2) as service:
            with grpc.insecure_channel(service.target) as channel:
                stub = prefill_pb2_grpc.PrefillServiceStub(channel)
                header = prefill_pb2.PrefillHeader(num_tokens=20000, attention=prefill_pb2.AttentionSpec(spec="a-shape:1,64"))
                ids = some_tokens(20000)
                call = stub.Prefill(iter([prefill_pb2.PrefillRequest(header=header),
                                          prefill_pb2.PrefillRequest(tokens=prefill_pb2.TokenChunk(ids=ids))]))
                accepted = next(e.accepted for e in call if e.WhichOneof("event") == "accepted")
                kv = kv_pb2_grpc.KvServiceStub(channel)
                pages = kv.ReadPages(kv_pb2.ReadPagesRequest(transfer_id=accepted.manifest.transfer_id))
                next(iter(pages))
                pages.cancel()  # in the middle of a layer
                self.assertEqual([e for e in call][-1].WhichOneof("event"), "result")
            wait_until(lambda: is_idle(service.target), what="transfer expired with its lease")

    def test_a_lost_rank_ends_the_request_and_the_group(self):
        # A stopped rank is noticed when it has been silent for the watchdog's 8 s, a dead one by its closed connection;
        # the service answers within half a second after that, the client may need its moment on a busy machine.
        for victim, signal_number, limit in ((1, signal.SIGKILL, 2), (0, signal.SIGKILL, 2), (2, signal.SIGSTOP, 20)):
            with self.subTest(rank=victim, signal=signal_number), Service(self.model, ranks=3) as service:
                _, errors, computing = self.prefill_in_thread(service.target)
                self.assertTrue(computing.wait(30))
                begin = time.monotonic()
                os.kill(service.rank_processes()[victim], signal_number)
                wait_until(lambda: errors, seconds=30, what="terminal event")
                error, when = errors[0]
                print(f"rank {victim}, signal {signal_number}: {error} after {when - begin:.3f} s", flush=True)
                self.assertEqual(error.code.name, "UNAVAILABLE", error)
                self.assertLess(when - begin, limit)
                wait_until(lambda: service.process.poll() is not None, what="end of the group")
                wait_until(lambda: not service.processes(), what="end of all ranks")
                self.assertNotEqual(service.process.returncode, 0)

    def test_sigterm_drains(self):
        with Service(self.model) as service:
            thread, errors, computing = self.prefill_in_thread(service.target)
            self.assertTrue(computing.wait(30))
            os.kill(service.rank_processes()[0], signal.SIGTERM)
            wait_until(lambda: server_status(service.target).phase == admin_pb2.SERVER_PHASE_DRAINING, what="draining")
            with self.assertRaises(longfill.PrefillError) as caught, longfill.Client(service.target) as client:
                client.prefill([1, 2, 3])
            self.assertEqual(caught.exception.code.name, "UNAVAILABLE")
            thread.join()
            self.assertEqual(errors, [], "the running prompt is finished")
            self.assertEqual(service.process.wait(20), 0)

    def test_a_full_queue_refuses_with_a_hint(self):
        with Service(self.model, "--queue", "1") as service:
            _, _, computing = self.prefill_in_thread(service.target, timeout=60, kv="drop")
            self.assertTrue(computing.wait(30))
            self.prefill_in_thread(service.target, timeout=60, kv="drop")
            wait_until(lambda: server_status(service.target).queue_length == 1, what="a waiting prompt")
            with self.assertRaises(longfill.PrefillError) as caught, longfill.Client(service.target) as client:
                client.prefill([1, 2, 3])
            self.assertEqual(caught.exception.code.name, "RESOURCE_EXHAUSTED")
            self.assertGreater(caught.exception.retry_after, 0)
            os.kill(service.rank_processes()[0], signal.SIGKILL)

    def test_a_deadline_ends_the_prompt(self):
        with Service(self.model, ranks=2) as service, longfill.Client(service.target) as client:
            with self.assertRaises(longfill.PrefillError) as caught:
                client.prefill(some_tokens(self.LONG), attention="dense", timeout=1.0)
            self.assertEqual(caught.exception.code.name, "DEADLINE_EXCEEDED")
            wait_until(lambda: is_idle(service.target), what="idle service")

    def test_ctrl_c_in_python_ends_the_prompt(self):
        script = (f"import sys; sys.path.insert(0, {str(support.PACKAGE / 'src')!r}); import longfill, numpy\n"
                  f"ids = numpy.zeros({self.LONG}, dtype=int)\n"
                  "print('go', flush=True); longfill.Client(sys.argv[1]).prefill(ids, attention='dense')")
        with Service(self.model) as service:
            client = subprocess.Popen([sys.executable, "-c", script, service.target], stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True)
            wait_until(lambda: server_status(service.target).HasField("running"), what="running prompt")
            client.send_signal(signal.SIGINT)
            _, stderr = client.communicate(timeout=20)
            self.assertIn("KeyboardInterrupt", stderr)
            wait_until(lambda: is_idle(service.target), what="idle service")


class StartUp(SlowModel):
    def test_an_address_in_use_is_named(self):
        with Service(self.model) as service:
            result = run("serve", "--model", self.model, "--listen", service.target)
            self.assertEqual(result.returncode, 2)
            self.assertIn(service.target, result.stderr)

    def test_a_broken_model_ends_all_ranks(self):
        (self.model / "config.json").write_text("{")
        result = run("serve", "--model", self.model, "--listen", "127.0.0.1:0", ranks=2)
        self.assertEqual(result.returncode, 2)
        self.assertIn("config.json", result.stderr)


if __name__ == "__main__":
    support.main()
