"""`longfill bench attention` and `bench index` beside the attention of PyTorch, against the rates that they have to reach.

R is what cuDNN reaches at head dim 128, causal, 8 heads and 131,072 tokens in the same run (tests/bench/peers.py). Effective
rates are FLOP of the published pairs over index and attention time. Every part can be picked by name (--attention).
"""

import json
import math
import subprocess
import sys
import traceback

from checks import error_ratio
from pack import last_lines

PATTERNS = "Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json"
OPTIONAL_PEERS = ("flash-attention-3", "flash-attn-4")  # packages of their own
DENSE_OF_CUDNN = {128: 0.95, 64: 0.9}  # head dim -> least ratio to cuDNN at the same shape
BLOCKS_OF_R = {"128x128": 0.85, "128x64": 0.75, "64x64": 0.5}
PERCENT = (5, 10, 20)
BUDGETS_OF_R = {"1000,6096": 0.70, "500,700": 0.70, "30,800": 0.70, "100,800": 0.70, "3500,100": 0.55}
STRETCH = 0.85
A_SHAPES_OF_R = {"128,1024": 0.6, "1024,4096": 0.8}
INDEX_MS = {32768: 0.3, 131072: 0.6, 1048576: 3.0}  # a layer, 32 query and 8 KV heads
MAX_FINISH_IMBALANCE = 0.03
# Timed runs and runs whose bits are compared: a million tokens take seconds a run.
RUNS = {32768: (10, 10), 131072: (6, 10), 524288: (3, 3), 1048576: (3, 2)}
SMALL_RUNS = (2, 2)
SMALL_TOKENS = {32768: 1000, 131072: 1500, 524288: 1700, 1048576: 2048}


class Suite:
    """Runs the parts, keeps a row of the table for each case, and all figures."""

    def __init__(self, pack, checks, arguments):
        self.pack, self.checks, self.small = pack, checks, arguments.small
        self.reference = arguments.reference_tflops
        self.cudnn = {}  # (tokens, head dim) -> TFLOP/s
        self.rows = []
        self.figures = {}

    def tokens(self, count):
        return SMALL_TOKENS[count] if self.small else count

    def record_of(self, count):
        return self.pack.path("data", f"needle_indices_{count}.safetensors")

    # Peers

    def measure_peers(self, name, *options):
        out = self.pack.work / f"{name}.json"
        script = self.pack.path("tests", "bench", "peers.py")
        command = [sys.executable, str(script), "--device", self.pack.device, "--out", str(out), *options]
        result = subprocess.run(command + ["--small"] * self.small, capture_output=True, text=True, check=False)
        if not out.exists():
            self.checks.fails(f"{name}: peers.py", " | ".join(result.stderr.strip().splitlines()[-3:]))
            return None
        report = json.loads(out.read_text(encoding="utf-8"))
        self.figures[name] = report
        for peer in report["peers"]:
            what = f"{peer['peer']}, {peer['case']}, {peer['tokens']} tokens, D {peer['head_dim']}"
            self.checks.equal(f"{what}: right", peer["passed"], True, f"{peer['tflops']:.1f} TFLOP/s, error {peer['error']:.1e}")
            self.rows.append(row(name, f"{peer['peer']} {peer['case']}", peer["tokens"], peer["head_dim"], peer["seconds"],
                                 rate=peer["tflops"]))
        for missing in report["missing"]:
            name, why = f"{missing['peer']} {missing['options']}", missing["why"][:150]
            if missing["peer"] in OPTIONAL_PEERS:
                self.checks.info(name, "not here", why)
            else:
                self.checks.fails(name, why)
        return report

    def peers(self):
        names = "math" if self.pack.device == "cpu" else ",".join(("cudnn", "flash", *OPTIONAL_PEERS))
        report = self.measure_peers("peers", "--only", names)
        if report is None:
            return
        for peer in report["peers"]:
            if peer["peer"] in ("cudnn", "math"):
                self.cudnn[(peer["tokens"], peer["head_dim"])] = peer["tflops"]
        self.reference = report["reference_tflops"] or self.reference

    def flex(self):
        self.measure_peers("flex", "--only", "flex", *(["--tokens", "131072"] if not self.small else []))

    # Ours

    def bench(self, part, counts, *options):
        """The cases of one run of `longfill bench attention` at each of `counts` tokens."""
        repeat, bit_runs = SMALL_RUNS if self.small else RUNS[max(counts)]
        lengths = ",".join(str(self.tokens(count)) for count in counts)
        arguments = ["bench", "attention", "--device", self.pack.device, "--json", "--tokens", lengths,
                     "--repeat", repeat, "--bit-runs", bit_runs, *options]
        if self.reference:
            arguments += ["--reference-tflops", self.reference]
        result = self.pack.run("longfill", *arguments, check=False)
        if not result.stdout.startswith("{"):
            self.checks.fails(f"{part}, {lengths} tokens", f"exit code {result.returncode}: {result.stderr.strip()[-300:]}")
            return []
        report = json.loads(result.stdout)
        self.figures.setdefault(part, []).append(report)
        for case in report["cases"]:
            self.check_answers(part, case)
        return report["cases"]

    def check_answers(self, part, case):
        # NaN and infinity are null in JSON.
        check = {name: math.inf if value is None else value for name, value in case["check"].items()}
        what = f"{part}, {case['name']}, {case['tokens']} tokens, D {case['head_dim']}"
        self.checks.at_most(f"{what}: error over the naive one", error_ratio(check["max_error"], check["naive_max_error"]), 2.0,
                            f"{check['rows']} rows, {check['max_error']:.2e}; rms {check['rms_error']:.2e} "
                            f"and naive {check['naive_rms_error']:.2e}")
        generic = f", generic kernels differ by {check['generic_difference']:.2e}" if "generic_difference" in check else ""
        self.checks.equal(f"{what}: right", check["passed"], True,
                          f"bits {'equal' if check['bits_equal'] else 'DIFFER'} over {check['bit_runs']} runs of "
                          f"{check['compared_heads']} heads{generic}, lse error {check['lse_error']:.1e} of {check['lse_limit']:.1e}")

    def judge(self, part, case, value, bound, what):
        """One rate against what it has to reach, and its row."""
        name = f"{part}, {case['name']}, {case['tokens']} tokens, D {case['head_dim']}"
        timing = case["attention_seconds"]
        note = (f"{1e3 * case['sum_seconds']['median']:.2f} ms (attention {1e3 * timing['min']:.2f} to "
                f"{1e3 * timing['max']:.2f}), pairs published {case['published']['pairs']}, covered {case['covered']['pairs']}, "
                f"computed {case['computed']['pairs']}")
        if bound is None or value is None:
            self.checks.info(f"{name}: {what}", value, note)
        elif self.small:
            self.checks.at_least(f"{name}: {what}", value, 0.0, note)
        else:
            self.checks.at_least(f"{name}: {what}", value, bound, note)
        self.rows.append(row(part, case["name"], case["tokens"], case["head_dim"], case["sum_seconds"],
                             index=case.get("index_seconds"), rate=case["covered"]["tflops"],
                             effective=case["effective_tflops"], ratio=value, bound=bound, case=case))

    def dense(self):
        for case in self.bench("dense", (32768, 131072), "--attention", "dense", "--head-dim", "128,64,96", "--q-heads", 8,
                               "--kv-heads", 8):
            peer = self.cudnn.get((case["tokens"], case["head_dim"]))
            ratio = None if peer is None else case["covered"]["tflops"] / peer
            self.judge("dense", case, ratio, DENSE_OF_CUDNN.get(case["head_dim"]), "of cuDNN there")

    def blocks(self):
        specs = [f"random-blocks:{percent},{layout}" for layout in BLOCKS_OF_R for percent in PERCENT]
        options = [word for spec in specs for word in ("--attention", spec)]
        for case in self.bench("blocks", (131072,), "--q-heads", 8, "--kv-heads", 8, *options):
            self.judge("blocks", case, case.get("covered_ratio"), BLOCKS_OF_R[case["name"].rsplit(",", 1)[1]], "of R, covered")

    def vertical_slash(self):
        options = [word for budget in BUDGETS_OF_R for word in ("--attention", f"vertical-slash:{budget}")]
        for count in (131072, 524288, 1048576):
            for case in self.bench("vertical-slash", (count,), "--heads", 64, "--indices", self.record_of(count), *options):
                self.judge("vertical-slash", case, case.get("effective_ratio"), BUDGETS_OF_R[case["name"].split(":")[1]],
                           f"of R, effective (stretch {STRETCH})")

    def parity(self):
        for case in self.bench("parity", (131072,), "--heads", 64, "--indices", self.record_of(131072), "--coverage", "parity",
                               "--attention", "vertical-slash:1000,6096"):
            self.judge("parity", case, case.get("effective_ratio"), None, "of R, effective")
            difference = case["covered"]["pairs"] - case["published"]["pairs"]
            self.checks.equal("parity: covered pairs less published ones", difference, 0)

    def a_shape(self):
        options = [word for shape in A_SHAPES_OF_R for word in ("--attention", f"a-shape:{shape}")]
        for case in self.bench("a-shape", (131072, 1048576), *options):
            self.judge("a-shape", case, case.get("covered_ratio"), A_SHAPES_OF_R[case["name"].split(":")[1]], "of R, covered")

    def mixed(self):
        common = ["--patterns", self.pack.path("patterns", PATTERNS), "--indices", self.record_of(131072)]
        for heads in ((32, 8), (4, 1)):
            for case in self.bench("mixed", (32768, 131072), *common, "--q-heads", heads[0], "--kv-heads", heads[1]):
                self.judge("mixed", case, case.get("effective_ratio"), None, "of R, effective")
                name = f"{case['name']}, {case['tokens']} tokens: latest less mean end, of the call"
                if "finish_imbalance" in case:
                    self.checks.at_most(name, case["finish_imbalance"], MAX_FINISH_IMBALANCE,
                                        f"{case['thread_blocks']} thread blocks")
                elif self.pack.device == "cpu":
                    self.checks.info(name, None, "the CPU has no thread blocks")
                else:
                    self.checks.fails(name, "the kernels did not say when a thread block ended")

    def index(self):
        counts = ",".join(str(self.tokens(count)) for count in INDEX_MS)
        result = self.pack.run("longfill", "bench", "index", "--device", self.pack.device, "--json", "--tokens", counts,
                               "--repeat", 2 if self.small else 20)
        report = json.loads(result.stdout)
        self.figures["index"] = report
        bounds = {self.tokens(count): bound for count, bound in INDEX_MS.items()}
        for case in report["cases"]:
            name = f"index, budget {case['budget']}, {case['tokens']} tokens: ms"
            ms = 1e3 * case["index_seconds"]["median"]
            steps = ", ".join(f"{step} {1e3 * timing['median']:.3f}" for step, timing in case["step_seconds"].items())
            note = f"with pairs counted {1e3 * case['with_pairs_seconds']['median']:.3f}; {steps}"
            if self.small:
                self.checks.at_least(name, ms, 0.0, note)
            else:
                self.checks.at_most(name, ms, bounds[case["tokens"]], note)
            self.rows.append(row("index", case["budget"], case["tokens"], report["head_dim"], case["index_seconds"]))

    def print_table(self):
        print(f"\n{'part':14s} {'case':42s} {'tokens':>7s} {'D':>4s} {'ms':>10s} {'spread':>7s} {'index':>7s} {'covered':>8s} "
              f"{'effect.':>8s} {'ratio':>6s} {'bound':>6s} {'err':>5s} {'ends':>6s}")
        for line in self.rows:
            print(line)
        if self.reference:
            print(f"R = {self.reference:.1f} TFLOP/s; ms with the index, rates in TFLOP/s, err over the naive one", flush=True)


PARTS = {"peers": Suite.peers, "dense": Suite.dense, "blocks": Suite.blocks, "vertical-slash": Suite.vertical_slash,
         "parity": Suite.parity, "a-shape": Suite.a_shape, "mixed": Suite.mixed, "index": Suite.index, "flex": Suite.flex}


def row(part, name, tokens, head_dim, seconds, *, index=None, rate=None, effective=None, ratio=None, bound=None, case=None):
    def cell(value, form):
        return "" if value is None else format(value, form)
    spread = (seconds["max"] - seconds["min"]) / seconds["median"]
    check = (case or {}).get("check")
    error = error_ratio(check["max_error"], check["naive_max_error"]) if check else None
    ends = (case or {}).get("finish_imbalance")
    return (f"{part:14s} {name:42s} {tokens:7d} {head_dim:4d} {1e3 * seconds['median']:10.3f} {100 * spread:6.1f}% "
            f"{cell(index and 1e3 * index['median'], '.3f'):>7s} {cell(rate, '.1f'):>8s} {cell(effective, '.1f'):>8s} "
            f"{cell(ratio, '.3f'):>6s} {cell(bound, '.2f'):>6s} {cell(error, '.2f'):>5s} "
            f"{cell(ends and 100 * ends, '.1f') + '%' if ends else '':>6s}"
            f"{'' if ratio is None or bound is None or ratio >= bound else ' BELOW'}").rstrip()


def run(pack, checks, arguments):
    suite = Suite(pack, checks, arguments)
    names = arguments.attention.split(",") if arguments.attention else list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        checks.fails("--attention", f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
        return
    try:
        for name in names:
            try:
                PARTS[name](suite)
            except Exception:  # pylint: disable=broad-except  # the parts after it are measured all the same
                checks.fails(f"part {name} came to an end", last_lines(traceback.format_exc()))
    finally:
        suite.print_table()
        if arguments.figures:
            arguments.figures.write_text(json.dumps(suite.figures, indent=1) + "\n", encoding="utf-8")
