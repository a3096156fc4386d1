"""Haystacks: text of any number of tokens, from the user's files or from sentences made here."""

from __future__ import annotations

import bisect
import dataclasses
import json
import pathlib
import random
import re
from collections.abc import Callable, Sequence

from . import words
from .errors import UsageError
from .tokens import TextTokenizer

_NUM_MADE = 6000
PIECES_TRIED = 16
# A haystack that says nothing, over and over.
NOISE = ("The road goes up and the road comes down.", "Clouds pass over the roofs.", "Somebody opens a window and closes it.",
         "It is quiet now.", "Nothing more is to be said about today.")


def make_sentences(count: int) -> list[str]:
    """Plain sentences that state nothing anybody asks for; the same ones every time."""
    rng = random.Random("sentences")
    pick = lambda pool: rng.choice(pool).replace("-", " ")
    thing = lambda: f"the {pick(words.ADJECTIVES)} {pick(words.NOUNS)}"
    forms = (
        lambda: f"{thing()} {pick(words.VERBS)} {thing()} {rng.choice(words.PLACES)}",
        lambda: f"{pick(words.ADVERBS)} {thing()} {pick(words.VERBS)} {thing()}",
        lambda: f"{rng.choice(words.PLACES)} {thing()} {pick(words.VERBS)} {thing()}, and {thing()} {pick(words.VERBS)} it",
        lambda: f"{thing()} {pick(words.VERBS)} {thing()} because {thing()} {pick(words.VERBS)} {thing()} {pick(words.ADVERBS)}",
        lambda: f"nobody {pick(words.VERBS)} {thing()} while {thing()} {pick(words.VERBS)} {thing()}",
    )
    sentences = []
    for _ in range(count):
        text = rng.choice(forms)()
        sentences.append(text[0].upper() + text[1:] + ".")
    return sentences


def read_texts(path: pathlib.Path) -> list[str]:
    """The texts of a .txt or .jsonl file (field "text"), or of all of them below a directory, in order of their names."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not files:
            raise UsageError(f"--text {path}: there is no .txt or .jsonl file in it")
        return [text for file in files for text in read_texts(file)]
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path}: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix != ".jsonl":
        return [content]
    try:
        return [str(json.loads(line)["text"]) for line in content.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--text {path}: expected a JSON object with \"text\" in every line: {error}") from None


@dataclasses.dataclass
class Haystack:
    """ids, and where sentences begin in them, ascending; 0 and len(ids) count as borders."""

    ids: list[int]
    borders: list[int]

    def border_near(self, depth: float) -> int:
        """The border nearest to `depth`, 0 to 1."""
        wanted = depth * len(self.ids)
        i = bisect.bisect_left(self.borders, wanted)
        near = self.borders[max(0, i - 1) : i + 1] or [0]
        return min(near, key=lambda border: abs(border - wanted))

    def insert(self, pieces: Sequence[tuple[float, Sequence[int]]]) -> tuple[list[int], list[int]]:
        """The ids with every (depth, piece) at the border nearest to its depth; and where each piece begins then."""
        places = sorted((self.border_near(depth), i) for i, (depth, _) in enumerate(pieces))
        ids: list[int] = []
        begins = [0] * len(pieces)
        done = 0
        for border, i in places:
            ids += self.ids[done:border]
            done = border
            begins[i] = len(ids)
            ids += pieces[i][1]
        ids += self.ids[done:]
        return ids, begins


def fill(room: int, make: Callable[[], list[int]]) -> list[list[int]]:
    """Pieces from `make` while `room` tokens have room for them; one that has not is tried a few times more."""
    pieces: list[list[int]] = []
    missed = 0
    while missed < PIECES_TRIED:
        piece = make()
        if len(piece) <= room:
            pieces.append(piece)
            room -= len(piece)
        else:
            missed += 1
    return pieces


class Filler:
    """Sentences of one tokenizer. In order, from a random one on, if they are somebody's text or noise; else drawn at random."""

    def __init__(self, sentences: list[list[int]], in_order: bool):
        self._sentences = [s for s in sentences if s]
        self._in_order = in_order

    @classmethod
    def made(cls, tokenizer: TextTokenizer) -> Filler:
        return cls(tokenizer.encode_all([" " + s for s in make_sentences(_NUM_MADE)]), in_order=False)

    @classmethod
    def noise(cls, tokenizer: TextTokenizer) -> Filler:
        return cls([tokenizer.encode(" " + s) for s in NOISE], in_order=True)

    @classmethod
    def of_files(cls, tokenizer: TextTokenizer, path: pathlib.Path) -> Filler:
        sentences = [s for text in read_texts(path) for s in re.split(r"(?<=[.!?])(?=\s)|(?<=\n)(?=\S)", text) if s]
        filler = cls(tokenizer.encode_all(sentences), in_order=True)
        if not filler._sentences:
            raise UsageError(f"--text {path}: there is no text in it")
        return filler

    def num_tokens(self) -> int:
        return sum(map(len, self._sentences))

    def take(self, num_tokens: int, rng: random.Random) -> Haystack:
        """Exactly `num_tokens` tokens; what is too much is cut off at the front. A text that is too short comes again."""
        chosen: list[list[int]] = []
        have, at = 0, rng.randrange(len(self._sentences))
        while have < num_tokens:
            sentence = self._sentences[at % len(self._sentences)] if self._in_order else rng.choice(self._sentences)
            chosen.append(sentence)
            have += len(sentence)
            at += 1
        surplus, ids, borders = have - max(0, num_tokens), [], [0]
        for sentence in chosen:
            begin = len(ids) - surplus
            if begin > 0:
                borders.append(begin)
            ids += sentence
        ids = ids[surplus:]
        if ids:
            borders.append(len(ids))
        return Haystack(ids, borders)
