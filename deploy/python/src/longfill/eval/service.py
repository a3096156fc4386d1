"""One `longfill serve` for the whole evaluation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from .errors import EvalError, UsageError

_START_SECONDS = 1800  # a large checkpoint from a slow disk
_DRAIN_SECONDS = 60
_SERVING = "longfill: serving on "
_PATTERNS = "--patterns"


def patterns_digest(model: pathlib.Path, options: Sequence[str]) -> str:
    """Hash of the pattern files that a service with these options takes "auto" from: the file of --patterns, or all of a
    directory, where the model's name picks one, else patterns.json of the model; "" where there are none."""
    given = [value for option, value in zip(options, options[1:]) if option == _PATTERNS]
    given += [option.removeprefix(f"{_PATTERNS}=") for option in options if option.startswith(f"{_PATTERNS}=")]
    paths = [pathlib.Path(path) for path in given] or [path for path in (model / "patterns.json",) if path.is_file()]
    digest = hashlib.sha256()
    try:
        for path in paths:
            files = sorted(path.glob("*.json")) if path.is_dir() else [path]
            for file in (file for file in files if not file.is_dir()):
                digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    return digest.hexdigest() if paths else ""


@contextlib.contextmanager
def running_service(program: str, model: pathlib.Path, ranks: int, options: Sequence[str], folder: pathlib.Path,
                    check: Callable[[], None]) -> Iterator[str]:
    """HOST:PORT of a service that is there until the block ends; its log goes to folder/service.log. `check` may end the wait."""
    command = [program, "serve", "--model", str(model), "--listen", "127.0.0.1:0", *options]
    if ranks > 1:
        command = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none", *command]
    log, out = folder / "service.log", folder / "service.out"
    with open(out, "wb") as stdout, open(log, "wb") as stderr:
        try:
            # In a session of its own: Ctrl-C is for this process, which then ends the service.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True)
        except OSError as error:
            raise UsageError(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        yield _wait_for_target(process, out, log, check)
    finally:
        _stop(process, log)
        out.unlink(missing_ok=True)


def _wait_for_target(process: subprocess.Popen, out: pathlib.Path, log: pathlib.Path, check: Callable[[], None]) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        check()
        exit_code = process.poll()
        for line in out.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if _SERVING in line and line.endswith("\n"):
                return line.split(_SERVING)[1].strip()
        if exit_code is not None:
            kind = UsageError if exit_code == 2 else EvalError
            raise kind(f"the service did not start: {_last_words(log)}")
        time.sleep(0.1)
    raise EvalError(f"the service did not start within {_START_SECONDS} s: {_last_words(log)}")


def _last_words(log: pathlib.Path) -> str:
    """The last error line of the program, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("longfill: ")]
    return (errors or lines or [f"{log} is empty"])[-1].removeprefix("longfill: ")


def _pid_of_rank_0(log: pathlib.Path) -> int | None:
    """From the log line `configuration`; None: there is none yet."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("pid"), int):
                return record["pid"]
    return None


def _stop(process: subprocess.Popen, log: pathlib.Path) -> None:
    """Rank 0 drains and ends the others; mpirun would kill its ranks a second after a signal."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(_pid_of_rank_0(log) or process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DRAIN_SECONDS)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
