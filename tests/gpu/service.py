"""The service on the ranks of this machine, and a client that reads its KV cache."""

import contextlib
import os
import pathlib
import signal
import subprocess
import tempfile
import time

from pack import ProgramError, last_lines
from prompts import make_prompts


class Service:
    """`longfill serve` on the ranks of this machine."""

    def __init__(self, pack, model, *options, ranks=2):
        self._pack = pack
        self._command = pack.command("longfill", "serve", "--model", model, "--device", pack.device, "--listen", "127.0.0.1:0",
                                     *options, ranks=ranks)
        self.target = None

    def __enter__(self):
        self._folder = pathlib.Path(tempfile.mkdtemp(dir=self._pack.work))
        with open(self._folder / "out", "wb") as out, open(self._folder / "err", "wb") as err:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                             env=self._pack.environment())
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self._process.poll() is None:
            for line in (self._folder / "out").read_text(encoding="utf-8").splitlines():
                if "longfill: serving on " in line:
                    self.target = line.split("longfill: serving on ")[1].strip()
                    return self
            time.sleep(0.1)
        self.__exit__()
        raise ProgramError(f"the service did not start: {last_lines(self.log())}")

    def rank_processes(self):
        """Process ids of the ranks that live, in order of rank."""
        children = pathlib.Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        ranks = {}
        for pid in children.read_text(encoding="utf-8").split():
            environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found = [int(v.split(b"=")[1]) for v in environment if v.startswith(b"OMPI_COMM_WORLD_RANK=")]
            if found:
                ranks[found[0]] = int(pid)
        return [ranks[rank] for rank in sorted(ranks)]

    def wait(self, seconds):
        """The exit code of mpirun; None: it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def log(self):
        return (self._folder / "err").read_text(encoding="utf-8")

    def __exit__(self, *_):
        # The ranks themselves, so that they drain: mpirun kills them a second after it got the signal.
        with contextlib.suppress(OSError):
            for pid in self.rank_processes():
                os.kill(pid, signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(30)


def check_reader(pack, checks, service, num_tokens, tier):
    """A reader that waits for every layer gets it while later ones compute, from every rank; its pages."""
    import longfill  # from the pack

    ids = make_prompts(pack, num_tokens - 1, 1)[0][1]
    with longfill.Client(service.target) as client:
        result = client.prefill(ids, attention="vertical-slash:1000,6096", kv_dtype="bfloat16")
    manifest, figures, transfer = result.manifest, result.figures, result.transfer
    expected = 2 * manifest.num_layers * manifest.num_kv_heads * num_tokens * manifest.head_dim * 2
    name = f"reader at {num_tokens} tokens, tier {tier}"
    checks.equal(f"{name}: bytes, every checksum right", transfer["bytes"], expected)
    firsts = [rank["first_page_seconds"] for rank in transfer["ranks"]]
    checks.equal(f"{name}: ranks that gave pages", len(firsts), figures["ranks"])
    checks.at_most(f"{name}: first page of the last rank, s after the start", max(firsts), figures["seconds"],
                   "before the prefill's end")
    checks.info(f"{name}: bytes before the prefill's end", transfer["bytes_before_end"], f"of {expected}")
    checks.info(f"{name}: last page, s after the start", transfer["last_page_seconds"], f"prefill {figures['seconds']:.2f} s")
    return result.to_numpy()
