#!/usr/bin/env python3
"""Runs clang-tidy over the .cc files of a build and fails on any finding. Standard library only.

    tests/tidy.py --build build/cpu [--seconds 600] [--jobs N] [FILE ...]

A file that was found clean is not looked at again until it, a header it includes, .clang-tidy or clang-tidy changes. With
--seconds the run stops starting new files after that time, says how many are left, and the next run goes on with them.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("kernels/", "parallel/", "models/", "runtime/", "deploy/", "tests/")


def compile_commands(build):
    """Source file relative to ROOT -> (directory, compile command), for files of ours."""
    commands = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        path = pathlib.Path(entry["directory"], entry["file"]).resolve()
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).as_posix().startswith(FOLDERS):
            commands[path.relative_to(ROOT).as_posix()] = (entry["directory"], entry["command"])
    return commands


def fingerprint(directory, command, tool):
    """Hash of everything that clang-tidy's answer for a file depends on: its preprocessed text and the configuration."""
    words = shlex.split(command)
    if pathlib.Path(words[0]).name == "ccache":
        words = words[1:]
    keep, skip = [], False
    for word in words:
        if skip or word == "-c":
            skip = False
        elif word == "-o":
            skip = True
        else:
            keep.append(word)
    text = subprocess.run([*keep, "-E", "-P"], cwd=directory, capture_output=True, check=True).stdout
    return hashlib.sha256(text + (ROOT / ".clang-tidy").read_bytes() + tool).hexdigest()


def changed_files():
    """Files that differ from the last commit, or in it; they are looked at first."""
    names = set()
    for command in (["git", "diff", "--name-only", "HEAD"], ["git", "show", "--name-only", "--format=", "HEAD"]):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        names |= set(result.stdout.split())
    return names


class Runner:
    def __init__(self, build, seconds):
        self.build = build
        self.deadline = time.monotonic() + seconds if seconds else None
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "longfill-tidy"
        cache.mkdir(parents=True, exist_ok=True)
        self.cache = cache
        self.tool = subprocess.run(["clang-tidy", "--version"], capture_output=True, check=True).stdout

    def check(self, name, directory, command):
        """"clean", "late", or clang-tidy's findings."""
        stamp = self.cache / fingerprint(directory, command, self.tool)
        if stamp.exists():
            return "clean"
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "late"
        result = subprocess.run(["clang-tidy", "-p", str(self.build), "--quiet", name], cwd=ROOT, capture_output=True,
                                text=True)
        if result.returncode != 0:
            return result.stdout + "".join(line for line in result.stderr.splitlines(True) if "error" in line)
        stamp.touch()
        return "clean"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, help="start no further file after this time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("files", nargs="*", help="default: all of the build")
    arguments = parser.parse_args()
    commands = compile_commands(arguments.build.resolve())
    names = [pathlib.Path(f).resolve().relative_to(ROOT).as_posix() for f in arguments.files] or sorted(commands)
    unknown = [name for name in names if name not in commands]
    if unknown:
        parser.error(f"not in the build: {' '.join(unknown)}")
    first = changed_files()
    names.sort(key=lambda name: (name not in first, name))
    runner = Runner(arguments.build.resolve(), arguments.seconds)
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        answers = list(pool.map(lambda name: runner.check(name, *commands[name]), names))
    findings = [answer for answer in answers if answer not in ("clean", "late")]
    for answer in findings:
        print(answer)
    late = answers.count("late")
    print(f"clang-tidy: {len(names)} files, {len(findings)} with findings, {late} not reached in time, "
          f"{time.monotonic() - begin:.0f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
