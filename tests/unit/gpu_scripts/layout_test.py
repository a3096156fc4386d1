#!/usr/bin/env python3
"""Scripts that travel find what they need in a fresh source tree and in a pack, and say what is missing."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[3]
SOURCE = ROOT / "deploy" / "python" / "src" / "longfill"


class Layout(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="longfill-layout-")
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name) / "root"

    def copy(self, source, *target):
        path = self.root.joinpath(*target)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
        return path

    def write(self, text, *target):
        path = self.root.joinpath(*target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run_script(self, script, *arguments, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LONGFILL_")}
        return subprocess.run([*script, *arguments], env=clean | environment, capture_output=True, text=True, check=False)

    def search_needle(self, *arguments, **environment):
        script = self.copy(ROOT / "tests" / "bench" / "search_needle.py", "tests", "bench", "search_needle.py")
        return self.run_script([sys.executable, script], *arguments, **environment)

    def test_the_search_needs_no_generated_code(self):
        self.copy(SOURCE / "safetensors_io.py", "deploy", "python", "src", "longfill", "safetensors_io.py")
        result = self.search_needle("--help")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        result = self.search_needle(LONGFILL_BINARY_DIR="/no/such/build")
        self.assertEqual((result.returncode, result.stderr.split(";")[0]), (1, "/no/such/build/bin/longfill is missing"))

    def test_the_search_takes_all_from_a_pack(self):
        """The program there is one that says with what it was called, and fails."""
        self.copy(SOURCE / "safetensors_io.py", "python", "longfill", "safetensors_io.py")
        self.write("#!/bin/sh\necho \"called: $*\" >&2\nexit 3\n", "programs", "run")
        self.write("{}", "models", "needle-20m", "config.json")
        self.write("import json, pathlib, sys\nout = pathlib.Path(sys.argv[-1])\nout.mkdir()\n"
                   "(out / 'answers.json').write_text(json.dumps([{'file': 'a', 'answer': [1, 2]}]))\n", "eval", "needle.py")
        result = self.search_needle("--tokens", "2048")
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertIn(f"called: longfill search --model {self.root / 'models' / 'needle-20m'} --tokens", result.stderr)
        (self.root / "eval" / "needle.py").unlink()
        self.assertIn("needle.py is missing", self.search_needle().stderr)

    def multi_gpu(self, *arguments, nvidia_smi=None):
        """multi_gpu.sh with a Python and an nvidia-smi of ours; (result, what the Python was called with)."""
        script = self.copy(ROOT / "tests" / "gpu" / "multi_gpu.sh", "tests", "gpu", "multi_gpu.sh")
        self.write(nvidia_smi or "#!/bin/sh\nexit 9\n", "bin", "nvidia-smi")
        self.write(f"#!/bin/sh\necho \"$*\" >>{self.root}/calls\nexit 7\n", "bin", "python")
        result = self.run_script([script], "--python", self.root / "bin" / "python", "--out", self.root / "out.json", *arguments,
                                 "pack", PATH=f"{self.root / 'bin'}:{os.environ['PATH']}")
        calls = self.root / "calls"
        return result, calls.read_text().splitlines() if calls.exists() else []

    def test_gpus_that_cannot_be_counted_are_not_two(self):
        result, calls = self.multi_gpu()
        self.assertEqual((result.returncode, calls), (2, []))
        self.assertIn("--ranks N", result.stderr)
        for listed, word in (("", "there are 0"), ("echo GPU 0", "there are 1")):
            result, calls = self.multi_gpu(nvidia_smi=f"#!/bin/sh\n{listed}\n")
            self.assertEqual((result.returncode, calls), (2, []))
            self.assertIn(word, result.stderr)
        for ranks in ("x", "2.5", "-1"):
            self.assertEqual(self.multi_gpu("--ranks", ranks)[0].returncode, 2)

    def test_an_old_table_is_not_printed_for_a_run_that_failed(self):
        self.write("{}", "out.json")
        result, calls = self.multi_gpu(nvidia_smi="#!/bin/sh\necho GPU 0\necho GPU 1\necho GPU 2\n")
        self.assertEqual(result.returncode, 7)
        self.assertEqual(len(calls), 1, calls)  # of verify.py
        self.assertIn("--ranks 3 ", calls[0])
        self.assertFalse((self.root / "out.json").exists())


if __name__ == "__main__":
    unittest.main()
