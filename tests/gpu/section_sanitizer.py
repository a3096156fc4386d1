"""compute-sanitizer over the contract suite: memcheck on its small tests, racecheck on fewer; one run for each test suite."""

import concurrent.futures
import os
import re
import shutil
import signal
import subprocess

from section_contract import CONTRACT

BACKEND = "cuda_bfloat16"
# Tests whose shapes take the tools minutes, by words of their names: they are slowed 10 to 100 times.
LARGE = "*Large*:*MoreThan*:*Long*:*Million*:*Beyond*"
# racecheck looks at shared memory alone, which the tests of these use.
RACECHECK_SUITES = ("Attention", "LastQuery", "Selection", "Representatives", "Index", "Elementwise")
SUITE_SECONDS = 150
CONCURRENT = 8  # processes that share the GPU


def run(pack, checks, arguments):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if arguments.device != "cuda" or tool is None:
        checks.not_run("memcheck and racecheck", "--device cpu" if tool else "there is no compute-sanitizer")
        return
    suites = test_suites(pack)
    memcheck = [arguments.memcheck_filter] if arguments.memcheck_filter else [f"{s}.*/{BACKEND}-{LARGE}" for s in suites]
    racecheck = [arguments.racecheck_filter] if arguments.racecheck_filter else [
        f"{s}.*/{BACKEND}-{LARGE}" for s in suites if any(word in s for word in RACECHECK_SUITES)]
    runs = [("memcheck", test_filter) for test_filter in memcheck] + [("racecheck", test_filter) for test_filter in racecheck]
    with concurrent.futures.ThreadPoolExecutor(CONCURRENT) as pool:
        list(pool.map(lambda run: sanitize(pack, checks, tool, *run), runs))


def test_suites(pack):
    """Names of the suites of the contract program that have small tests of this backend."""
    listed = pack.run(CONTRACT, "--gtest_list_tests", f"--gtest_filter=*/{BACKEND}-{LARGE}").stdout
    return [line.rstrip(".") for line in listed.splitlines() if line and not line.startswith((" ", "#")) and line.endswith(".")]


def sanitize(pack, checks, tool, name, test_filter):
    """Runs one tool; counts its errors and the tests that passed under it. Cut off, it counts as not run unless there were
    errors by then."""
    # Calls that fail are our tests' business: some make them fail.
    options = ["--report-api-errors", "no"] if name == "memcheck" else []
    command = [tool, "--tool", name, *options, "--target-processes", "all", "--print-limit", "20",
               *pack.command(CONTRACT, f"--gtest_filter={test_filter}")]
    log = pack.work / f"{name}-{test_filter.split('.')[0].replace('/', '-')}.log"
    with open(log, "w", encoding="utf-8") as out:
        code = run_with_limit(command, out, pack.environment())
    text = log.read_text(encoding="utf-8", errors="replace")
    what = f"{name}, {test_filter.split('.')[0].split('/')[-1]}"
    passed = len(re.findall(r"^\[       OK \]", text, re.MULTILINE))
    failed = re.findall(r"^\[  FAILED  \] (\S+) \(", text, re.MULTILINE)
    reports = [line.lstrip("= ") for line in text.splitlines()
               if line.startswith("=========") and re.search(r"Invalid|Error: |hazard|leaked|[Ee]rror \d", line)
               and "SUMMARY" not in line]
    summaries = [int(n) for n in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)]
    errors = sum(summaries) if summaries else len(reports)
    if code is None and not errors and not failed:
        checks.not_run(what, f"cut off after {SUITE_SECONDS} s; {passed} tests had passed without an error")
        return
    if code is not None and not summaries:
        checks.fails(what, f"no summary, exit code {code}: {text[-300:]}")
        return
    checks.at_least(f"{what}: tests that passed", passed, 1)
    checks.equal(f"{what}: errors", errors, 0, reports[0][:200] if reports else f"{passed} tests passed")
    checks.equal(f"{what}: tests that failed", len(failed), 0, ", ".join(failed[:3]))


def run_with_limit(command, out, environment):
    """The exit code; None: it was ended, with all that it started, after SUITE_SECONDS."""
    with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(SUITE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
