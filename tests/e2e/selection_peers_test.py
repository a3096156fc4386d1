#!/usr/bin/env python3
"""tests/bench/selection_peers.py: its block-share, in PyTorch from the definition, selects what the engine selects."""

import json
import pathlib
import re
import subprocess
import sys

import support
from support import SHARED_DIR, run

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "bench" / "selection_peers.py"
TOKENS = 2048
PATTERNS = ["block-share:4,0.1", "block-share:4,0.05,8", "block-share:4,0.1,0,8", "block-share:8,0.02,8,8",
            "block-share:8,0.02,8,8,fp8"]
PEERS = ["flash-prefill:0.1", "xattention:16,0.9", "flex-prefill:0.9", "vertical-slash:30,200,512"]


class SelectionPeers(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.model = support.needle_model()
        subprocess.run([sys.executable, SHARED_DIR / "eval" / "needle.py", "--layout", "spread", "--tokens", str(TOKENS), "--count",
                        "1", "--seed", "4", "--out", self.tmp], check=True, stdout=subprocess.DEVNULL)

    def figures(self, selections):
        """{selection: (answers kept, of, density)}"""
        options = [option for selection in selections for option in ("--selection", selection)]
        result = subprocess.run([sys.executable, SCRIPT, "--model", self.model, "--prompts", self.tmp, *options], check=True,
                                capture_output=True, text=True)
        rows = re.findall(r"\| `(.*)` \| (\d+) of (\d+) \| [\d.]+ \| ([\d.]+) \|", result.stdout)
        return {name: (int(kept), int(of), float(density)) for name, kept, of, density in rows}

    def test_block_share_is_what_the_engine_computes(self):
        figures = self.figures(PATTERNS)
        for pattern in PATTERNS:
            with self.subTest(pattern=pattern):
                result = run("prefill", "--model", self.model, "--tokens", self.tmp / "prompt_000.i32", "--attention", pattern, "--kv",
                             "discard", "--json")
                self.assertEqual(result.returncode, 0, result.stderr)
                kept, of, density = figures[pattern]
                self.assertAlmostEqual(density, json.loads(result.stdout)["density"], delta=2e-4)
                self.assertEqual((kept, density < 0.7), (of, True))

    def test_selections_of_others_leave_out_keys(self):
        figures = self.figures(PEERS)
        self.assertEqual(list(figures), PEERS)
        for name, (_, of, density) in figures.items():
            with self.subTest(name=name):
                self.assertGreater(of, 0)
                self.assertTrue(0.05 < density < 0.9, density)


if __name__ == "__main__":
    support.main()
