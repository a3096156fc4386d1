"""What a section of verify.py reports: one line for every check, and the same as JSON."""

import json
import math
import threading
import time


def _show(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def error_ratio(error, reference):
    """`error` in units of `reference`, the error that is allowed for. Infinity, which holds no bound, where either is none (null
    in our JSON, NaN, infinity): max() and comparisons would let a NaN pass."""
    if error is None or reference is None or not math.isfinite(error) or not math.isfinite(reference):
        return math.inf
    return error / max(reference, 1e-300)


class Checks:
    """The checks of one section; any thread may add some. A line is written the moment its check is known, so that a section
    that is cut off has reported all it knew."""

    def __init__(self, section, path):
        self._section = section
        self._file = open(path, "a", encoding="utf-8")  # pylint: disable=consider-using-with
        self._begin = time.monotonic()
        self._lock = threading.Lock()

    def at_most(self, name, value, bound, note=""):
        """Infinity is no bound: it comes of a reference that failed."""
        self._add(name, value, bound, "<=", value <= bound < math.inf, note)

    def at_least(self, name, value, bound, note=""):
        self._add(name, value, bound, ">=", value >= bound, note)

    def equal(self, name, value, expected, note=""):
        self._add(name, value, expected, "==", value == expected, note)

    def fails(self, name, why):
        self._add(name, None, None, "", False, why)

    def info(self, name, value, note=""):
        """A figure without a bound."""
        self._add(name, value, None, "", None, note)

    def not_run(self, name, why):
        self._add(name, None, None, "", "not run", why)

    def _add(self, name, value, bound, relation, outcome, note):
        outcome = {True: "pass", False: "FAIL", None: "info"}.get(outcome, outcome)
        figure = "" if value is None else _show(value)
        limit = "" if bound is None else f"{relation} {_show(bound)}"
        line = f"{outcome:7s} {self._section:9s} {name:66s} {figure:>11s} {limit:14s} {note}"
        record = {"section": self._section, "check": name, "outcome": outcome, "value": value, "relation": relation,
                  "bound": bound, "note": note, "seconds": round(time.monotonic() - self._begin, 2)}
        with self._lock:
            print(line.rstrip(), flush=True)
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
