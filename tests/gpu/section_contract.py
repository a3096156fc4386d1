"""The KernelSet contract suite and the tests of a GPU in the other test programs."""

import json
import re

from pack import last_lines

CONTRACT = "kernel_contract_test"
BACKENDS = ("cuda_bfloat16", "cuda_float16")
# Names of tests of a GPU in programs whose own name does not say it.
GPU_FILTER = "*cuda*:*Cuda*:*Gpu*"


def run(pack, checks, arguments):
    programs = pack.programs()
    checks.equal("the pack has the contract suite", CONTRACT in programs, True)
    if CONTRACT in programs:
        for backend in BACKENDS if arguments.device == "cuda" else ("cpu",):
            run_tests(pack, checks, CONTRACT, arguments.contract_filter or f"*/{backend}", f"{CONTRACT}, {backend}")
    if arguments.device != "cuda":
        return
    for program in programs:
        if program.endswith("_test") and program != CONTRACT:
            test_filter = "*" if "cuda" in program else GPU_FILTER
            if program.startswith("mpi_"):
                run_under_mpi(pack, checks, program, test_filter)
            else:
                run_tests(pack, checks, program, test_filter, program)


def run_tests(pack, checks, program, test_filter, name):
    """One gtest program: something runs, all that runs passes, what skips itself is named."""
    report = pack.work / f"{program}.json"
    report.unlink(missing_ok=True)
    result = pack.run(program, f"--gtest_filter={test_filter}", f"--gtest_output=json:{report}", check=False)
    if not report.exists():
        checks.fails(name, f"exit code {result.returncode}, no report: {last_lines(result.stdout)} {last_lines(result.stderr)}")
        return
    suites = json.loads(report.read_text(encoding="utf-8"))["testsuites"]
    tests = [(f"{suite['name']}.{test['name']}", test) for suite in suites for test in suite["testsuite"]
             if test["status"] == "RUN"]
    skipped = [test_name for test_name, test in tests if test.get("result") == "SKIPPED"]
    failed = [(test_name, test["failures"][0]["failure"]) for test_name, test in tests if test.get("failures")]
    for test_name, failure in failed:
        checks.fails(f"{program} {test_name}", " ".join(failure.split())[:400])
    if skipped:
        checks.info(f"{name}: tests that skipped themselves", len(skipped), ", ".join(skipped[:8]))
    checks.at_least(f"{name}: tests that ran", len(tests) - len(skipped), 1, f"filter {test_filter}")
    checks.equal(f"{name}: tests that failed", len(failed), 0)
    if result.returncode != 0 and not failed:
        checks.fails(name, f"exit code {result.returncode}: {last_lines(result.stderr)}")


def run_under_mpi(pack, checks, program, test_filter):
    """The same on two ranks of one GPU; rank 0 prints what gtest prints, the others their failures."""
    result = pack.run(program, f"--gtest_filter={test_filter}", ranks=2, check=False)
    passed = re.search(r"\[  PASSED  \] (\d+) test", result.stdout)
    skipped = re.search(r"\[  SKIPPED \] (\d+) test", result.stdout)
    checks.at_least(f"{program}, 2 ranks: tests that passed", int(passed[1]) if passed else 0, 1, f"filter {test_filter}")
    if skipped:
        checks.info(f"{program}, 2 ranks: tests that skipped themselves", int(skipped[1]))
    checks.equal(f"{program}, 2 ranks: exit code", result.returncode, 0, last_lines(result.stderr) if result.returncode else "")
