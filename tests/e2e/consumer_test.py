#!/usr/bin/env python3
"""cmake --install, then a project of its own that uses find_package(longfill) and runs.

    consumer_test.py --cmake CMAKE --build-type TYPE
"""

import argparse
import os
import subprocess
import sys

import support
from support import GOLDEN, Service, write_model

parser = argparse.ArgumentParser()
parser.add_argument("--cmake", default="cmake")
parser.add_argument("--build-type", default="Release")
ARGUMENTS, REST = parser.parse_known_args()


class Consumer(support.TemporaryDirectoryTest):
    def setUp(self):
        super().setUp()
        self.prefix = self.tmp / "prefix"
        self.call(ARGUMENTS.cmake, "--install", support.BINARY_DIR, "--prefix", self.prefix)

    def call(self, *command):
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
        self.assertEqual(result.returncode, 0, f"{' '.join(map(str, command))}\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
        return result.stdout

    def test_both_libraries_build_and_run_from_the_installed_tree(self):
        build = self.tmp / "build"
        self.call(ARGUMENTS.cmake, "-G", "Ninja", "-S", support.ROOT / "tests" / "e2e" / "consumer", "-B", build,
                  f"-DCMAKE_PREFIX_PATH={self.prefix}", f"-DCMAKE_BUILD_TYPE={ARGUMENTS.build_type}")
        self.call(ARGUMENTS.cmake, "--build", build)
        one = self.call(build / "prefill_in_process", GOLDEN / "llama-gqa4", 1)
        self.assertIn("KV rows 600", one)  # 300 tokens, 2 layers
        self.assertEqual(self.call(build / "prefill_in_process", GOLDEN / "llama-gqa4", 3), one)
        with Service(write_model(self.tmp / "model"), ranks=2) as service:
            self.assertIn("KV rows 180", self.call(build / "prefill_over_grpc", service.target))

    def test_the_installed_program_runs(self):
        self.assertIn("longfill", self.call(self.prefix / "bin" / "longfill", "--version"))
        self.assertTrue(os.access(self.prefix / "bin" / "longfill", os.X_OK))


if __name__ == "__main__":
    sys.argv[1:] = REST
    support.main()
