"""The loop: every sample dense, then with each method, compared where the answers stand."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
import numpy

from ..client import Client
from ..errors import PrefillError
from . import metrics
from .errors import EvalError, UsageError
from .results import Record, Results, key_of
from .sample import Sample

DENSE, AUTO = "dense", "auto"
_TRIAL_TOKENS = 256
_FIGURES = ("seconds", "index_seconds", "attention_seconds", "density", "device", "compute_dtype", "ranks")
_CALLERS_FAULT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED,
                  grpc.StatusCode.OUT_OF_RANGE)


@dataclasses.dataclass(frozen=True)
class Method:
    """An attention spec as the command line has it; a path of a pattern file is read once, here."""

    name: str
    spec: str | pathlib.Path
    digest: str

    @classmethod
    def create(cls, text: str) -> Method:
        path = pathlib.Path(text)
        if path.suffix == ".json" or "/" in text:
            try:
                return cls(path.stem, path, hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError as error:
                raise UsageError(f"--attention {text}: {error.strerror}") from None
        return cls(text, text, text)


class Runner:
    """Runs samples on one service. `setup` is what else a result depends on, beside model, sample and method.

    `check` is called often and ends the run by raising. patterns_digest: of the pattern files that the service takes "auto" from,
    None where they are not known: then results of "auto" count for this instance of the service alone, which read them once.
    """

    def __init__(self, client: Client, results: Results, methods: Sequence[Method], setup: dict[str, Any],
                 say: Callable[[str], None], check: Callable[[], None], patterns_digest: str | None = None):
        self._client = client
        self._results = results
        self._say = say
        self._check = check
        try:
            self.model = client.model_info(timeout=60)
        except PrefillError as error:
            raise EvalError(f"the service does not answer: {error}") from None
        patterns = self.model.instance_epoch if patterns_digest is None else patterns_digest
        auto = f"{AUTO}: {self.model.default_attention}, {patterns}"
        self._methods = [dataclasses.replace(m, digest=auto) if m.spec == AUTO else m for m in [Method.create(DENSE), *methods]]
        # The service's own account of itself, so that a --target counts as well.
        self._setup = setup | {"model": self.model.model_fingerprint, "ranks": self.model.ranks, "mesh": self.model.mesh,
                               "version": self.model.server_version}

    def try_methods(self) -> None:
        """Prefills a few tokens with each method, so that a wrong one is refused before hours of work."""
        ids = numpy.arange(_TRIAL_TOKENS, dtype=numpy.int32) % self.model.vocab_size
        for method in self._methods:
            try:
                self._client.prefill(ids, attention=method.spec, kv="drop", on_progress=lambda _: self._check())
            except PrefillError as error:
                raise _error_of(error, f"--attention {method.name}") from None

    def run(self, samples: Iterable[Sample], total: int) -> list[Record]:
        """The records of all samples, computed or found; those of one sample are together, dense first."""
        records = []
        for number, sample in enumerate(samples, 1):
            new = self._run_sample(sample)
            records += new
            scores = ", ".join(f"{r['method']} {r['score']:.2f}" for r in new)
            self._say(f"{number} of {total}: {sample.task} {sample.name}, {len(sample.ids)} tokens: {scores}")
        return records

    def _run_sample(self, sample: Sample) -> list[Record]:
        if len(sample.ids) > self.model.max_tokens:
            raise UsageError(f"{sample.task} {sample.name}: {len(sample.ids)} tokens, the model takes {self.model.max_tokens}")
        digest = sample.digest()
        keys = [key_of(setup=self._setup, sample=digest, task=sample.task, name=sample.name, method=m.digest)
                for m in self._methods]
        if all(self._results.get(key) is not None for key in keys):
            return [self._results.get(key) for key in keys]
        wanted = numpy.array([token for q in sample.questions for token in q.answer])
        reference = None
        records = []
        for method, key in zip(self._methods, keys, strict=True):
            known = self._results.get(key)
            if known is not None and method.name != DENSE:  # dense is what all others are compared with
                records.append(known)
                continue
            logits, figures = self._prefill(sample, method)
            reference = logits if reference is None else reference
            record = known or _make_record(sample, method, metrics.compare(reference, logits, wanted), figures) | {
                "key": key, "digest": digest, "model": self.model.model_fingerprint}
            if known is None:
                self._results.add(record)
            records.append(record)
        return records

    def _prefill(self, sample: Sample, method: Method) -> tuple[numpy.ndarray, dict[str, Any]]:
        self._check()
        try:
            prefilled = self._client.prefill(sample.ids, attention=method.spec, logits=sample.positions(), kv="drop",
                                             on_progress=lambda _: self._check())
        except PrefillError as error:
            raise _error_of(error, f"{sample.task} {sample.name}, {len(sample.ids)} tokens, {method.name}") from None
        return prefilled.logits, {name: prefilled.figures[name] for name in _FIGURES}


def _make_record(sample: Sample, method: Method, figures: metrics.Positions, service: dict[str, Any]) -> Record:
    questions = metrics.question_figures(sample, figures)
    return {
        "task": sample.task, "sample": sample.name, "length": sample.length, "tokens": len(sample.ids), "method": method.name,
        "score": float(numpy.mean([q["right"] for q in questions])),
        **{name: metrics.weighted_mean(questions, name) for name in ("kl", "agreement", "nll")},
        "figures": service, "questions": questions,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _error_of(error: PrefillError, what: str) -> Exception:
    kind = UsageError if error.code in _CALLERS_FAULT and error.retry_after is None else EvalError
    return kind(f"{what}: {error.message}")
