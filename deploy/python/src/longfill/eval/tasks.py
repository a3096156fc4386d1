"""The names of tasks, and the samples that each stands for."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Sequence

from . import loaders, niah, perplexity, retrieval, ruler, ruler_qa
from .errors import UsageError
from .filler import Filler
from .sample import Sample
from .tokens import TextTokenizer, model_key_words

Build = Callable[[], Sample]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says about samples."""

    model: pathlib.Path
    lengths: tuple[int, ...]
    depths: int = 10
    samples: int = 1
    seed: int = 1
    windows: int = 16
    window: int = 16
    text: pathlib.Path | None = None
    squad: pathlib.Path | None = None
    hotpotqa: pathlib.Path | None = None


class Source:
    """What generators draw from. max_positions: of one sample, whose logits fit the memory for them."""

    def __init__(self, settings: Settings, tokenizer: TextTokenizer, max_positions: int):
        self.settings = settings
        self.max_positions = max_positions
        self.tokenizer = tokenizer
        self.needles = niah.NeedleText.create(tokenizer, model_key_words(settings.model))

    @functools.cached_property
    def filler(self) -> Filler:
        """The haystack of the command line, else sentences made here."""
        text = self.settings.text
        return Filler.made(self.tokenizer) if text is None else Filler.of_files(self.tokenizer, text)

    @functools.cached_property
    def ruler(self) -> ruler.Materials:
        squad, hotpotqa = self.settings.squad, self.settings.hotpotqa
        return ruler.Materials(self.tokenizer, lambda: self.filler, None if squad is None else ruler_qa.read_squad(squad),
                               None if hotpotqa is None else ruler_qa.read_hotpotqa(hotpotqa))

    def names_and_seeds(self, task: str, length: int, cell: str = "") -> list[tuple[str, str]]:
        """Of the samples of one task and length, and there of one cell such as a depth."""
        names = [f"{length}/{cell}{i}" for i in range(self.settings.samples)]
        return [(name, f"{self.settings.seed}/{task}/{length}/{name}") for name in names]


def _niah_end(source: Source, task: str, length: int) -> list[Build]:
    depths = [(d + 0.5) / source.settings.depths for d in range(source.settings.depths)]
    return [functools.partial(niah.end_sample, source.needles, source.filler, length, depth, name, seed)
            for depth in depths for name, seed in source.names_and_seeds(task, length, f"depth-{depth:.3f}/")]


def _niah_spread(source: Source, task: str, length: int) -> list[Build]:
    return [functools.partial(niah.spread_sample, source.needles, source.filler, length, source.max_positions, name, seed)
            for name, seed in source.names_and_seeds(task, length)]


def _kv_retrieval(source: Source, task: str, length: int) -> list[Build]:
    """The samples' keys stand evenly over the object."""
    named = source.names_and_seeds(task, length)
    return [functools.partial(retrieval.kv_sample, source.tokenizer, length, (i + 0.5) / len(named), name, seed)
            for i, (name, seed) in enumerate(named)]


def _perplexity(source: Source, task: str, length: int) -> list[Build]:
    if source.settings.text is None:
        raise UsageError("--task perplexity needs --text FILE: sentences that are made at random have none worth knowing")
    s = source.settings
    return [functools.partial(perplexity.perplexity_sample, source.tokenizer, source.filler, length, s.windows, s.window,
                              source.max_positions, name, seed) for name, seed in source.names_and_seeds(task, length)]


def _ruler(source: Source, task: str, length: int) -> list[Build]:
    return [functools.partial(ruler.ruler_sample, source.ruler, task.removeprefix(_RULER), length, name, seed)
            for name, seed in source.names_and_seeds(task, length)]


def _file(source: Source, task: str, length: int) -> list[Build]:
    """As many lines of the file as --samples says, drawn at random from those that fit; the same ones whenever they fit."""
    kind, _, text = task.partition(":")
    path = pathlib.Path(text)
    questions = _FILES[kind](path)
    # RULER writes TASK/validation.jsonl.
    short = f"{kind}:{path.absolute().parent.name if path.stem in ('validation', 'test') else path.stem}"
    builds: list[Build] = []
    for index in random.Random(f"{source.settings.seed}/{kind}").sample(range(len(questions)), len(questions)):
        if len(builds) == source.settings.samples:
            break
        make = functools.partial(loaders.file_sample, source.tokenizer, questions[index], short, length, f"{length}/{index}")
        if loaders.fits(source.tokenizer, questions[index], length):
            builds.append(make)
    if not builds:
        raise UsageError(f"--task {task}: all {len(questions)} samples are longer than --length {length}")
    return builds


_RULER = "ruler:"
_FILES = {"infinitebench": loaders.read_infinitebench, "ruler-file": loaders.read_ruler}
_TASKS = {"niah-end": _niah_end, "niah-spread": _niah_spread, "kv-retrieval": _kv_retrieval, "perplexity": _perplexity}


def _generator(task: str) -> Callable[[Source, str, int], list[Build]]:
    if task in _TASKS:
        return _TASKS[task]
    kind, _, rest = task.partition(":")
    if kind in _FILES and rest:
        return _file
    if task.startswith(_RULER) and rest in ruler.NAMES:
        return _ruler
    known = ", ".join([*_TASKS, "ruler", "ruler:NAME", *(f"{kind}:FILE" for kind in _FILES)])
    raise UsageError(f"--task {task}: there is no such task; there are {known}, where NAME is one of {', '.join(ruler.NAMES)}")


def expand(names: Sequence[str], settings: Settings) -> list[str]:
    """The single tasks of --task, each once; `ruler` is all of RULER's that there are files for. Refuses what is none."""
    tasks: list[str] = []
    for name in names:
        if name == "ruler":
            absent = {"qa_1": settings.squad is None, "qa_2": settings.hotpotqa is None}
            tasks += [_RULER + task for task in ruler.NAMES if not absent.get(task, False)]
        else:
            _generator(name)
            tasks.append(name)
    tasks = list(dict.fromkeys(tasks))
    for task, path, option in (("qa_1", settings.squad, "--squad"), ("qa_2", settings.hotpotqa, "--hotpotqa")):
        if _RULER + task in tasks and path is None:
            raise UsageError(f"--task {_RULER}{task} needs {option} FILE")
    return tasks


def plan(tasks: Sequence[str], source: Source) -> list[Build]:
    """What makes the samples, short prompts first. Refuses what can be known to be impossible."""
    lengths = sorted(set(source.settings.lengths))
    return [build for length in lengths for task in tasks for build in _generator(task)(source, task, length)]
