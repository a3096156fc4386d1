"""RULER's tasks on the text as a whole: variable tracking, common words, frequent words."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from . import words
from .errors import UsageError
from .filler import Filler
from .sample import Sample, ask, assemble
from .tokens import TextTokenizer

NUM_HOPS = 4
NUM_COMMON = 10
COMMON_TIMES, UNCOMMON_TIMES = 30, 3
ALPHA = 2.0
_ZETA_2 = 1.6449340668482264  # pi^2 / 6, the sum of k^-2
_TOKENS_PER_CODED_WORD = 50   # of the prompt, for each word of the vocabulary
_NUM_FREQUENT = 3


def _too_short(task: str, length: int, room: int) -> UsageError:
    return UsageError(f"--length {length}: {task} needs at least {length - room} tokens")


def _draw_distinct(count: int, letters: str, size: int, rng: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(letters, k=size))] = None
    return list(drawn)


def variable_tracking(tokenizer: TextTokenizer, noise: Filler, length: int, name: str, rng: random.Random) -> Sample:
    """One chain of NUM_HOPS assignments after the first, in order, among noise: all variables that have the value."""
    names = _draw_distinct(1 + NUM_HOPS, string.ascii_uppercase, 5, rng)
    value = str(rng.randrange(10_000, 100_000))
    variable = lambda text: tokenizer.encode(" VAR", " " + text)
    pieces = [variable(names[0]) + tokenizer.encode(" =", " " + value, ".")]
    pieces += [variable(target) + tokenizer.encode(" =") + variable(source) + tokenizer.encode(".")
               for source, target in zip(names, names[1:])]
    head = [*tokenizer.prefix, *tokenizer.encode("Follow the assignments to variables that are hidden in the following text.\n\n")]
    tail = ask(tokenizer, f"\n\nWhich variables have the value {value} in the text above? In the order of the text, they are",
               [" " + n for n in names])
    room = length - len(head) - len(tail.ids) - sum(map(len, pieces))
    if room < 0:
        raise _too_short("ruler:vt", length, room)
    depths = sorted(rng.random() for _ in pieces)
    ids, begins = noise.take(room, rng).insert(list(zip(depths, pieces, strict=True)))
    return assemble("ruler:vt", name, length, head + ids, tail, [(len(head) + begin) / length for begin in begins])


def common_words(tokenizer: TextTokenizer, length: int, name: str, rng: random.Random) -> Sample:
    """A numbered list: NUM_COMMON words come COMMON_TIMES, all others UNCOMMON_TIMES; the common ones, by the alphabet."""
    pool = words.draw_compounds(NUM_COMMON + length // UNCOMMON_TIMES, rng)  # more than there is room for
    common, uncommon = pool[:NUM_COMMON], pool[NUM_COMMON:]
    size = lambda text: len(tokenizer.encode(text))
    head = [*tokenizer.prefix, *tokenizer.encode("Below is a numbered list of words. Some of them come more often than others. Memorize "
                                                 "those that come most often.\n\n")]
    tail = ask(tokenizer, f"\n\nWhich are the {NUM_COMMON} most common words of the list above? In alphabetical order, they are",
               [" " + word for word in sorted(common)])
    numbers = lambda first, count: sum(size(f" {i}.") for i in range(first, first + count))
    num_entries = NUM_COMMON * COMMON_TIMES
    room = length - len(head) - len(tail.ids) - numbers(1, num_entries) - COMMON_TIMES * sum(size(" " + w) for w in common)
    if room < 0:
        raise _too_short("ruler:cwe", length, room)
    chosen = []
    for word in uncommon:
        room -= numbers(num_entries + 1, UNCOMMON_TIMES) + UNCOMMON_TIMES * size(" " + word)
        if room < 0:
            break
        chosen.append(word)
        num_entries += UNCOMMON_TIMES
    entries = COMMON_TIMES * common + UNCOMMON_TIMES * chosen
    rng.shuffle(entries)
    body = [token for i, word in enumerate(entries, 1) for token in tokenizer.encode(f" {i}.", " " + word)]
    return assemble("ruler:cwe", name, length, head + body, tail, [0.5] * NUM_COMMON)


def zeta_counts(num_words: int, vocabulary: int) -> list[int]:
    """How often the word of each rank comes: num_words rank^-ALPHA / zeta(ALPHA), rounded down."""
    return [int(num_words * rank**-ALPHA / _ZETA_2) for rank in range(1, vocabulary + 1)]


def frequent_words(tokenizer: TextTokenizer, length: int, name: str, rng: random.Random) -> Sample:
    """Coded words whose counts follow a zeta distribution; the commonest is "...", the next three are asked for."""
    vocabulary = ["...", *_draw_distinct(max(_NUM_FREQUENT + 1, length // _TOKENS_PER_CODED_WORD), string.ascii_lowercase, 6, rng)]
    head = [*tokenizer.prefix, *tokenizer.encode("Read the following coded text and count how often each coded word comes.\n\n")]
    tail = ask(tokenizer, '\n\nWhich are the three most frequent coded words in the text above, apart from "..."? The most frequent one '
               "first, they are", [" " + word for word in vocabulary[1 : 1 + _NUM_FREQUENT]])
    sizes = [len(tokenizer.encode(" " + word)) for word in vocabulary]
    total = lambda n: sum(count * size for count, size in zip(zeta_counts(n, len(vocabulary)), sizes, strict=True))
    room = length - len(head) - len(tail.ids)
    num_words = _largest(lambda n: total(n) <= room, 2 * room)
    counts = zeta_counts(num_words, len(vocabulary))
    if len(set(counts[: _NUM_FREQUENT + 2])) < _NUM_FREQUENT + 2:
        raise UsageError(f"--length {length}: ruler:fwe needs more tokens, so that counts differ")
    text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    body = [token for word in text for token in tokenizer.encode(" " + word)]
    return assemble("ruler:fwe", name, length, head + body, tail, [0.5] * _NUM_FREQUENT)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in [0, most] that fits; all smaller ones do."""
    low, high = 0, max(0, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


