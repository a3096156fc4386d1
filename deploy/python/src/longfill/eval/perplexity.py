"""Perplexity of a long text by position: windows of predicted tokens, evenly over the prompt, as in MInference's PG-19 figure."""

from __future__ import annotations

import random

import numpy

from .errors import UsageError
from .filler import Filler
from .sample import Question, Sample
from .tokens import TextTokenizer


def perplexity_sample(tokenizer: TextTokenizer, text: Filler, length: int, windows: int, window: int, max_positions: int, name: str,
                      seed: str) -> Sample:
    """`length` tokens of the text; of each of `windows` equal slices the last `window` tokens are predicted."""
    if windows * window > max_positions:
        raise UsageError(f"--windows {windows} x --window {window}: --logits-memory has room for {max_positions} positions")
    if windows * (window + 1) > length:
        raise UsageError(f"--length {length}: {windows} windows of {window} tokens do not fit")
    if text.num_tokens() < length:
        raise UsageError(f"--text has {text.num_tokens()} tokens, perplexity at --length {length} needs as many")
    ids = numpy.array([*tokenizer.prefix, *text.take(length - len(tokenizer.prefix), random.Random(seed)).ids], dtype=numpy.int32)
    questions = []
    for i in range(windows):
        first = (i + 1) * length // windows - window
        questions.append(Question(first - 1, tuple(ids[first : first + window].tolist()), (first + window / 2) / length))
    return Sample("perplexity", name, length, ids, tuple(questions))
