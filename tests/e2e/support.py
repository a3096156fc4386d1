"""Helpers of the end-to-end tests: the program, services under mpirun, tiny models, greedy continuation."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY_DIR = pathlib.Path(os.environ.get("LONGFILL_BINARY_DIR", ROOT / "build" / "cpu"))
SHARED_DIR = pathlib.Path(os.environ.get("LONGFILL_SHARED_DIR", ROOT.parent / "shared"))
LONGFILL = BINARY_DIR / "bin" / "longfill"
GOLDEN = ROOT / "tests" / "golden" / "data"
SMOLLM2 = ROOT / "build" / "models" / "SmolLM2-135M-Instruct"
PACKAGE = ROOT / "deploy" / "python"

SKIPPED = 77  # SKIP_RETURN_CODE of the ctest tests
MPIRUN = ["mpirun", "--oversubscribe"]
ENVIRONMENT = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

sys.path.insert(0, str(PACKAGE / "src"))
sys.path.insert(0, str(PACKAGE))
import generate_protos  # noqa: E402

generate_protos.generate()


def needle_model():
    """Directory of needle-20m; skips the test where the shared folder is absent."""
    directory = SHARED_DIR / "models" / "needle-20m"
    if not (directory / "config.json").is_file():
        raise unittest.SkipTest(f"LONGFILL_SHARED_DIR ({SHARED_DIR}) has no models/needle-20m")
    return directory


def smollm2_model():
    """Directory of SmolLM2-135M-Instruct, made when it is not there."""
    subprocess.run([sys.executable, ROOT / "deploy" / "model_from_gguf.py", SMOLLM2], check=True)
    return SMOLLM2


def run(*arguments, ranks=None, timeout=240, **options):
    """Runs `longfill ...`, under mpirun where `ranks` is given; returns the completed process with text output."""
    command = [str(LONGFILL), *map(str, arguments)]
    if ranks is not None:
        command = [*MPIRUN, "-np", str(ranks), *command]
    options.setdefault("stdin", subprocess.DEVNULL if "input" not in options else None)
    if options["stdin"] is None:
        del options["stdin"]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, **options)


def has_gpu():
    """Whether this machine and this build compute on a GPU."""
    return run("inspect", "--model", GOLDEN / "llama-gqa7-tied", "--device", "cuda").returncode == 0


def wait_until(condition, seconds=20, what="condition"):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true within {seconds} s")


def server_status(target):
    import grpc

    from longfill.v1 import admin_pb2, admin_pb2_grpc

    with grpc.insecure_channel(target) as channel:
        return admin_pb2_grpc.AdminServiceStub(channel).GetServerStatus(admin_pb2.GetServerStatusRequest(), timeout=10)


def is_idle(target):
    """No prompt computes, none waits, and no KV memory is held."""
    status = server_status(target)
    return (not status.HasField("running") and status.queue_length == 0 and status.open_transfers == 0
            and status.kv_bytes_held == 0 and status.kv_bytes_lingering == 0)


def rank_of(pid):
    """The rank that mpirun gave a process; 0 where there is none. OSError where there is no such process."""
    environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    rank = [e.split(b"=")[1] for e in environment if e.startswith(b"OMPI_COMM_WORLD_RANK=")]
    return int(rank[0]) if rank else 0


class Service:
    """A running `longfill serve`; a context manager that leaves no process behind."""

    def __init__(self, model, *options, ranks=1, mesh=None):
        self.model, self.ranks = model, ranks
        command = [str(LONGFILL), "serve", "--model", str(model), "--listen", "127.0.0.1:0", *map(str, options)]
        if mesh is not None:
            command += ["--mesh", mesh]
        if ranks > 1:
            command = [*MPIRUN, "-np", str(ranks), *command]
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="longfill-service-"))
        self._out = open(self.directory / "out", "w", encoding="utf-8")
        self._err = open(self.directory / "err", "w", encoding="utf-8")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err,
                                        env=ENVIRONMENT, start_new_session=True)
        self.target = None

    def __enter__(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in (self.directory / "out").read_text(encoding="utf-8").splitlines():
                if "longfill: serving on " in line:
                    self.target = line.split("longfill: serving on ")[1].strip()
                    return self
            time.sleep(0.05)
        errors = self.stderr()
        self.__exit__(None, None, None)
        raise AssertionError(f"the service did not start: {errors}")

    def __exit__(self, *_):
        # The ranks themselves: mpirun would kill them a second later.
        for pid in self.rank_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._out.close()
        self._err.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def stderr(self):
        return (self.directory / "err").read_text(encoding="utf-8")

    def processes(self):
        """Ids of all processes of the service that run, found by its listen port's owner: our children and theirs."""
        children = {}
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                    if fields[0] != "Z":
                        children.setdefault(int(fields[1]), []).append(int(entry.name))
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop()
            queue += children.get(pid, [])
            if self.process.poll() is None or pid != self.process.pid:
                found.append(pid)
        return found

    def rank_processes(self):
        """Process ids of the ranks, by rank."""
        ranks = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if pathlib.Path(f"/proc/{pid}/exe").resolve().name == "longfill":
                    ranks[rank_of(pid)] = pid
        return [ranks[rank] for rank in sorted(ranks)]


def write_model(directory, seed=1, **changes):
    """A tiny random Llama of float32 weights; `changes` to its config. Returns the directory."""
    import numpy

    from longfill import safetensors_io

    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=97, rms_norm_eps=1e-5,
        rope_theta=10000.0, max_position_embeddings=4096, tie_word_embeddings=True, hidden_act="silu",
        attention_bias=False, mlp_bias=False, torch_dtype="float32",
    ) | changes
    random = numpy.random.default_rng(seed)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
        shapes |= {
            name + "input_layernorm": (hidden,), name + "post_attention_layernorm": (hidden,),
            name + "self_attn.q_proj": (queries, hidden), name + "self_attn.k_proj": (keys, hidden),
            name + "self_attn.v_proj": (keys, hidden), name + "self_attn.o_proj": (hidden, queries),
            name + "mlp.gate_proj": (config["intermediate_size"], hidden),
            name + "mlp.up_proj": (config["intermediate_size"], hidden),
            name + "mlp.down_proj": (hidden, config["intermediate_size"]),
        }
    tensors = {}
    for name, shape in shapes.items():
        weight = numpy.ones(shape) if len(shape) == 1 else random.normal(0, 0.3, shape)
        tensors[name + ".weight"] = ("F32", weight.astype(numpy.float32))
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_io.write(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_tokens(path, ids):
    path.write_bytes(struct.pack(f"<{len(ids)}i", *ids))
    return path


def some_tokens(count, vocab_size=97, seed=3):
    import numpy

    return numpy.random.default_rng(seed).integers(0, vocab_size, count).tolist()


def greedy_continuation(model, cache, token, count):
    """`count` ids: `token`, then what a transformers model says from the cache on."""
    import torch

    tokens = [token]
    with torch.no_grad():
        while len(tokens) < count:
            logits = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def files_below(directory):
    return sorted(p.relative_to(directory).as_posix() for p in pathlib.Path(directory).rglob("*") if p.is_file())


class TemporaryDirectoryTest(unittest.TestCase):
    """Test case with a fresh directory `self.tmp`."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="longfill-e2e-")
        self.addCleanup(directory.cleanup)
        self.tmp = pathlib.Path(directory.name)


def main():
    """unittest.main(), with SKIPPED as exit code when every test was skipped."""
    program = unittest.main(module="__main__", exit=False, verbosity=2)
    result = program.result
    if not result.wasSuccessful():
        sys.exit(1)
    sys.exit(SKIPPED if result.testsRun and len(result.skipped) == result.testsRun else 0)
