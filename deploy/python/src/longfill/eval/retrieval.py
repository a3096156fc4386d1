"""Key-value retrieval in a JSON object of UUIDs, after InfiniteBench's Retrieve.KV (arXiv 2402.13718)."""

from __future__ import annotations

import random
import uuid

from .errors import UsageError
from .filler import fill
from .sample import Sample, ask, assemble
from .tokens import TextTokenizer

_HEAD = "Below is a JSON object. Find the value of one of its keys.\n\n{"


def draw_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def kv_sample(tokenizer: TextTokenizer, length: int, depth: float, name: str, seed: str) -> Sample:
    """As many pairs as `length` has room for, the one that is asked for at `depth` of them."""
    rng = random.Random(seed)
    pair = lambda key, value: tokenizer.encode('"', key, '": "', value, '"')
    comma, key, value = tokenizer.encode(", "), draw_uuid(rng), draw_uuid(rng)
    head, asked_pair = [*tokenizer.prefix, *tokenizer.encode(_HEAD)], pair(key, value)
    tail = ask(tokenizer, f'}}\n\nThe value of the key "{key}" is "', [value])
    room = length - len(head) - len(tail.ids) - len(asked_pair)
    if room < 0:
        raise UsageError(f"--length {length}: kv-retrieval needs at least {length - room} tokens")
    others = fill(room, lambda: pair(draw_uuid(rng), draw_uuid(rng)) + comma)
    place = round(depth * len(others))
    before = head + [token for other in others[:place] for token in other]
    after = [token for other in others[place:] for token in comma + other[: -len(comma)]]
    return assemble("kv-retrieval", name, length, before + asked_pair + after, tail, [len(before) / length])
