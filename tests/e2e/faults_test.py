#!/usr/bin/env python3
"""Random faults in a row against one service of four ranks: clients that cancel, vanish or are refused in every phase,
readers that go, deadlines, ranks that are killed or stopped. Nothing may be lost, left waiting or leaked.

    faults_test.py [--faults N] [--seed S]
"""

import argparse
import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import grpc
import numpy
from support import LONGFILL, Service, is_idle, some_tokens, wait_until, write_model, write_tokens

import longfill
from longfill.v1 import kv_pb2, kv_pb2_grpc, prefill_pb2, prefill_pb2_grpc

RANKS, MESH = 4, "sequence=2,head=2"
TOKENS = 6000  # of the prompts that faults strike; some tenths of a second
END_SECONDS = 10  # in which a request must end, whatever has struck it
SETTLE_SECONDS = 20  # until nothing is held any more: the lease, and a busy machine
EXIT_RANK_LOST = 3
MAX_GROWTH_KB = 48 << 10  # of the resident set of all ranks, from the first prompts on
ATTENTIONS = ("dense", "vertical-slash:100,300", "block-sparse:8", "block-share:4,0.05")
# Fault -> how often it is drawn.
WEIGHTS = {"cancel while it is sent": 3, "cancel while it waits": 3, "cancel while it computes": 6, "reader goes": 4,
           "client is killed": 4, "client is interrupted": 3, "deadline": 4, "refused": 3, "rank is killed": 3, "rank is stopped": 1}
FATAL = ("rank is killed", "rank is stopped")


class Prompt:
    """One Prefill call by hand, its events taken by a thread."""

    def __init__(self, channel, attention, num_tokens=TOKENS, send=None, timeout=60):
        header = prefill_pb2.PrefillHeader(num_tokens=num_tokens, attention=prefill_pb2.AttentionSpec(spec=attention))
        self._open = threading.Event()  # until it is set, the client does not half-close
        self.transfer = None
        self.events = []
        self.code = None
        self.details = ""
        self._done = threading.Event()
        ids = some_tokens(num_tokens)[: num_tokens if send is None else send]

        def requests():
            yield prefill_pb2.PrefillRequest(header=header)
            yield prefill_pb2.PrefillRequest(tokens=prefill_pb2.TokenChunk(ids=ids))
            if send is not None:
                self._open.wait(60)

        self._call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(requests(), timeout=timeout)
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self):
        try:
            for event in self._call:
                kind = event.WhichOneof("event")
                if kind == "accepted":
                    self.transfer = event.accepted.manifest.transfer_id
                self.events.append(kind)
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.code, self.details = error.code(), error.details()
        self._done.set()

    def cancel(self):
        self._call.cancel()
        self._open.set()

    def wait_for(self, kind, seconds=30):
        wait_until(lambda: kind in self.events or self._done.is_set(), seconds, f"event {kind}")

    def wait(self, seconds):
        """The status code, which must come in time."""
        if not self._done.wait(seconds):
            raise AssertionError(f"the request did not end within {seconds} s; events so far: {self.events}")
        return self.code


class Faults:
    """Strikes one running service."""

    def __init__(self, service, directory, rng):
        self.service, self.directory, self.rng = service, directory, rng
        self.channel = grpc.insecure_channel(service.target)
        self.last = ""

    def close(self):
        self.channel.close()

    def prompt(self, **options):
        return Prompt(self.channel, self.rng.choice(ATTENTIONS), **options)

    def strike(self, kind):
        getattr(self, kind.replace(" ", "_"))()

    def expect(self, prompt, *codes, seconds=END_SECONDS):
        code = prompt.wait(seconds)
        self.last = f"{code.name}: {prompt.details}"
        if code.name not in codes:
            raise AssertionError(f"ended as {self.last}, expected {' or '.join(codes)}")

    def cancel_while_it_is_sent(self):
        prompt = self.prompt(send=TOKENS // 2)
        time.sleep(self.rng.uniform(0, 0.1))
        prompt.cancel()
        self.expect(prompt, "CANCELLED")

    def cancel_while_it_waits(self):
        first = self.prompt()
        first.wait_for("accepted")
        second = self.prompt()
        second.wait_for("queued")
        second.cancel()
        self.expect(second, "CANCELLED")
        self.expect(first, "OK", seconds=60)

    def cancel_while_it_computes(self):
        prompt = self.prompt()
        prompt.wait_for("accepted")
        time.sleep(self.rng.uniform(0, 0.5))
        prompt.cancel()
        self.expect(prompt, "CANCELLED", "OK")  # it may have been quicker

    def reader_goes(self):
        prompt = self.prompt()
        prompt.wait_for("accepted")
        pages = kv_pb2_grpc.KvServiceStub(self.channel).ReadPages(kv_pb2.ReadPagesRequest(transfer_id=prompt.transfer))
        for _ in range(self.rng.randrange(4)):
            next(iter(pages), None)
        pages.cancel()
        self.expect(prompt, "OK", seconds=60)

    def client_process(self):
        out = self.directory / "out"
        return subprocess.Popen([LONGFILL, "submit", "--target", self.service.target, "--tokens", self.directory / "prompt.i32",
                                 "--out", out, "--overwrite", "--attention", self.rng.choice(ATTENTIONS)],
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def end_client(self, number, codes):
        client = self.client_process()
        time.sleep(self.rng.uniform(0, 1.0))
        client.send_signal(number)
        _, self.last = client.communicate(timeout=END_SECONDS)
        if client.returncode not in codes:
            raise AssertionError(f"submit ended with {client.returncode}: {self.last}")

    def client_is_killed(self):
        self.end_client(signal.SIGKILL, (-signal.SIGKILL, 0))

    def client_is_interrupted(self):
        # Before it handles signals it dies of this one, as any program.
        self.end_client(signal.SIGINT, (1, 0, -signal.SIGINT))

    def deadline(self):
        self.expect(self.prompt(timeout=self.rng.uniform(0.01, 0.5)), "DEADLINE_EXCEEDED", "OK")

    def refused(self):
        attention = self.rng.choice(("vertical-slash:-1,5", "spiral:3", "block-share:0,2", "a-shape:1"))
        prompt = Prompt(self.channel, attention)
        self.expect(prompt, "INVALID_ARGUMENT")
        if attention.split(":")[0] not in prompt.details:
            raise AssertionError(f"the error does not name {attention}: {prompt.details}")

    def rank_is_killed(self):
        self.end_rank(signal.SIGKILL)

    def rank_is_stopped(self):
        self.end_rank(signal.SIGSTOP)

    def end_rank(self, number):
        prompt = self.prompt()
        prompt.wait_for("accepted")
        time.sleep(self.rng.uniform(0, 0.3))
        victim = self.rng.randrange(RANKS)
        os.kill(self.service.rank_processes()[victim], number)
        # A prompt that ended before the loss was noticed has its result.
        self.expect(prompt, "UNAVAILABLE", "OK")
        if prompt.code == grpc.StatusCode.UNAVAILABLE and victim != 0 and f"rank {victim}" not in prompt.details:
            raise AssertionError(f"the error does not name rank {victim}: {prompt.details}")
        wait_until(lambda: self.service.process.poll() is not None, END_SECONDS + SETTLE_SECONDS, "the end of the group")
        wait_until(lambda: not self.service.processes(), END_SECONDS, "the end of all ranks")
        if self.service.process.returncode == 0:
            raise AssertionError("the group lost a rank and ended with 0")


def answer(target):
    """Logits and every byte of K and V of one prompt."""
    with longfill.Client(target) as client:
        prefilled = client.prefill(some_tokens(700, seed=5), attention="vertical-slash:40,100", timeout=60)
    arrays = [prefilled.logits]
    for layer in prefilled.to_numpy():
        arrays += list(layer)
    return [numpy.ascontiguousarray(array).tobytes() for array in arrays]


def resident_kb(service):
    """Of all ranks."""
    total = 0
    for pid in service.rank_processes():
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total


def open_files(service):
    return sum(len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir())) for pid in service.rank_processes())


class Run:
    def __init__(self, directory, num_faults, seed):
        self.directory, self.num_faults, self.rng = directory, num_faults, random.Random(seed)
        self.counts = collections.Counter()
        self.groups = 0
        self.expected = None
        self.growth_kb = 0
        self.model = write_model(directory / "model", num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=1 << 14)
        write_tokens(directory / "prompt.i32", some_tokens(TOKENS))

    def start(self):
        self.groups += 1
        return Service(self.model, "--lease", "1", "--threads", "1", ranks=RANKS, mesh=MESH)

    def check_answer(self, target):
        got = answer(target)
        if self.expected is None:
            self.expected = got
        assert got == self.expected, "the same prompt has another answer after faults"

    def run(self):
        while sum(self.counts.values()) < self.num_faults:
            with self.start() as service:
                self.run_group(service)

    def run_group(self, service):
        """Until all faults are through, or one of them has ended the group."""
        faults = Faults(service, self.directory, self.rng)
        try:
            for _ in range(2):
                self.check_answer(service.target)
                Prompt(faults.channel, "dense").wait(60)
            self.settle(service)
            resident, files = resident_kb(service), open_files(service)
            while sum(self.counts.values()) < self.num_faults:
                kind = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                if kind in FATAL:
                    self.check_levels(service, resident, files)
                begin = time.monotonic()
                faults.strike(kind)
                self.counts[kind] += 1
                print(f"{sum(self.counts.values()):4d} {kind:26s} {time.monotonic() - begin:6.2f} s  {' '.join(faults.last.split())[:110]}", flush=True)
                if kind in FATAL:
                    return
                self.settle(service)
                if self.rng.random() < 0.2:
                    self.check_answer(service.target)
            self.check_levels(service, resident, files)
        finally:
            faults.close()

    def check_levels(self, service, resident, files):
        """The same answer, and no more memory or open files than `resident` kB and `files`."""
        self.check_answer(service.target)
        self.settle(service)
        self.growth_kb = max(self.growth_kb, resident_kb(service) - resident)
        assert self.growth_kb <= MAX_GROWTH_KB, f"the ranks grew by {self.growth_kb} kB"
        # Connections of clients that have gone are closed in their own time.
        wait_until(lambda: open_files(service) <= files, SETTLE_SECONDS, f"{open_files(service)} open files, {files} before")

    def settle(self, service):
        wait_until(lambda: is_idle(service.target), SETTLE_SECONDS, "a service that holds nothing")
        assert service.process.poll() is None, "the service has ended"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longfill-faults-") as directory:
        run = Run(pathlib.Path(directory), arguments.faults, arguments.seed)
        run.run()
    print(f"{arguments.faults} faults, {run.groups} groups of {RANKS} ranks; most growth {run.growth_kb} kB; {dict(run.counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
