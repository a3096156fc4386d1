"""results.jsonl: a line for each sample and method, written as they come, found again by key."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import EvalError, UsageError

FILE_NAME = "results.jsonl"
Record = dict[str, Any]


def key_of(**parts: Any) -> str:
    """Hash of everything that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


# What a record has, and what its figures and each of its questions have.
_NUMBER = (int, float)
_FIELDS = {"key": str, "task": str, "sample": str, "digest": str, "model": str, "method": str, "date": str, "length": int,
           "tokens": int, "score": _NUMBER, "kl": _NUMBER, "agreement": _NUMBER, "nll": _NUMBER, "figures": dict, "questions": list}
_FIGURES = {"seconds": _NUMBER, "index_seconds": _NUMBER, "attention_seconds": _NUMBER, "density": _NUMBER, "device": str,
            "compute_dtype": str, "ranks": int}
_QUESTION = {"depth": _NUMBER, "tokens": int, "right": bool, "nll": _NUMBER, "kl": _NUMBER, "agreement": _NUMBER}


def _check_fields(values: Any, fields: Mapping[str, Any], what: str) -> None:
    """ValueError for what is no object with these fields."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} is no JSON object")
    for name, kind in fields.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"{what} has {name} {json.dumps(values[name])}" if name in values else f"{what} has no {name}")


def _parse_record(line: bytes) -> Record:
    record = json.loads(line)
    _check_fields(record, _FIELDS, "it")
    _check_fields(record["figures"], _FIGURES, "figures")
    if not record["questions"]:
        raise ValueError("it has no questions")
    for question in record["questions"]:
        _check_fields(question, _QUESTION, "a question")
    return record


def read_records(folder: pathlib.Path) -> list[Record]:
    """All lines, each with all its fields; one that was cut off at the end, by a kill or a full disk, is not there."""
    path = folder / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    records = []
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(_parse_record(line))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: this is no result of longfill eval: {error}") from None
    return records


class Results:
    """The results of one folder; one process at a time writes them."""

    def __init__(self, folder: pathlib.Path):
        """UsageError where the folder, or what is in it, cannot be used."""
        self._path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)
        except OSError as error:
            raise UsageError(f"--out {folder}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"--out {folder}: another longfill eval writes there") from None
        self._records: dict[str, Record] = {record["key"]: record for record in read_records(folder)}
        content = self._path.read_bytes()
        self._file.truncate(content.rfind(b"\n") + 1)

    def close(self) -> None:
        self._file.close()

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def add(self, record: Mapping[str, Any]) -> None:
        """On disk, as far as the operating system is concerned, when this returns."""
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise EvalError(f"{self._path}: {error.strerror}") from None
        if written != len(line):
            raise EvalError(f"{self._path}: the disk took {written} of {len(line)} bytes")
        self._records[record["key"]] = dict(record)


@contextlib.contextmanager
def open_results(folder: pathlib.Path) -> Iterator[Results]:
    results = Results(folder)
    try:
        yield results
    finally:
        results.close()
