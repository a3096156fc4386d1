"""The KernelSet contract suite and the tests of a GPU in the other test programs."""

import concurrent.futures
import json
import re

from pack import last_lines

CONTRACT = "kernel_contract_test"
BACKENDS = ("cuda_bfloat16", "cuda_float16", "cuda_generic_bfloat16")
# Names of tests of a GPU in programs whose own name does not say it.
GPU_FILTER = "*cuda*:*Cuda*:*Gpu*"
# Tests that look at the device's free memory run alone; the others in processes side by side, most of whose time goes to
# references on the CPU.
ALONE = "*Memory*"
SHARDS = 6


def run(pack, checks, arguments):
    programs = pack.programs()
    checks.equal("the pack has the contract suite", CONTRACT in programs, True)
    if CONTRACT in programs:
        for backend in BACKENDS if arguments.device == "cuda" else ("cpu",):
            name = f"{CONTRACT}, {backend}"
            if arguments.contract_filter:
                run_tests(pack, checks, CONTRACT, arguments.contract_filter, name)
                continue
            run_tests(pack, checks, CONTRACT, f"*/{backend}-{ALONE}", name, SHARDS)
            run_tests(pack, checks, CONTRACT, f"{ALONE}/{backend}", f"{name}, memory")
    if arguments.device != "cuda":
        return
    for program in programs:
        if program.endswith("_test") and program != CONTRACT:
            test_filter = "*" if "cuda" in program else GPU_FILTER
            if program.startswith("mpi_"):
                run_under_mpi(pack, checks, program, test_filter)
            else:
                run_tests(pack, checks, program, test_filter, program)


def run_tests(pack, checks, program, test_filter, name, num_shards=1, may_skip=True):
    """One gtest program: something runs, all that runs passes, what skips itself is named, or is an error."""
    with concurrent.futures.ThreadPoolExecutor(num_shards) as pool:
        shards = list(pool.map(lambda shard: run_shard(pack, program, test_filter, shard, num_shards), range(num_shards)))
    tests = []
    for result, report in shards:
        if report is None:
            checks.fails(name, f"exit code {result.returncode}, no report: {last_lines(result.stdout)} {last_lines(result.stderr)}")
            return
        shard_tests = [(f"{suite['name']}.{test['name']}", test) for suite in report["testsuites"]
                       for test in suite["testsuite"] if test["status"] == "RUN"]
        if result.returncode != 0 and not any(test.get("failures") for _, test in shard_tests):
            checks.fails(name, f"exit code {result.returncode}: {last_lines(result.stderr)}")
        tests += shard_tests
    skipped = [test_name for test_name, test in tests if test.get("result") == "SKIPPED"]
    failed = [(test_name, test["failures"][0]["failure"]) for test_name, test in tests if test.get("failures")]
    for test_name, failure in failed:
        checks.fails(f"{program} {test_name}", " ".join(failure.split())[:400])
    if skipped and may_skip:
        checks.info(f"{name}: tests that skipped themselves", len(skipped), ", ".join(skipped[:8]))
    elif skipped:
        checks.equal(f"{name}: tests that skipped themselves", len(skipped), 0, ", ".join(skipped[:8]))
    checks.at_least(f"{name}: tests that ran", len(tests) - len(skipped), 1, f"filter {test_filter}")
    checks.equal(f"{name}: tests that failed", len(failed), 0)


def run_shard(pack, program, test_filter, shard, num_shards):
    """Its result and gtest's report, None if it left none."""
    report = pack.work / f"{program}-{shard}.json"
    report.unlink(missing_ok=True)
    result = pack.run(program, f"--gtest_filter={test_filter}", f"--gtest_output=json:{report}", check=False,
                      environment={"GTEST_TOTAL_SHARDS": str(num_shards), "GTEST_SHARD_INDEX": str(shard)})
    return result, json.loads(report.read_text(encoding="utf-8")) if report.exists() else None


def run_under_mpi(pack, checks, program, test_filter, ranks=2, may_skip=True):
    """The same under mpirun; rank 0 prints what gtest prints, the others their failures."""
    # mpirun gives its ranks a terminal, so that gtest would write colours between the words.
    result = pack.run(program, f"--gtest_filter={test_filter}", "--gtest_color=no", ranks=ranks, check=False)
    passed = re.search(r"\[  PASSED  \] (\d+) test", result.stdout)
    skipped = re.search(r"\[  SKIPPED \] (\d+) test", result.stdout)
    name = f"{program}, {ranks} ranks"
    checks.at_least(f"{name}: tests that passed", int(passed[1]) if passed else 0, 1, f"filter {test_filter}")
    if skipped and may_skip:
        checks.info(f"{name}: tests that skipped themselves", int(skipped[1]))
    elif skipped:
        checks.equal(f"{name}: tests that skipped themselves", int(skipped[1]), 0)
    # gtest prints what it found between the test's name and this line.
    failed = re.findall(r"^\[  FAILED  \] (\S+?),? .*\(\d+ ms\)", result.stdout, re.MULTILINE)
    for test_name in failed:
        output = result.stdout.partition(f"[ RUN      ] {test_name}\n")[2].partition("[  FAILED  ]")[0]
        checks.fails(f"{name}: {test_name}", " ".join(output.split())[:400])
    checks.equal(f"{name}: exit code", result.returncode, 0, last_lines(result.stderr, 8) if result.returncode else "")
