"""SIGKILL of one rank in the middle of a prompt: the client hears of it soon, every process ends, a new group serves."""

import os
import pathlib
import signal
import threading
import time

import numpy
from service import Service

MAX_SECONDS = 10.0  # from the kill to the client's error, and to the end of all ranks


def run(pack, checks, arguments):
    pack.use_python_packages()
    directory = pack.path("models", "needle-20m")
    ids = numpy.fromfile(pack.path("eval", "filler.u16"), dtype="<u2").astype(numpy.int32)
    ids = numpy.resize(ids, 16384 if arguments.small else 524288)
    expected = None
    for victim in (arguments.ranks - 1, 0):
        with Service(pack, directory, ranks=arguments.ranks) as service:
            expected = check_serves(checks, service, ids[:1024], expected, victim)
            check_kill(checks, service, ids, victim, arguments.ranks)
    with Service(pack, directory, ranks=arguments.ranks) as service:
        check_serves(checks, service, ids[:1024], expected, None)


def check_serves(checks, service, ids, expected, victim):
    """A short prompt is answered, each time with the same token."""
    import longfill  # from the pack

    with longfill.Client(service.target) as client:
        token = client.prefill(ids, attention="dense", kv="drop").next_token()
    if expected is not None:
        checks.equal(f"a group started anew{'' if victim is None else f', before rank {victim} is killed'}: next token", token,
                     expected)
    return token


def check_kill(checks, service, ids, victim, num_ranks):
    import longfill  # from the pack

    outcome, computing = [], threading.Event()

    def submit():
        try:
            with longfill.Client(service.target) as client:
                while True:  # until a prompt of this kind meets the kill
                    client.prefill(ids, attention="dense", kv="drop", on_progress=lambda _: computing.set(), timeout=120)
        except longfill.PrefillError as error:
            outcome.append((error, time.monotonic()))

    name = f"SIGKILL of rank {victim}"
    thread = threading.Thread(target=submit)
    thread.start()
    if not computing.wait(120):
        checks.fails(name, "the prompt did not begin to compute")
        return
    pids = service.rank_processes()
    checks.equal(f"{name}: ranks before it", len(pids), num_ranks)
    begin = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    thread.join(60)
    error, when = outcome[0] if outcome else (None, time.monotonic())
    checks.equal(f"{name}: the client's error", error and error.code.name, "UNAVAILABLE", str(error)[:200])
    checks.at_most(f"{name}: seconds to it", when - begin, MAX_SECONDS)
    code = service.wait(60)
    checks.equal(f"{name}: mpirun failed", code not in (0, None), True, f"exit code {code}")
    checks.at_most(f"{name}: seconds to the end of mpirun", time.monotonic() - begin, MAX_SECONDS)
    checks.equal(f"{name}: rank processes left", sum(map(lives, pids)), 0)


def lives(pid):
    """Whether a process is there; one that has ended and that nobody has waited for is not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
