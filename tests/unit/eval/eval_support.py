"""Helpers of the tests of longfill.eval: the package, two small tokenizers, text again from token ids, a service that is none."""

import pathlib
import sys
import tempfile
import types
import unittest

import numpy

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "deploy" / "python"), str(ROOT / "deploy" / "python" / "src")]
import generate_protos  # noqa: E402

generate_protos.generate()

import longfill  # noqa: E402
from longfill.eval import filler, tasks  # noqa: E402
from longfill.eval.tokens import TextTokenizer  # noqa: E402


def write_tokenizers(folder):
    """Model directories: `bytes`, a token for each byte; `words`, trained, digits by threes, with a token at the begin."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()

    words = Tokenizer(models.BPE())
    split = Regex(r" ?\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}\s]+|\s+(?!\S)|\s+")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(filler.make_sentences(400), trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<begin>"], initial_alphabet=alphabet, show_progress=False))
    words.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    for name, tokenizer in (("bytes", plain), ("words", words)):
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))


class TokenizerTest(unittest.TestCase):
    """Test case with `self.tmp`, a fresh directory, and `self.models`, model directories of the small tokenizers."""

    @classmethod
    def setUpClass(cls):
        directory = tempfile.TemporaryDirectory(prefix="longfill-eval-")
        cls.addClassCleanup(directory.cleanup)
        cls.folder = pathlib.Path(directory.name)
        write_tokenizers(cls.folder)
        cls.models = [cls.folder / "bytes", cls.folder / "words"]
        cls.fillers = {}

    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="longfill-eval-")
        self.addCleanup(directory.cleanup)
        self.tmp = pathlib.Path(directory.name)

    def samples(self, task, model, lengths=(4096,), max_positions=10000, **settings):
        """The samples of one task."""
        chosen = tasks.Settings(model=model, lengths=tuple(lengths), **settings)
        source = tasks.Source(chosen, TextTokenizer(model), max_positions)
        if chosen.text is None:  # sentences made for a model directory are tokenized once
            if model not in self.fillers:
                self.fillers[model] = source.filler
            source.filler = self.fillers[model]
        return [build() for build in tasks.plan([task], source)]


def prompt_text(sample, tokenizer):
    """The prompt without its answers, and the answers, as text. For samples that are asked at the end."""
    first = sample.questions[0].position + 1
    return tokenizer.decode(sample.ids[:first].tolist()), [tokenizer.decode(list(q.answer)) for q in sample.questions]


class FakeClient:
    """In the place of longfill.Client: ranks the right token first but where `wrong` says otherwise."""

    def __init__(self, vocab_size=300, max_tokens=100000):
        self.calls = []
        self.wrong = {}      # method -> how many positions from the last on are wrong
        self.error = None    # (after so many calls, exception)
        self.epoch = "e"
        self._vocab_size, self._max_tokens = vocab_size, max_tokens

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def model_info(self, timeout=None):
        return types.SimpleNamespace(model_fingerprint="f", ranks=1, mesh={"sequence": 1, "head": 1}, server_version="v",
                                     max_tokens=self._max_tokens, vocab_size=self._vocab_size, instance_epoch=self.epoch,
                                     default_attention="dense below 32768 tokens, else patterns.json")

    def prefill(self, ids, attention, logits="last", kv="fetch", on_progress=None):
        if self.error is not None and len(self.calls) >= self.error[0]:
            raise self.error[1]
        self.calls.append((str(attention), len(ids)))
        if on_progress is not None:
            on_progress(None)
        positions = [len(ids) - 1] if logits == "last" else logits
        random = numpy.random.default_rng(len(ids))
        rows = random.normal(size=(len(positions), self._vocab_size)).astype(numpy.float32)
        for row, position in enumerate(positions):
            rows[row, ids[position + 1] if position + 1 < len(ids) else 7] = 9
        wrong = self.wrong.get(str(attention), 0)
        if wrong:
            rows[-wrong:] = -rows[-wrong:]
        figures = {"seconds": 2.0, "index_seconds": 0.25, "attention_seconds": 1.0, "density": 0.5, "device": "none",
                   "compute_dtype": "float32", "ranks": 1}
        return types.SimpleNamespace(logits=rows, figures=figures)


__all__ = ["FakeClient", "TokenizerTest", "longfill", "prompt_text", "write_tokenizers"]
