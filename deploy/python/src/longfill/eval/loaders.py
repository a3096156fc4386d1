"""Samples from files of the user: InfiniteBench's and RULER's JSONL."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from .errors import UsageError
from .sample import Sample, ask, assemble
from .tokens import TextTokenizer


@dataclasses.dataclass(frozen=True)
class FileQuestion:
    """context: what may lose its middle; "" where all of the prompt has to stay. answers: all asked for, in order."""

    context: str
    question: str
    answers: tuple[str, ...]


def _read_lines(path: pathlib.Path, task: str, parse: Any) -> list[FileQuestion]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--task {task}: {getattr(error, 'strerror', None) or error}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(f"--task {task}: line {number}: {error!r}") from None
    if not questions:
        raise UsageError(f"--task {task}: there is nothing in it")
    return questions


def read_infinitebench(path: pathlib.Path) -> list[FileQuestion]:
    """{"context", "input", "answer": text or list of right answers}; of several the first counts."""
    def parse(record: dict[str, Any]) -> FileQuestion:
        answer = record["answer"][0] if isinstance(record["answer"], list) else record["answer"]
        return FileQuestion(str(record["context"]), f"\n\n{record['input']}\nAnswer:", (" " + str(answer),))

    return _read_lines(path, f"infinitebench:{path}", parse)


def read_ruler(path: pathlib.Path) -> list[FileQuestion]:
    """{"input", "outputs": [...], perhaps "answer_prefix"}; a task with one answer of several (qa) has them all in its list."""
    def parse(record: dict[str, Any]) -> FileQuestion:
        outputs = record["outputs"]
        if isinstance(outputs, str) or not outputs:
            raise ValueError("outputs are no list of answers")
        chosen = outputs[:1] if "qa" in path.parent.name or "qa" in path.stem else outputs
        return FileQuestion("", record["input"] + record.get("answer_prefix", ""), tuple(" " + str(o) for o in chosen))

    return _read_lines(path, f"ruler-file:{path}", parse)


def fits(tokenizer: TextTokenizer, question: FileQuestion, length: int) -> bool:
    """Whether what must stay has at most `length` tokens."""
    return len(tokenizer.prefix) + len(ask(tokenizer, question.question, question.answers).ids) <= length


def file_sample(tokenizer: TextTokenizer, question: FileQuestion, task: str, length: int, name: str) -> Sample:
    """At most `length` tokens; a context that is too long loses its middle, as InfiniteBench cuts it. It must fit."""
    tail = ask(tokenizer, question.question, question.answers)
    room = length - len(tokenizer.prefix) - len(tail.ids)
    context = tokenizer.encode_all([question.context])[0]
    if len(context) > room:
        context = context[: (room + 1) // 2] + context[len(context) - room // 2 :]
    depths = [1.0] * len(question.answers)  # where the answer stands is not known
    return assemble(task, name, length, [*tokenizer.prefix, *context], tail, depths)
