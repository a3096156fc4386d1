"""RULER's 13 tasks (arXiv 2404.06654) from their definitions: the eight kinds of needles, and the names of all.

Texts are ours. Several answers come in an order that the question names (README.md says why). No example goes before a question.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from . import ruler_qa, ruler_text, words
from .errors import UsageError
from .filler import PIECES_TRIED, Filler, Haystack, fill
from .retrieval import draw_uuid
from .sample import Sample, ask, assemble
from .tokens import TextTokenizer


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """haystack: "noise", "essay" or "needles" (of other keys); key: "words" or "uuids"; value: "numbers" or "uuids".

    keys: needles of different keys, of which the first `queries` are asked for; values: needles of the key asked for.
    """

    haystack: str = "essay"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": NeedleTask(haystack="noise"),
    "niah_single_2": NeedleTask(),
    "niah_single_3": NeedleTask(value="uuids"),
    "niah_multikey_1": NeedleTask(keys=4),
    "niah_multikey_2": NeedleTask(haystack="needles"),
    "niah_multikey_3": NeedleTask(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": NeedleTask(values=4),
    "niah_multiquery": NeedleTask(keys=4, queries=4),
}
TEXTS = ("vt", "cwe", "fwe")
QUESTIONS = ("qa_1", "qa_2")
NAMES = (*NEEDLES, *TEXTS, *QUESTIONS)


@dataclasses.dataclass(frozen=True)
class Materials:
    """What samples are made of. squad, hotpotqa: the user's files; None: not given. essay is made when it is needed."""

    tokenizer: TextTokenizer
    essay: Callable[[], Filler]
    squad: ruler_qa.Documents | None = None
    hotpotqa: ruler_qa.Documents | None = None


def ruler_sample(materials: Materials, task: str, length: int, name: str, seed: str) -> Sample:
    """One sample of the RULER task `task`, at most `length` tokens."""
    rng = random.Random(seed)
    tokenizer = materials.tokenizer
    full_name = f"ruler:{task}"
    if task in NEEDLES:
        return _needle_sample(materials, NEEDLES[task], full_name, length, name, rng)
    if task == "vt":
        return ruler_text.variable_tracking(tokenizer, Filler.noise(tokenizer), length, name, rng)
    if task == "cwe":
        return ruler_text.common_words(tokenizer, length, name, rng)
    if task == "fwe":
        return ruler_text.frequent_words(tokenizer, length, name, rng)
    documents, option = (materials.squad, "--squad") if task == "qa_1" else (materials.hotpotqa, "--hotpotqa")
    if documents is None:
        raise UsageError(f"--task {full_name} needs {option} FILE")
    return ruler_qa.question_sample(tokenizer, documents, full_name, length, name, rng)


def draw_keys(kind: str, count: int, rng: random.Random) -> list[str]:
    return [draw_uuid(rng) for _ in range(count)] if kind == "uuids" else words.draw_compounds(count, rng)


def draw_value(kind: str, rng: random.Random) -> str:
    return draw_uuid(rng) if kind == "uuids" else str(rng.randrange(1_000_000, 10_000_000))


def _needle_sample(materials: Materials, task: NeedleTask, full_name: str, length: int, name: str, rng: random.Random) -> Sample:
    tokenizer, kind = materials.tokenizer, task.value[:-1]
    needle = lambda key, value: tokenizer.encode(f" The hidden {kind} for", " " + key, " is", " " + value, ".")
    most_others = length // len(needle("a", "1")) + PIECES_TRIED if task.haystack == "needles" else 0
    keys = draw_keys(task.key, task.keys + most_others, rng)
    others = iter(keys[task.keys :])
    needles = [(key, draw_value(task.value, rng)) for key in keys[: task.keys] for _ in range(task.values)]
    # Ascending, so that the values of one key are asked for in the order of the text.
    depths = sorted(rng.random() for _ in needles)
    if task.values == 1:
        rng.shuffle(depths)
    answers = [value for _, value in needles[: task.queries * task.values]]
    tail = ask(tokenizer, _question(kind, keys[: task.queries], task.values), [" " + value for value in answers])
    pieces = [needle(*pair) for pair in needles]
    head = [*tokenizer.prefix, *tokenizer.encode(f"Some hidden {kind}s are mentioned in the following text. Memorize them; you will be "
                                                 "asked for them afterwards.\n\n")]
    room = length - len(head) - len(tail.ids) - sum(map(len, pieces))
    if room < 0:
        raise UsageError(f"--length {length}: {full_name} needs at least {length - room} tokens")
    if task.haystack == "needles":
        haystack = haystack_of(fill(room, lambda: needle(next(others), draw_value(task.value, rng))))
    else:
        haystack = (materials.essay() if task.haystack == "essay" else Filler.noise(tokenizer)).take(room, rng)
    ids, begins = haystack.insert(list(zip(depths, pieces, strict=True)))
    asked_begins = [(len(head) + begin) / length for begin in begins[: len(answers)]]
    return assemble(full_name, name, length, head + ids, tail, asked_begins)


def haystack_of(pieces: Sequence[Sequence[int]]) -> Haystack:
    borders = [0]
    for piece in pieces:
        borders.append(borders[-1] + len(piece))
    return Haystack([token for piece in pieces for token in piece], borders)


def _question(kind: str, keys: Sequence[str], values: int) -> str:
    """Question and the begin of the answer."""
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    if len(keys) > 1:
        return f"\n\nWhat are the hidden {kind}s for {names} in the text above? In this order, they are"
    if values > 1:
        return f"\n\nWhat are all the hidden {kind}s for {names} in the text above? In the order of the text, they are"
    return f"\n\nWhat is the hidden {kind} for {names} in the text above? The hidden {kind} for {names} is"
