"""A sample: token ids of a prompt with its right answers in it, and where they stand."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy

from .tokens import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Question:
    """One answer. The logits at `position` + k must rank answer[k] first.

    depth: where in the prompt what is asked for (or the question, where a task says so) stands, 0 to 1.
    """

    position: int
    answer: tuple[int, ...]
    depth: float

    @property
    def positions(self) -> range:
        return range(self.position, self.position + len(self.answer))


@dataclasses.dataclass(frozen=True)
class Sample:
    """name: unique within a task's samples. ids: int32 [tokens]. length: the tokens asked for, at least len(ids)."""

    task: str
    name: str
    length: int
    ids: numpy.ndarray
    questions: tuple[Question, ...]

    def positions(self) -> list[int]:
        """All positions whose logits are wanted, question after question."""
        return [p for question in self.questions for p in question.positions]

    def digest(self) -> str:
        """SHA-256 over ids and questions, hex."""
        digest = hashlib.sha256(numpy.ascontiguousarray(self.ids, dtype="<i4").tobytes())
        digest.update(repr([(q.position, q.answer) for q in self.questions]).encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class AskedText:
    """The end of a prompt: a question and its answers. questions: (offset in ids, answer ids)."""

    ids: list[int]
    questions: list[tuple[int, tuple[int, ...]]]


def ask(tokenizer: TextTokenizer, question: str, answers: Sequence[str], separator: str = ",", end: str = "") -> AskedText:
    """`question` then the answers, with `separator` between them and `end` after the last; blanks are the caller's matter.

    Without `end` the last token of the last answer is left out: nothing comes after it. A token of blanks alone at the begin of
    an answer belongs to what is before it (tokenizers that write " 123" as " " and "123").
    """
    ids = tokenizer.encode(question)
    questions = []
    for i, answer in enumerate(answers):
        if i > 0:
            ids += tokenizer.encode(separator)
        tokens = tokenizer.encode(answer)
        if len(tokens) > 1 and not tokenizer.decode(tokens[:1]).strip():
            ids.append(tokens.pop(0))
        questions.append((len(ids) - 1, tuple(tokens)))
        ids += tokens
    if end:
        ids += tokenizer.encode(end)
    else:
        ids.pop()
    return AskedText(ids, questions)


def assemble(task: str, name: str, length: int, before: Sequence[int], tail: AskedText, depths: Iterable[float]) -> Sample:
    """`before` and then the question; `depths` of the answers, in order."""
    ids = numpy.array([*before, *tail.ids], dtype=numpy.int32)
    questions = tuple(Question(len(before) + offset, answer, depth)
                      for (offset, answer), depth in zip(tail.questions, depths, strict=True))
    return Sample(task, name, length, ids, questions)
