#!/usr/bin/env python3
"""How verify.py ends a section: everything that it started gets the grace, and nothing of it is left."""

import pathlib
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import verify  # noqa: E402

# A section that dies of SIGTERM at once. Its child is as mpirun: in its group, it passes the signal on to a rank in a group
# of its own, which takes `seconds` to drain.
SECTION = """
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
time.sleep(600)
"""
MPIRUN = """
import os, signal, subprocess, sys
ranks = []
signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
ranks.append(subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], preexec_fn=os.setpgrp))
ranks[0].wait()
"""
RANK = """
import pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
def drain(*_):
    if seconds < 0:
        return  # deaf
    time.sleep(seconds)
    (folder / "drained").touch()
    sys.exit()
signal.signal(signal.SIGTERM, drain)
(folder / "started").touch()
while True:
    time.sleep(600)
"""
# A program in a session of its own, as compute-sanitizer gets one.
OTHER_SESSION = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True).wait()
"""


class EndOfASection(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="longfill-verify-")
        self.addCleanup(directory.cleanup)
        self.tmp = pathlib.Path(directory.name)

    def end(self, *programs, grace):
        """Starts a section and ends it; seconds that it took."""
        with (mock.patch.object(verify, "GRACE_SECONDS", grace),
              subprocess.Popen([sys.executable, "-c", SECTION, *map(str, programs)], start_new_session=True) as process):
            while not (self.tmp / "started").exists():
                time.sleep(0.05)
            started = verify.section_processes(process.pid)
            self.assertEqual(len(started), 3)
            begin = time.monotonic()
            verify.end_section(process)
            seconds = time.monotonic() - begin
        left = verify.section_processes(process.pid, started)
        for _ in range(100):  # until the kernel has done what SIGKILL says
            if not left:
                break
            time.sleep(0.1)
            left = verify.section_processes(process.pid, started)
        self.assertEqual(left, {})
        return seconds

    def test_a_rank_has_time_to_drain(self):
        self.assertGreater(self.end(MPIRUN, RANK, self.tmp, 1.5, grace=120), 1)
        self.assertTrue((self.tmp / "drained").exists())

    def test_a_rank_that_is_deaf_is_killed_after_the_grace(self):
        self.assertGreater(self.end(MPIRUN, RANK, self.tmp, -1, grace=1), 0.9)

    def test_a_session_of_its_own_is_ended_as_well(self):
        self.end(OTHER_SESSION, RANK, self.tmp, 1, grace=120)
        self.assertTrue((self.tmp / "drained").exists())

    def test_a_section_that_has_ended_takes_no_time(self):
        with subprocess.Popen([sys.executable, "-c", ""], start_new_session=True) as process:
            process.wait()
            begin = time.monotonic()
            verify.end_section(process)
        self.assertLess(time.monotonic() - begin, verify.GRACE_SECONDS)


if __name__ == "__main__":
    unittest.main()
