"""Needle in a haystack, asked at the end of the prompt, and all through it.

The statements are those that needle-20m was trained on: two key words, six digits.
"""

from __future__ import annotations

import dataclasses
import random

import numpy

from . import words
from .errors import UsageError
from .filler import Filler
from .sample import AskedText, Question, Sample, ask, assemble
from .tokens import TextTokenizer

SLOT = 160  # spread: one statement or question in so many tokens
TOKENS_PER_DISTRACTOR = 2048
_MIN_DISTRACTORS = 4
STATEMENT = "\nThe special magic number for"
QUESTION = "\nWhat is the special magic number for"


@dataclasses.dataclass(frozen=True)
class NeedleText:
    """Statements and questions in tokens."""

    tokenizer: TextTokenizer
    key_words: tuple[list[str], list[str]]

    @classmethod
    def create(cls, tokenizer: TextTokenizer, key_words: tuple[list[str], list[str]] | None) -> NeedleText:
        return cls(tokenizer, key_words or (words.ADJECTIVES, words.NOUNS))

    def draw_keys(self, count: int, rng: random.Random) -> list[str]:
        """Distinct keys " W1 W2"."""
        first, second = self.key_words
        if count > len(first) * len(second):
            raise UsageError(f"{count} needles are wanted, and there are words for {len(first) * len(second)} keys")
        pairs = rng.sample(range(len(first) * len(second)), count)
        return [f" {first[p // len(second)]} {second[p % len(second)]}" for p in pairs]

    @staticmethod
    def draw_number(rng: random.Random) -> str:
        return f"{rng.randrange(1_000_000):06d}"

    def statement(self, key: str, number: str) -> list[int]:
        return self.tokenizer.encode(STATEMENT, key, " is:", " " + number, ".\n")

    def question(self, key: str, number: str, end: str = "") -> AskedText:
        return ask(self.tokenizer, f"{QUESTION}{key}? The number is:", [" " + number], end=end)


def end_sample(text: NeedleText, filler: Filler, length: int, depth: float, name: str, seed: str) -> Sample:
    """One needle at `depth` of the haystack among distractors, asked for at the end; exactly `length` tokens."""
    rng = random.Random(seed)
    keys = text.draw_keys(1 + max(_MIN_DISTRACTORS, length // TOKENS_PER_DISTRACTOR), rng)
    numbers = [text.draw_number(rng) for _ in keys]
    tail = text.question(keys[0], numbers[0])
    pieces = [(depth if i == 0 else rng.random(), text.statement(key, number))
              for i, (key, number) in enumerate(zip(keys, numbers, strict=True))]
    before = text.tokenizer.prefix
    room = length - len(before) - len(tail.ids) - sum(len(piece) for _, piece in pieces)
    if room < 0:
        raise UsageError(f"--length {length}: niah-end needs at least {length - room} tokens")
    ids, begins = filler.take(room, rng).insert(pieces)
    return assemble("niah-end", name, length, [*before, *ids], tail, [(len(before) + begins[0]) / length])


def spread_sample(text: NeedleText, filler: Filler, length: int, max_positions: int, name: str, seed: str) -> Sample:
    """Statements and answered questions in every SLOT tokens, exactly `length` in all; at most `max_positions` logits."""
    rng = random.Random(seed)
    num_slots = length // SLOT
    if num_slots < 2:
        raise UsageError(f"--length {length}: niah-spread needs at least {2 * SLOT} tokens")
    ids = numpy.array(filler.take(length, rng).ids, dtype=numpy.int32)
    ids[: len(text.tokenizer.prefix)] = text.tokenizer.prefix
    keys = iter(text.draw_keys(num_slots, rng))
    known: list[tuple[str, str]] = []
    questions: list[Question] = []
    for slot in range(num_slots):
        offsets: list[tuple[int, tuple[int, ...]]] = []
        if not known or (slot > 1 and rng.random() < 1 / 3):
            known.append((next(keys), text.draw_number(rng)))
            piece = text.statement(*known[-1])
        else:
            asked = text.question(*rng.choice(known), end=".\n")
            piece, offsets = asked.ids, asked.questions
        first = len(text.tokenizer.prefix) if slot == 0 else 0
        if len(piece) + first > SLOT:
            raise UsageError(f"niah-spread: a question has {len(piece)} tokens with this tokenizer, the limit is {SLOT}")
        at = slot * SLOT + first + rng.randrange(SLOT - first - len(piece) + 1)
        ids[at : at + len(piece)] = piece
        questions += [Question(at + offset, answer, (at + offset) / length) for offset, answer in offsets]
    return Sample("niah-spread", name, length, ids, thin_out(questions, max_positions))


def thin_out(questions: list[Question], max_positions: int) -> tuple[Question, ...]:
    """As many of the questions as have at most `max_positions` positions, evenly."""
    if not questions:
        return ()
    most = max_positions // max(len(q.answer) for q in questions)
    if most >= len(questions):
        return tuple(questions)
    if most < 1:
        raise UsageError("--logits-memory has no room for the logits of one answer")
    return tuple(questions[i * len(questions) // most] for i in range(most))
