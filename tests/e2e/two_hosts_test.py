#!/usr/bin/env python3
"""Two hosts, as network namespaces: own addresses, own names, a link between them, two ranks on each, started by one mpirun.

Needs root and the right to make namespaces; skips, and says so, where it has them not.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import numpy
import support
from support import LONGFILL, ENVIRONMENT, some_tokens, write_model, write_tokens

import longfill

HOSTS = {"longfill-a": "10.213.77.1", "longfill-b": "10.213.77.2"}
FIRST, SECOND = HOSTS
PORT = 50151


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


class TwoHosts:
    """Context manager: the namespaces and their link; nothing of them is left behind."""

    def __init__(self, directory):
        self.directory = directory
        # A process of a host sees its network, its name and this list of hosts.
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in HOSTS.items())]
        (directory / "hosts").write_text("\n".join(lines) + "\n")
        (directory / "enter").write_text(
            "#!/bin/sh\n# HOST COMMAND...: runs it on that host\nname=$1\nshift\n"
            'exec ip netns exec "$name" unshare --uts --mount -- sh -c \'hostname "$0" && mount --bind '
            f'{directory}/hosts /etc/hosts && exec "$@"\' "$name" "$@"\n')
        (directory / "agent").write_text(
            "#!/bin/sh\n# What mpirun starts its daemon on another host with: HOST COMMAND-LINE\nname=$1\nshift\n"
            f'exec {directory}/enter "$name" sh -c "$*"\n')
        for name in ("enter", "agent"):
            (directory / name).chmod(0o755)

    def __enter__(self):
        try:
            for name in HOSTS:
                ip("netns", "add", name)
            ip("link", "add", "lf-a", "netns", FIRST, "type", "veth", "peer", "name", "lf-b", "netns", SECOND)
            for (name, address), device in zip(HOSTS.items(), ("lf-a", "lf-b")):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                for each in ("lo", device):
                    ip("-n", name, "link", "set", each, "up")
            subprocess.run(self.command(SECOND, "true"), check=True, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError) as error:
            self.__exit__()
            raise unittest.SkipTest(f"cannot make hosts of network namespaces: {getattr(error, 'stderr', None) or error}") from error
        return self

    def __exit__(self, *_):
        for name in HOSTS:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                ip("netns", "del", name)

    def command(self, host, *arguments):
        return [str(self.directory / "enter"), host, *map(str, arguments)]

    def mpirun(self, *arguments):
        """Two ranks on each host, started from the first."""
        hosts = ",".join(f"{name}:2" for name in HOSTS)
        return self.command(FIRST, "mpirun", "-np", 4, "--host", hosts, "--oversubscribe",
                            "--mca", "plm_rsh_agent", self.directory / "agent", *arguments)


class Test(support.TemporaryDirectoryTest):
    @classmethod
    def setUpClass(cls):
        directory = pathlib.Path(tempfile.mkdtemp(prefix="longfill-hosts-"))
        cls.addClassCleanup(shutil.rmtree, directory, ignore_errors=True)
        cls.hosts = TwoHosts(directory)
        cls.hosts.__enter__()
        cls.addClassCleanup(cls.hosts.__exit__, None, None, None)

    def setUp(self):
        super().setUp()
        self.model = write_model(self.tmp / "model", num_hidden_layers=4, max_position_embeddings=1 << 17)
        self.ids = some_tokens(1500)
        self.tokens = write_tokens(self.tmp / "prompt.i32", self.ids)

    def run_command(self, command, timeout=120):
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)

    def alone(self, attention):
        """Logits, and K and V of every layer, of one rank."""
        result = support.run("prefill", "--model", self.model, "--tokens", self.tokens, "--out", self.tmp / "alone",
                             "--attention", attention, "--overwrite")
        self.assertEqual(result.returncode, 0, result.stderr)
        return longfill.load_manifest(self.tmp / "alone")

    def assert_close(self, got, expected):
        self.assertLess(numpy.abs(got.logits - expected.logits).max(), 1e-3 * numpy.abs(expected.logits).max())
        for mine, theirs in zip(got.to_numpy(), expected.to_numpy(), strict=True):
            for a, b in zip(mine, theirs):
                self.assertLess(numpy.abs(a - b).max(), 1e-3 * numpy.abs(b).max())

    def test_the_batch_job_gives_what_one_rank_gives(self):
        for attention, weights in (("vertical-slash:50,200", "replicated"), ("dense", "sharded")):
            with self.subTest(attention=attention, weights=weights):
                out = self.tmp / f"out-{weights}"
                result = self.run_command(self.hosts.mpirun(
                    LONGFILL, "prefill", "--model", self.model, "--tokens", self.tokens, "--out", out, "--json",
                    "--attention", attention, "--mesh", "sequence=2,head=2", "--weights", weights))
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertEqual(json.loads(result.stdout)["ranks"], 4)
                self.assert_close(longfill.load_manifest(out), self.alone(attention))

    def serve(self):
        """A service on both hosts; ended by the test's end. Returns the process and its standard error."""
        errors = open(self.tmp / "serve.err", "w+", encoding="utf-8")  # pylint: disable=consider-using-with
        service = subprocess.Popen(  # pylint: disable=consider-using-with
            self.hosts.mpirun(LONGFILL, "serve", "--model", self.model, "--listen", f"0.0.0.0:{PORT}"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, env=ENVIRONMENT, start_new_session=True)

        def end():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(service.pid, signal.SIGKILL)
            for pid in self.ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            service.wait()
            service.stdout.close()
            errors.close()

        self.addCleanup(end)
        for line in service.stdout:
            if "longfill: serving on" in line:
                return service, errors
        errors.seek(0)
        raise AssertionError(f"the service did not start: {errors.read()}")

    def ranks(self):
        """Process ids of the ranks of this test's service, by rank."""
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "exe").resolve() == LONGFILL.resolve():
                    if str(self.model).encode() in (entry / "cmdline").read_bytes():
                        found[support.rank_of(entry.name)] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def doctor(self, *arguments):
        """Exit code, and findings by check, of a doctor over both hosts."""
        result = self.run_command(self.hosts.mpirun(LONGFILL, "doctor", "--json", "--timeout", 10, *arguments))
        report = json.loads(result.stdout)
        self.assertEqual(report["hosts"], [{"host": FIRST, "ranks": [0, 1]}, {"host": SECOND, "ranks": [2, 3]}])
        checks = {}
        for finding in report["findings"]:
            checks.setdefault(finding["check"], []).append(finding)
        return result.returncode, checks

    def test_the_doctor_looks_at_both_hosts_and_between_them(self):
        code, checks = self.doctor("--listen", f"0.0.0.0:{PORT}")
        self.assertEqual(code, 0, checks)
        self.assertEqual(checks["port.reachable"][0]["where"], [{"host": FIRST, "ranks": [0]}, {"host": SECOND, "ranks": [2]}])
        self.assertIn("pages of 4 ranks", checks["port.reachable"][0]["value"])
        self.assertEqual(checks["clock.offset"][0]["where"], [{"host": SECOND, "ranks": [2, 3]}])
        self.assertEqual(checks["clock.offset"][0]["result"], "ok")
        kinds = [finding["value"].split(":")[0] for finding in checks["exchange.bandwidth"]]
        self.assertEqual(kinds, ["inside hosts", "between hosts"])
        self.assertEqual(checks["host.name"][0]["value"], "2 hosts")

    def test_the_doctor_finds_pages_that_the_other_host_does_not_reach(self):
        code, checks = self.doctor("--listen", f"0.0.0.0:{PORT}", "--kv-listen", "127.0.0.1:0")
        self.assertEqual(code, 1)
        failed = [finding for finding in checks["port.reachable"] if finding["result"] == "failed"]
        self.assertIn("loopback", failed[0]["value"])
        self.assertIn("0.0.0.0", failed[0]["advice"])

    def test_a_client_on_the_second_host_reads_from_every_rank(self):
        service, _ = self.serve()
        out = self.tmp / "out"
        result = self.run_command(self.hosts.command(
            SECOND, LONGFILL, "submit", "--target", f"{FIRST}:{PORT}", "--tokens", self.tokens, "--out", out,
            "--attention", "vertical-slash:50,200"))
        self.assertEqual(result.returncode, 0, result.stderr)
        # Each rank serves its own tokens: those of 2 and 3 came from the second host.
        shards = json.loads((out / "manifest.json").read_text())["shards"]
        self.assertEqual([bool(shard["token_ranges"]) for shard in shards], [True] * 4)
        self.assert_close(longfill.load_manifest(out), self.alone("vertical-slash:50,200"))
        os.kill(self.ranks()[0], signal.SIGTERM)
        self.assertEqual(service.wait(30), 0)
        self.assertEqual(self.ranks(), [])

    def test_a_rank_lost_on_the_other_host_ends_the_group(self):
        service, _ = self.serve()
        long_prompt = write_tokens(self.tmp / "long.i32", some_tokens(60000))
        client = subprocess.Popen(self.hosts.command(  # pylint: disable=consider-using-with
            SECOND, LONGFILL, "submit", "--target", f"{FIRST}:{PORT}", "--tokens", long_prompt, "--out", self.tmp / "out",
            "--attention", "dense"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.assertIn("accepted", client.stderr.readline())
        victim = 3
        begin = time.monotonic()
        os.kill(self.ranks()[victim], signal.SIGKILL)
        _, stderr = client.communicate(timeout=30)
        print(f"rank {victim} killed: submit ends after {time.monotonic() - begin:.2f} s with {client.returncode}: {stderr.strip()}")
        self.assertEqual(client.returncode, 1)
        self.assertIn(f"rank {victim}", stderr)
        self.assertLess(time.monotonic() - begin, 10)
        self.assertNotEqual(service.wait(30), 0)
        deadline = time.monotonic() + 10
        while self.ranks() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.assertEqual(self.ranks(), [])


if __name__ == "__main__":
    support.main()
