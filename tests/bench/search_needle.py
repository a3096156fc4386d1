#!/usr/bin/env python3
"""The pattern search on needle-20m, from calibration to judgement: is the file that it finds as good as uniform
vertical-slash 1000/6096 at half its attention time, on prompts that it has not seen?

    tests/bench/search_needle.py [--tokens 32768,131072] [--judge-tokens 524288] [--device cuda] [--samples 2] [--judge 3] [--work DIR]

Calibrates and searches on prompts of seed 1 (end layout, as many as --samples for each length), with the time
of the longest one as the target; then judges on prompts of seed 5001 (as many as --judge): recall and seconds by
`longfill search --evaluate`, passes by `longfill prefill` with the first token of the answer appended. Prints the table
of tests/bench/RESULTS.md. In a source tree it needs the shared folder (LONGFILL_SHARED_DIR) and a build
(LONGFILL_BINARY_DIR); in a pack of tests/gpu/pack.sh it takes all from there. Python: numpy alone.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
REFERENCE = "vertical-slash:1000,6096"
SEARCH_SEED, JUDGE_SEED = 1, 5001


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are."""

    program: tuple[pathlib.Path | str, ...]  # and its first arguments
    model: pathlib.Path
    make_needles: pathlib.Path
    package: pathlib.Path  # the source of the Python package

    @classmethod
    def find(cls, root):
        """In a pack, else in a source tree."""
        if (root / "programs" / "run").exists():
            return cls((root / "programs" / "run", "longfill"), root / "models" / "needle-20m", root / "eval" / "needle.py",
                       root / "python" / "longfill")
        build = pathlib.Path(os.environ.get("LONGFILL_BINARY_DIR", root / "build" / "cpu"))
        shared = pathlib.Path(os.environ.get("LONGFILL_SHARED_DIR", root.parent / "shared"))
        return cls((build / "bin" / "longfill",), shared / "models" / "needle-20m", shared / "eval" / "needle.py",
                   root / "deploy" / "python" / "src" / "longfill")

    def require(self):
        """Ends the script where something is missing."""
        for path in (self.program[0], self.model / "config.json", self.make_needles, self.package / "safetensors_io.py"):
            if not path.is_file():
                sys.exit(f"{path} is missing; LONGFILL_BINARY_DIR and LONGFILL_SHARED_DIR say where builds and models are")


PLACES = Places.find(ROOT)
MODEL = PLACES.model


def read_safetensors(path):
    """{name: array}. The package as a whole needs code that is generated and gRPC; this file of it needs neither."""
    spec = importlib.util.spec_from_file_location("safetensors_io", PLACES.package / "safetensors_io.py")
    safetensors_io = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(safetensors_io)
    return {name: array for name, (_, array) in safetensors_io.read(path).items()}


def longfill(*arguments):
    """Standard output of `longfill ...`; ends the script with its error."""
    result = subprocess.run([*map(str, PLACES.program), *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"longfill {' '.join(map(str, arguments))} left with {result.returncode}")
    return result.stdout


def make_prompts(out, tokens, count, seed):
    """[(path, answer)]"""
    subprocess.run([sys.executable, PLACES.make_needles, "--tokens", str(tokens), "--count", str(count), "--seed",
                    str(seed), "--out", out], check=True)
    return [(out / entry["file"], entry["answer"]) for entry in json.loads((out / "answers.json").read_text())]


def passes(prompts, attention, device, work):
    """How many prompts are answered: both tokens rank first where the first of them is given."""
    count = 0
    for path, answer in prompts:
        ids = numpy.append(numpy.fromfile(path, dtype="<i4"), numpy.int32(answer[0]))
        extended = work / "extended.i32"
        ids.tofile(extended)
        out = work / "out"
        longfill("prefill", "--model", MODEL, "--tokens", extended, "--out", out, "--overwrite", "--kv", "discard",
                 "--attention", attention, "--logits", f"{len(ids) - 2},{len(ids) - 1}", "--json", *device)
        logits = read_safetensors(out / "logits.safetensors")["logits"]
        count += logits.argmax(axis=-1).tolist() == answer
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192", help="lengths, separated by commas")
    parser.add_argument("--samples", type=int, default=2, help="calibration prompts of each length")
    parser.add_argument("--judge", type=int, default=3, help="prompts of each length that it is judged on")
    parser.add_argument("--time", type=float, default=0.45, help="target of the search; below a half, since a prediction errs")
    parser.add_argument("--target-tokens", default="", help="lengths at which the time counts (default: the longest)")
    parser.add_argument("--per-length", action="store_true", help="patterns of their own for each length")
    parser.add_argument("--judge-tokens", default="", help="lengths that it is judged at (default: those of the search)")
    parser.add_argument("--value", default="end", help="what makes a candidate good, as `longfill search` takes it")
    parser.add_argument("--end-share", default="0.5", help="of --value end")
    parser.add_argument("--candidates", action="append", default=[], metavar="SPEC", help="in place of what `longfill search` tries")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=pathlib.Path, help="where files stay (default: a temporary folder)")
    args = parser.parse_args()
    PLACES.require()
    lengths = [int(text) for text in args.tokens.split(",")]
    device = ["--device", args.device]
    candidates = [part for spec in args.candidates for part in ("--candidates", spec)]
    with tempfile.TemporaryDirectory(prefix="longfill-search-") as temporary:
        work = args.work or pathlib.Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        samples = [path for n in lengths for path, _ in make_prompts(work / f"search-{n}", n, args.samples, SEARCH_SEED)]
        tokens = [part for path in samples for part in ("--tokens", path)]
        patterns, costs = work / "patterns.json", work / "costs.json"
        begin = time.monotonic()
        if not costs.exists():
            longfill("search", "--model", MODEL, *tokens, "--calibrate", "--out", costs, *candidates, *device)
        calibrated = time.monotonic()
        end_share = ["--end-share", args.end_share] if args.value == "end" else []
        targets = ["--per-length"] if args.per_length else ["--target-tokens", args.target_tokens or max(lengths)]
        print(longfill("search", "--model", MODEL, *tokens, "--cost", costs, "--out", patterns, "--time", args.time,
                       "--rows", args.rows, "--value", args.value, *end_share, *targets, *candidates, *device))
        print(f"calibration {calibrated - begin:.1f} s, search {time.monotonic() - calibrated:.1f} s", flush=True)
        print("| tokens | pattern | passed | mean recall | last rows | mean error | density | attention, s | index, s |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for n in [int(text) for text in args.judge_tokens.split(",")] if args.judge_tokens else lengths:
            prompts = make_prompts(work / f"judge-{n}", n, args.judge, JUDGE_SEED)
            judged = json.loads(longfill("search", "--model", MODEL, *[p for path, _ in prompts for p in ("--tokens", path)],
                                         "--evaluate", REFERENCE, "--evaluate", patterns, "--rows", args.rows, "--json",
                                         *device))
            for result in judged["results"]:
                name = "found" if result["attention"] == str(patterns) else result["attention"]
                passed = passes(prompts, result["attention"], device, work)
                print(f"| {n} | {name} | {passed}/{len(prompts)} | {result['mean_recall']:.5f} | "
                      f"{result['last_rows_recall']:.5f} | {result['mean_error']:.5f} | {result['density']:.4f} | "
                      f"{result['attention_seconds']:.4g} | {result['index_seconds']:.4g} |", flush=True)


if __name__ == "__main__":
    main()
