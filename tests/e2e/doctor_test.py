#!/usr/bin/env python3
"""`longfill doctor` alone and under mpirun, and launches that MPI does not join, which every command of ranks refuses."""

import json
import os
import signal
import socket
import subprocess
import time
import unittest

import support
from support import ENVIRONMENT, GOLDEN, LONGFILL, MPIRUN, run, some_tokens, write_model, write_tokens

RESULTS = {"ok", "warning", "failed", "skipped"}
# What srun sets in each of its tasks, as Slurm 22.05 does.
STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}


def with_variables(variables, *arguments):
    return subprocess.run([str(LONGFILL), *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=120, env=ENVIRONMENT | variables)


class DoctorTest(support.TemporaryDirectoryTest):
    def report(self, result):
        """The report of --json, by check; its counts are those of its findings."""
        report = json.loads(result.stdout)
        for name in RESULTS:
            self.assertEqual(report[name], sum(f["result"] == name for f in report["findings"]), name)
        for finding in report["findings"]:
            self.assertEqual(bool(finding["advice"]), finding["result"] in ("warning", "failed"), finding)
            self.assertTrue(finding["where"], finding)
        checks = {}
        for finding in report["findings"]:
            checks.setdefault(finding["check"], []).append(finding)
        return report, checks

    def failed(self, checks):
        return {name for name, findings in checks.items() if any(f["result"] == "failed" for f in findings)}


class Alone(DoctorTest):
    def test_nothing_fails_and_the_table_says_where(self):
        result = run("doctor")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertEqual(result.stderr, "")
        self.assertIn(f"ranks: {socket.gethostname()} 0\n", result.stdout)
        self.assertRegex(result.stdout, r"0 failed, \d+ warnings, \d+ ok, \d+ skipped\n$")
        for check in ("launch.ranks", "build.version", "cpu.cores", "memory.shm", "limits.files", "port.listen"):
            self.assertRegex(result.stdout, rf"(?m)^(ok|warning|skipped) +{check} ")

    def test_json_is_one_object(self):
        result = run("doctor", "--json", "--listen", "127.0.0.1:0", "--model", GOLDEN / "llama-gqa4")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        report, checks = self.report(result)
        self.assertEqual((report["ranks"], report["launcher"], report["device"]), (1, "", "cpu"))
        self.assertEqual(report["hosts"], [{"host": socket.gethostname(), "ranks": [0]}])
        self.assertIn("weights take", checks["memory.available"][0]["value"])
        self.assertEqual(checks["port.listen"][0]["result"], "ok")
        self.assertEqual(checks["port.reachable"][0]["result"], "ok")

    def test_a_taken_port_fails_by_name(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            result = run("doctor", "--json", "--listen", address)
        self.assertEqual(result.returncode, 1)
        _, checks = self.report(result)
        self.assertEqual(self.failed(checks), {"port.listen"})
        self.assertIn(address, checks["port.listen"][0]["value"])
        self.assertIn("another port", checks["port.listen"][0]["advice"])

    def test_limits_of_the_process_are_seen(self):
        command = f"ulimit -n 512; exec taskset -c 0 {LONGFILL} doctor --json"
        result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
        _, checks = self.report(result)
        self.assertEqual((checks["limits.files"][0]["result"], checks["limits.files"][0]["value"]), ("warning", "512"))
        if os.cpu_count() > 1:
            self.assertEqual(checks["cpu.binding"][0]["result"], "warning")
            self.assertIn("core 0 of", checks["cpu.binding"][0]["value"])

    def test_bad_usage_is_refused(self):
        for arguments, word in ((["--listen", "nowhere"], "nowhere"), (["--kv-listen", "127.0.0.1:0"], "--listen"),
                                (["--timeout", "0"], "--timeout"), (["--model", self.tmp], str(self.tmp))):
            result = run("doctor", *arguments)
            self.assertEqual(result.returncode, 2, arguments)
            self.assertEqual(result.stdout, "")
            self.assertIn(word, result.stderr)

    def test_a_gpu_is_looked_for_or_refused_by_name(self):
        result = run("doctor", "--device", "cuda", "--json")
        if "built without CUDA" in result.stderr:
            self.assertEqual(result.returncode, 2)
            self.assertIn("--device cuda", result.stderr)
            return
        _, checks = self.report(result)
        self.assertEqual(result.returncode, 1 if self.failed(checks) else 0)
        self.assertIn("cuda.driver", checks)
        self.assertTrue(support.has_gpu() or self.failed(checks))


class UnderMpirun(DoctorTest):
    def test_all_ranks_take_part_and_rank_0_speaks(self):
        result = run("doctor", "--json", "--listen", "127.0.0.1:0", ranks=3)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        report, checks = self.report(result)
        self.assertEqual((report["ranks"], report["launcher"]), (3, "mpirun"))
        for name in ("exchange.reduction", "exchange.latency", "exchange.bandwidth", "port.reachable", "mpi.equal"):
            self.assertIn(name, checks)
        # Equal findings of the ranks are one.
        self.assertEqual([f["where"][0]["ranks"] for f in checks["exchange.reduction"]], [[0, 1, 2]])
        self.assertEqual([f["where"][0]["ranks"] for f in checks["mpi.library"]], [[0, 1, 2]])
        self.assertEqual(checks["mpi.threads"][0]["result"], "ok")

    def test_a_taken_port_of_one_rank_names_the_rank(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1] - 1  # of rank 0; rank 1 listens one above
            result = run("doctor", "--json", "--listen", "127.0.0.1:0", "--kv-listen", f"127.0.0.1:{port}", ranks=3)
        self.assertEqual(result.returncode, 1)
        _, checks = self.report(result)
        taken = [f for f in checks["port.kv"] if f["result"] == "failed"]
        self.assertIn([1], [f["where"][0]["ranks"] for f in taken])

    def test_a_rank_of_another_build_is_named(self):
        """Ranks of one mpirun whose programs differ: a copy with another commit in it."""
        program = LONGFILL.read_bytes()
        commit = json.loads(run("doctor", "--json").stdout)["commit"].encode()
        self.assertIn(commit + b"\0", program)
        other = self.tmp / "longfill"
        other.write_bytes(program.replace(commit + b"\0", b"f" * len(commit) + b"\0"))
        other.chmod(0o755)
        result = subprocess.run([*MPIRUN, "-np", "2", LONGFILL, "doctor", "--json", ":", "-np", "1", other, "doctor", "--json"],
                                capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
        self.assertEqual(result.returncode, 1, result.stderr)
        _, checks = self.report(result)
        self.assertEqual(checks["build.version"][0]["result"], "failed")
        self.assertRegex(checks["build.version"][0]["value"], "ranks 0-1: .*; rank 2: .*ffff")

    def test_a_rank_that_never_comes_ends_the_wait(self):
        """Rank 1 is stopped before it starts MPI, so MPI_Init of rank 0 hangs: the step has a limit, and is named."""
        stopped = 'if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then kill -STOP $$; fi; exec "$@"'
        begin = time.monotonic()
        process = subprocess.Popen([*MPIRUN, "-np", "2", "sh", "-c", stopped, "sh", LONGFILL, "doctor", "--json", "--timeout", "1"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
                                   start_new_session=True)
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self.assertLess(time.monotonic() - begin, 40)
        self.assertNotEqual(process.returncode, 0, stderr)
        report = json.loads(stdout)
        self.assertEqual([f["check"] for f in report["findings"] if f["result"] == "failed"], ["group.launch"])


class WrongLaunch(DoctorTest):
    def test_doctor_says_what_srun_needs(self):
        result = with_variables(STEP, "doctor", "--json")
        self.assertEqual(result.returncode, 1, result.stderr)
        _, checks = self.report(result)
        self.assertEqual(self.failed(checks), {"launch.ranks"})
        self.assertIn("SLURM_STEP_NUM_TASKS=4", checks["launch.ranks"][0]["value"])
        self.assertIn("srun --mpi=pmix", checks["launch.ranks"][0]["advice"])

    def test_commands_of_ranks_refuse_it(self):
        model = write_model(self.tmp / "model")
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(300))
        for command in (["serve", "--model", model, "--listen", "127.0.0.1:0"],
                        ["prefill", "--model", model, "--tokens", tokens, "--out", self.tmp / "out"]):
            result = with_variables(STEP, *command)
            self.assertEqual(result.returncode, 2, result.stderr)
            self.assertIn("srun has started 4 processes", result.stderr)
            self.assertIn("srun --mpi=pmix", result.stderr)
            self.assertEqual(len(result.stderr.splitlines()), 1)
            # One process speaks for all.
            result = with_variables(STEP | {"SLURM_PROCID": "3"}, *command)
            self.assertEqual((result.returncode, result.stderr), (2, ""))
        self.assertFalse((self.tmp / "out").exists())

    def test_an_mpirun_of_another_mpi_is_refused(self):
        """PMI of a launcher that the MPI library does not speak: it would start as rank 0 of 1."""
        result = with_variables({"PMI_RANK": "0", "PMI_SIZE": "2"}, "prefill", "--model", write_model(self.tmp / "model"),
                                "--tokens", write_tokens(self.tmp / "prompt.i32", [1, 2, 3]), "--out", self.tmp / "out")
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn("PMI_SIZE=2", result.stderr)

    def test_an_allocation_alone_is_no_launch(self):
        model = write_model(self.tmp / "model")
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(300))
        batch = {name: STEP[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}
        for variables in (batch, STEP | {"SLURM_STEP_NUM_TASKS": "1"}):
            result = with_variables(variables, "prefill", "--model", model, "--tokens", tokens, "--out", self.tmp / "out",
                                    "--overwrite")
            self.assertEqual(result.returncode, 0, result.stderr)


class LaunchLine(support.TemporaryDirectoryTest):
    def test_serve_and_prefill_say_what_was_chosen(self):
        model = write_model(self.tmp / "model")
        tokens = write_tokens(self.tmp / "prompt.i32", some_tokens(300))
        with support.Service(model, "--threads", 2, ranks=2) as service:
            lines = [json.loads(line) for line in service.stderr().splitlines() if line.startswith("{")]
        launch = [line for line in lines if line["event"] == "launch"]
        self.assertEqual(len(launch), 1)
        self.assertEqual(launch[0]["launcher"], "mpirun")
        self.assertEqual(launch[0]["ranks"], f"{socket.gethostname()} 0-1")
        self.assertEqual((launch[0]["ranks_per_host"], launch[0]["threads"], launch[0]["nccl"]), ("2", "2", ""))
        self.assertIn("CPU (", launch[0]["devices"])
        self.assertTrue(launch[0]["cores"])
        result = run("prefill", "--model", model, "--tokens", tokens, "--out", self.tmp / "out", ranks=2)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn(f"ranks by mpirun: {socket.gethostname()} 0-1; devices: CPU (", result.stderr)
        self.assertIn("; exchange: ", result.stderr)


if __name__ == "__main__":
    support.main()
