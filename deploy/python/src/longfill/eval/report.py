"""Records of samples as rows: one for each task, length and method."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy

from . import metrics
from .results import Record
from .runner import DENSE

Row = dict[str, Any]
_COLUMNS = (("method", "method", "{}"), ("samples", "samples", "{}"), ("questions", "questions", "{}"), ("score", "score", "{:.3f}"),
            ("kept", "kept", "{:.3f}"), ("perplexity", "perplexity", "{:.4f}"), ("KL", "kl", "{:.6f}"),
            ("top-1", "agreement", "{:.4f}"), ("density", "density", "{:.4f}"), ("seconds", "seconds", "{:.2f}"),
            ("index", "index_seconds", "{:.2f}"), ("attention", "attention_seconds", "{:.2f}"))


# A name says which sample of a run it is; the digest over tokens and questions keeps apart what runs with another seed, text
# or windows call by the same name.
_SampleKey = tuple[str, str]


def _sample_key(record: Record) -> _SampleKey:
    return record["sample"], record["digest"]


def latest(records: Sequence[Record]) -> list[Record]:
    """One record for each task, length, method and sample: of equal ones the last, in the place of the first."""
    return list({(r["task"], r["length"], r["method"], *_sample_key(r)): r for r in records}.values())


def summarise(records: Sequence[Record], dense_floor: float) -> list[Row]:
    """Rows in the order in which tasks, lengths and methods first come, lengths ascending. Of equal records the last counts."""
    groups: dict[tuple[str, int], dict[str, dict[_SampleKey, Record]]] = {}
    for record in latest(records):
        by_method = groups.setdefault((record["task"], record["length"]), {})
        by_method.setdefault(record["method"], {})[_sample_key(record)] = record
    tasks = list(dict.fromkeys(task for task, _ in groups))
    rows = []
    for task, length in sorted(groups, key=lambda group: (tasks.index(group[0]), group[1])):
        by_method = groups[task, length]
        dense = by_method.get(DENSE, {})
        dense_score = _score(list(dense.values())) if dense else 0.0
        for method, samples in by_method.items():
            row = {"task": task, "length": length, "method": method} | _figures(samples, dense)
            row["comparable"] = task == "perplexity" or dense_score >= dense_floor
            rows.append(row)
    return rows


def _score(records: Sequence[Record]) -> float:
    return float(numpy.mean([q["right"] for r in records for q in r["questions"]]))


def _figures(samples: dict[_SampleKey, Record], dense: dict[_SampleKey, Record]) -> Row:
    records = list(samples.values())
    questions = [q for record in records for q in record["questions"]]
    pairs = [(q["right"], d["right"]) for key, record in samples.items() if key in dense
             for q, d in zip(record["questions"], dense[key]["questions"], strict=True)]
    answered = [right for right, by_dense in pairs if by_dense]
    mean = lambda name: float(numpy.mean([record["figures"][name] for record in records]))
    return {
        "samples": len(records), "questions": len(questions), "score": _score(records),
        "kept": float(numpy.mean(answered)) if answered else None,
        "perplexity": float(numpy.exp(metrics.weighted_mean(questions, "nll"))),
        "kl": metrics.weighted_mean(questions, "kl"), "agreement": metrics.weighted_mean(questions, "agreement"),
        **{name: mean(name) for name in ("density", "seconds", "index_seconds", "attention_seconds")},
        "device": records[0]["figures"]["device"], "compute_dtype": records[0]["figures"]["compute_dtype"],
        "ranks": records[0]["figures"]["ranks"], "dates": sorted({record["date"] for record in records}),
    }


def table(rows: Sequence[Row]) -> str:
    """A Markdown table for each task and length."""
    lines: list[str] = []
    groups = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    for task, length in groups:
        members = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        columns = [c for c in _COLUMNS if c[1] not in (("score", "kept", "questions") if task == "perplexity" else ("perplexity",))]
        lines += ["", f"{task}, {length:,} tokens" + ("" if members[0]["comparable"] else ": dense fails, nothing to compare"), ""]
        lines.append("| " + " | ".join(title for title, _, _ in columns) + " |")
        lines.append("|" + "---|" * len(columns))
        for row in members:
            cells = ["" if row[name] is None else form.format(row[name]) for _, name, form in columns]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def write_summary(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    (folder / "summary.json").write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
