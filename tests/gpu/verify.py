#!/usr/bin/env python3
"""Holds the prebuilt programs of a pack (pack.sh) to what they must do on this machine's GPU; builds nothing.

    verify.py --pack DIR --out RESULTS.json                          # every section
    verify.py --pack DIR --sections contract,goldens --limit contract=120
    verify.py --pack DIR --device cpu --small                        # the logic of this script, without a GPU

One line a check: outcome, section, what, measured value, bound. A section runs in a process of its own under its own time
limit (seconds); what it had reported before it was cut off counts. The last lines are a summary. Exit code 0: no check
failed, no section was cut off and, but for --allow-not-run, every check ran: those that did not are listed with the reason.
"""

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from checks import Checks
from pack import Pack, ProgramError

# Section (module section_NAME) -> time limit in seconds.
SECTIONS = {"contract": 400, "sanitizer": 500, "goldens": 300, "needle": 570, "spread": 400, "bench": 570, "service": 300,
            "attention": 570}
# Of several GPUs (multi_gpu.sh), in 8 minutes.
RANKS_SECTIONS = {"nccl": 150, "meshes": 115, "scaling": 140, "readers": 30, "ranklost": 45}
GRACE_SECONDS = 10


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=pathlib.Path, required=True, help="the folder that pack.sh made")
    parser.add_argument("--sections", default=",".join(SECTIONS),
                        help=f"some of {','.join(SECTIONS)} (default: all); for several GPUs {','.join(RANKS_SECTIONS)}")
    parser.add_argument("--ranks", type=int, default=2, help="of the sections for several GPUs, one rank on each (default: 2)")
    parser.add_argument("--limit", action="append", default=[], metavar="SECTION=SECONDS", help="another time limit")
    parser.add_argument("--out", type=pathlib.Path, help="all checks as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes: a test of this script, not of the programs")
    parser.add_argument("--contract-filter", help="gtest filter of the section contract (default: tests of the device)")
    parser.add_argument("--memcheck-filter", help="gtest filter of memcheck (default: in section_sanitizer.py)")
    parser.add_argument("--racecheck-filter", help="gtest filter of racecheck (default: in section_sanitizer.py)")
    parser.add_argument("--goldens", metavar="NAME,...", help="some models only: folders of golden/ and models/")
    parser.add_argument("--needle", metavar="TOKENS=PROMPTS,...", help="lengths and prompts of the section needle")
    parser.add_argument("--spread", metavar="TOKENS=PROMPTS,...", help="lengths and prompts of the section spread")
    parser.add_argument("--budgets", metavar="V/S,...", default="1000/6096,3500/100,500/700",
                        help="of the section needle; another pattern as NAME:A/B")
    parser.add_argument("--coverage", metavar="COVERAGE,...", default="tiles,parity",
                        help="of the sparse runs of the section needle: tiles, parity (the published kernels'), or both (default)")
    parser.add_argument("--two-dense", metavar="TOKENS,...",
                        help="lengths at which torch's dense attention runs too, for the second bound on KL")
    parser.add_argument("--bench", metavar="CASE,...", help="some cases of the section bench only (section_bench.py)")
    parser.add_argument("--bench-repeat", type=int, help="runs with and without the KV copy (default: sparse 1, dense 2)")
    parser.add_argument("--attention", metavar="PART,...", help="some parts of the section attention (section_attention.py)")
    parser.add_argument("--reference-tflops", type=float, help="R of the section attention (default: its part peers measures it)")
    parser.add_argument("--figures", type=pathlib.Path, help="all figures of the section attention as JSON")
    parser.add_argument("--allow-not-run", action="store_true", help="exit code 0 although some checks did not run")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # this process is that section
    parser.add_argument("--lines", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.sections = arguments.sections.split(",")
    limits = SECTIONS | RANKS_SECTIONS
    unknown = sorted(set(arguments.sections) - set(limits))
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(limits)}")
    for text in arguments.limit:
        name, _, seconds = text.partition("=")
        if name not in limits or not seconds.isdigit():
            parser.error(f"--limit {text}: expected SECTION=SECONDS")
        limits[name] = int(seconds)
    arguments.limits = limits
    return arguments


def run_section(arguments):
    """In the section's own process."""
    with tempfile.TemporaryDirectory(prefix=f"longfill-{arguments.section}-") as work:
        checks = Checks(arguments.section, arguments.lines)
        try:
            module = importlib.import_module(f"section_{arguments.section}")
            module.run(Pack(arguments.pack, work, arguments.device), checks, arguments)
        except (ProgramError, OSError) as error:
            checks.fails("the section came to an end", str(error))
        except Exception:  # pylint: disable=broad-except  # a bug in a section must not hide the others
            checks.fails("the section came to an end", " | ".join(traceback.format_exc().strip().splitlines()[-3:]))


def start_section(name, arguments, lines):
    """Runs one section under its limit; returns an error or None."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--section", name, "--lines", str(lines)]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(arguments.limits[name])
            return None if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            return f"cut off after {arguments.limits[name]} s"
        finally:
            end_section(process)


def live_processes():
    """{process id: (parent, session, start time)} of all that live. Start times tell a process from a later one of its number."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
                if fields[0] not in "ZX":
                    found[int(entry.name)] = (int(fields[1]), int(fields[3]), int(fields[19]))
    return found


def section_processes(leader, known=()):
    """{process id: start time} of what a section (`leader` of its session) started and lives: its session, where ranks stay
    whose mpirun is gone, what comes of these or of `known` in sessions of its own, and `known` itself."""
    live = live_processes()
    known = dict(known)
    found = {pid: start for pid, (_, session, start) in live.items() if session == leader or known.get(pid) == start}
    while True:
        more = {pid: start for pid, (parent, _, start) in live.items() if pid not in found and parent in found}
        if not more:
            return found
        found |= more


def end_section(process):
    """Ends the section with all that it started, ranks included. SIGTERM goes to its process group and to sessions that it began,
    and mpirun passes it on to its ranks; SIGKILL to what is left after GRACE_SECONDS."""
    remaining = section_processes(process.pid)
    for pid in remaining:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == process.pid or os.getsid(pid) == pid:
                os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while remaining and time.monotonic() < deadline:
        time.sleep(0.1)
        process.poll()
        remaining = section_processes(process.pid, remaining)
    for pid in remaining:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def describe_machine(device):
    if device != "cuda":
        return "no GPU was asked for"
    query = "name,driver_version,memory.total,clocks.max.sm"
    try:
        result = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True,
                                text=True, check=False, timeout=60)
        return result.stdout.strip() or result.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"


def summarise(records, ends, seconds, allow_not_run):
    """The last lines; returns the exit code."""
    print()
    failed = False
    for name, error in ends.items():
        outcomes = [r["outcome"] for r in records if r["section"] == name]
        bad = outcomes.count("FAIL") or error is not None
        failed = failed or bool(bad)
        print(f"{'FAIL' if bad else 'pass':7s} {name:9s} {outcomes.count('pass')} passed, {outcomes.count('FAIL')} failed, "
              f"{outcomes.count('not run')} not run, {seconds[name]:.0f} s{'' if error is None else f', {error}'}")
    for record in records:
        if record["outcome"] == "FAIL":
            print(f"  {record['section']}: {record['check']}: {record['value']} {record['relation']} {record['bound']} "
                  f"{record['note']}".rstrip())
        elif record["outcome"] == "not run":
            print(f"  {record['section']}: {record['check']}: not run: {record['note']}")
            failed = failed or not allow_not_run
    passed = sum(r["outcome"] == "pass" for r in records)
    checked = sum(r["outcome"] in ("pass", "FAIL") for r in records)
    print(f"{'FAIL' if failed else 'pass':7s} {passed} of {checked} checks passed, {sum(seconds.values()):.0f} s")
    return 1 if failed else 0


def main():
    arguments = parse_arguments()
    if arguments.section:
        run_section(arguments)
        return 0
    machine = describe_machine(arguments.device)
    print(machine, flush=True)
    ends, seconds, records = {}, {}, []
    with tempfile.TemporaryDirectory(prefix="longfill-verify-") as work:
        for name in arguments.sections:
            lines = pathlib.Path(work) / f"{name}.jsonl"
            lines.touch()
            begin = time.monotonic()
            ends[name] = start_section(name, arguments, lines)
            seconds[name] = time.monotonic() - begin
            records += [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
            if arguments.out:
                report = {"machine": machine, "device": arguments.device, "ended": ends, "seconds": seconds, "checks": records}
                arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return summarise(records, ends, seconds, arguments.allow_not_run)


if __name__ == "__main__":
    sys.exit(main())
