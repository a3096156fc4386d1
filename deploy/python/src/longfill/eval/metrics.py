"""From logits to figures."""

from __future__ import annotations

import dataclasses

import numpy

from .sample import Sample

_ROWS = 64  # at a time, in float64


def log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    """float64, over the last axis."""
    wide = logits.astype(numpy.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - numpy.log(numpy.exp(wide).sum(axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Positions:
    """Figures of single positions, each [P]."""

    right: numpy.ndarray      # bool: the wanted token ranks first
    nll: numpy.ndarray        # -log probability of the wanted token, natural
    kl: numpy.ndarray         # KL(reference || logits), summed over the vocabulary
    agreement: numpy.ndarray  # bool: both rank the same token first


def compare(reference: numpy.ndarray, logits: numpy.ndarray, wanted: numpy.ndarray) -> Positions:
    """reference, logits: [P, vocab_size]; wanted: [P] token ids. Ties rank the lowest id first."""
    if reference.shape != logits.shape or len(wanted) != len(logits):
        raise ValueError(f"logits of shapes {reference.shape} and {logits.shape} for {len(wanted)} tokens")
    nll, kl = numpy.empty(len(wanted)), numpy.empty(len(wanted))
    for begin in range(0, len(wanted), _ROWS):
        rows = slice(begin, begin + _ROWS)
        p, q = log_softmax(reference[rows]), log_softmax(logits[rows])
        kl[rows] = (numpy.exp(p) * (p - q)).sum(axis=-1)
        nll[rows] = -numpy.take_along_axis(q, wanted[rows, None], axis=-1)[:, 0]
    best = logits.argmax(axis=-1)
    return Positions(best == wanted, nll, kl, best == reference.argmax(axis=-1))


def question_figures(sample: Sample, figures: Positions) -> list[dict]:
    """For each question {"depth", "tokens", "right": every token first, "nll", "kl", "agreement": means over its tokens}."""
    rows, begin = [], 0
    for question in sample.questions:
        part = slice(begin, begin + len(question.answer))
        begin = part.stop
        rows.append({
            "depth": round(question.depth, 6), "tokens": len(question.answer), "right": bool(figures.right[part].all()),
            "nll": float(figures.nll[part].mean()), "kl": float(figures.kl[part].mean()),
            "agreement": float(figures.agreement[part].mean()),
        })
    return rows


def weighted_mean(rows: list[dict], name: str) -> float:
    """Mean of a figure over positions, of rows of questions."""
    return float(numpy.average([row[name] for row in rows], weights=[row["tokens"] for row in rows]))
