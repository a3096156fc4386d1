"""RULER's qa_1 and qa_2: a question on one or few of many documents, from the user's SQuAD or HotpotQA file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from typing import Any

from .errors import UsageError
from .sample import Sample, ask, assemble
from .tokens import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Documents:
    """texts: all documents, each once. questions: (question, first right answer, indices of the documents that it is about)."""

    texts: list[str]
    questions: list[tuple[str, str, tuple[int, ...]]]


def _read_json(path: pathlib.Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{option} {path}: {error}") from None


def read_squad(path: pathlib.Path) -> Documents:
    """SQuAD 1.1 or 2.0; questions without an answer are left out."""
    texts: dict[str, int] = {}
    questions = []
    try:
        for article in _read_json(path, "--squad")["data"]:
            for paragraph in article["paragraphs"]:
                index = texts.setdefault(paragraph["context"], len(texts))
                questions += [(qa["question"], qa["answers"][0]["text"], (index,)) for qa in paragraph["qas"] if qa["answers"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"--squad {path}: this is no SQuAD file: {error!r}") from None
    return _checked(Documents(list(texts), questions), f"--squad {path}")


def read_hotpotqa(path: pathlib.Path) -> Documents:
    """HotpotQA's distractor setting; all paragraphs of a question come with it."""
    texts: dict[str, int] = {}
    questions = []
    try:
        for record in _read_json(path, "--hotpotqa"):
            paragraphs = [f"{title}\n{''.join(sentences)}" for title, sentences in record["context"]]
            indices = tuple(dict.fromkeys(texts.setdefault(text, len(texts)) for text in paragraphs))
            questions.append((record["question"], record["answer"], indices))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--hotpotqa {path}: this is no HotpotQA file: {error!r}") from None
    return _checked(Documents(list(texts), questions), f"--hotpotqa {path}")


def _checked(documents: Documents, what: str) -> Documents:
    if not documents.questions:
        raise UsageError(f"{what}: there is no question with an answer in it")
    return documents


def question_sample(tokenizer: TextTokenizer, documents: Documents, full_name: str, length: int, name: str, rng: random.Random) -> Sample:
    """A question's own documents among as many others as there is room for, in random order."""
    question, answer, own = rng.choice(documents.questions)
    # A number may have more tokens than another; those of the largest are kept free for each.
    number_tokens = len(tokenizer.encode(f"Document {len(documents.texts)}:\n"))
    tokens_of = lambda index: tokenizer.encode(documents.texts[index] + "\n\n")
    head = [*tokenizer.prefix, *tokenizer.encode("Answer the question from the documents. Give the answer alone, nothing else.\n\n")]
    tail = ask(tokenizer, f"Question: {question} Answer:", [" " + answer])
    room = length - len(head) - len(tail.ids) - sum(number_tokens + len(tokens_of(index)) for index in own)
    if room < 0:
        raise UsageError(f"--length {length}: {full_name} {name} needs at least {length - room} tokens")
    others = [index for index in range(len(documents.texts)) if index not in own]
    rng.shuffle(others)
    chosen = list(own)
    for index in others:
        size = number_tokens + len(tokens_of(index))
        if size <= room:
            chosen.append(index)
            room -= size
    rng.shuffle(chosen)
    ids, depth = list(head), 0.0
    for number, index in enumerate(chosen, 1):
        if index == own[0]:
            depth = len(ids) / length
        ids += tokenizer.encode(f"Document {number}:\n") + tokens_of(index)
    return assemble(full_name, name, length, ids, tail, [depth])
