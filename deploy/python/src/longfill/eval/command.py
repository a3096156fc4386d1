"""The command line of `longfill eval`."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from ..client import Client
from . import plots, report, tasks
from .errors import EvalError, UsageError
from .interrupt import StopSignals
from .results import Results, open_results, read_records
from .runner import DENSE, Method, Runner
from .service import patterns_digest, running_service
from .tokens import TextTokenizer

_DESCRIPTION = """What sparse attention costs and brings: runs tasks dense and with each --attention, and writes scores, KL and top-1
agreement with dense, density and seconds. What follows -- are options of `longfill serve`, such as --device cuda."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message} (longfill eval --help shows the options)")


def _length(text: str) -> int:
    """8192, 8K or 1M."""
    match = re.fullmatch(r"([1-9][0-9]*)([kKmM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; expected tokens such as 8192, 8K or 1M")
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def _list_of(item):
    return lambda text: [item(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")


def _parser() -> _Parser:
    parser = _Parser(prog="longfill eval", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    add = parser.add_argument
    add("--model", type=pathlib.Path, metavar="DIR", help="Hugging Face model directory, with tokenizer.json")
    add("--out", type=pathlib.Path, metavar="DIR", required=True, help="results, summary and plots; a run there goes on")
    add("--task", type=_list_of(str), metavar="NAME,...", default=["niah-end", "niah-spread"],
        help="default: niah-end,niah-spread; README.md of longfill.eval lists all")
    add("--length", type=_list_of(_length), metavar="N,...", help="tokens of a prompt, such as 8192, 8K or 1M")
    add("--attention", action="append", metavar="SPEC", help="a method, as for `longfill prefill`, or a pattern file; may be given "
        "several times (default: auto). Dense always runs")
    add("--depths", type=_positive, metavar="N", default=10, help="niah-end: depths, evenly over the prompt (default: 10)")
    add("--samples", type=_positive, metavar="N", default=1, help="of each task and length, for niah-end of each depth (default: 1)")
    add("--seed", type=int, metavar="N", default=1, help="other samples (default: 1)")
    add("--text", type=pathlib.Path, metavar="FILE|DIR", help="the haystack: .txt, .jsonl with a field \"text\", or a directory of them")
    add("--windows", type=_positive, metavar="N", default=16, help="perplexity: windows over the prompt (default: 16)")
    add("--window", type=_positive, metavar="N", default=16, help="perplexity: predicted tokens of a window (default: 16)")
    add("--squad", type=pathlib.Path, metavar="FILE", help="for ruler:qa_1: SQuAD 1.1 or 2.0, JSON")
    add("--hotpotqa", type=pathlib.Path, metavar="FILE", help="for ruler:qa_2: HotpotQA, distractor setting, JSON")
    add("--ranks", type=_positive, metavar="N", default=1, help="of the service, by mpirun (default: 1)")
    add("--target", metavar="HOST:PORT", help="a service that runs already, of the same model")
    add("--logits-memory", type=_positive, metavar="MIB", default=512, help="of one prompt (default: 512)")
    add("--dense-floor", type=_share, metavar="SHARE", default=0.5,
        help="where dense scores less there is nothing to compare (default: 0.5)")
    add("--report", action="store_true", help="run nothing: table and plots from all results in --out")
    add("--no-plots", action="store_true")
    add("--program", default="longfill", help=argparse.SUPPRESS)  # the program that started this
    return parser


def _check(options: argparse.Namespace, serve_options: Sequence[str]) -> None:
    if options.report:
        return
    for name in ("model", "length"):
        if getattr(options, name) is None:
            raise UsageError(f"--{name} is missing (longfill eval --help shows the options)")
    if options.target is not None and (serve_options or options.ranks > 1):
        raise UsageError("--target is a service that runs already: --ranks and options after -- are for one that is started here")
    if not options.model.is_dir():
        raise UsageError(f"--model {options.model}: there is no such directory")


def _methods(specs: Sequence[str]) -> list[Method]:
    methods = [Method.create(spec) for spec in dict.fromkeys(specs) if spec != DENSE]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--attention: two pattern files have the name {name}")
    return methods


@contextlib.contextmanager
def _service(options: argparse.Namespace, serve_options: Sequence[str], check: Callable[[], None]) -> Iterator[str]:
    if options.target is not None:
        yield options.target
        return
    with running_service(options.program, options.model, options.ranks, serve_options, options.out, check) as target:
        yield target


def _say(message: str) -> None:
    print(f"longfill: eval: {message}", file=sys.stderr, flush=True)


def _evaluate(options: argparse.Namespace, serve_options: Sequence[str], results: Results,
              check: Callable[[], None]) -> list[dict]:
    settings = tasks.Settings(
        model=options.model, lengths=tuple(options.length), depths=options.depths, samples=options.samples, seed=options.seed,
        windows=options.windows, window=options.window, text=options.text, squad=options.squad, hotpotqa=options.hotpotqa)
    names = tasks.expand(options.task, settings)
    methods = _methods(options.attention or ["auto"])
    tokenizer = TextTokenizer(options.model)  # before a service is started for nothing
    digest = patterns_digest(options.model, serve_options) if options.target is None else None
    with _service(options, serve_options, check) as target, Client(target) as client:
        runner = Runner(client, results, methods, {"serve": list(serve_options)}, _say, check, digest)
        too_long = [n for n in options.length if n > runner.model.max_tokens]
        if too_long:
            raise UsageError(f"--length {max(too_long)}: the model takes {runner.model.max_tokens} tokens")
        source = tasks.Source(settings, tokenizer, options.logits_memory * (1 << 20) // (4 * runner.model.vocab_size))
        builds = tasks.plan(names, source)
        runner.try_methods()
        return runner.run((build() for build in builds), len(builds))


def _run(arguments: Sequence[str], check: Callable[[], None]) -> int:
    arguments = list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    serve_options = arguments[split + 1 :]
    options = _parser().parse_args(arguments[:split])
    _check(options, serve_options)
    if not options.no_plots:
        plots.require_matplotlib()
    if options.report:
        records = read_records(options.out)
        if not records:
            raise UsageError(f"--out {options.out}: there are no results in it")
        models = sorted({record["model"] for record in records})
        if len(models) > 1:
            raise UsageError(f"--out {options.out}: there are results of {len(models)} models in it: {', '.join(models)}")
    else:
        with open_results(options.out) as results:
            records = _evaluate(options, serve_options, results, check)
    records = report.latest(records)
    rows = report.summarise(records, options.dense_floor)
    try:
        report.write_summary(options.out, rows)
        drawn = [] if options.no_plots else plots.draw(options.out, records, rows)
    except OSError as error:
        raise EvalError(f"{error.filename or options.out}: {error.strerror or error}") from None
    if drawn:
        _say(f"drew {', '.join(path.name for path in drawn)} in {options.out}")
    print(report.table(rows), flush=True)
    return 0


def _forget_output() -> None:
    """Leaves nothing to be written when Python ends: whoever read it is gone."""
    with open(os.devnull, "wb") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a stream in memory has no number
                os.dup2(nowhere.fileno(), stream.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 bad usage or input, with one line on standard error; 141, as of a program that
    SIGPIPE ends, where nobody reads the output any more. The table is the last that is written.

    Without `arguments` it is the program: those of the command line, and SIGINT and SIGTERM end it, its service with it.
    """
    try:
        if arguments is None:
            return _run_or_say_why(sys.argv[1:], StopSignals().check)
        return _run_or_say_why(arguments, lambda: None)
    except BrokenPipeError:
        _forget_output()
        return 128 + signal.SIGPIPE


def _run_or_say_why(arguments: Sequence[str], check: Callable[[], None]) -> int:
    try:
        return _run(arguments, check)
    except UsageError as error:
        _say(" ".join(str(error).split()))
        return 2
    except EvalError as error:
        _say(" ".join(f"{error}; what was finished is kept, the same command goes on".split()))
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        _say(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))
        return 1
    except KeyboardInterrupt:
        _say("interrupted; what was finished is kept, the same command goes on")
        return 1
