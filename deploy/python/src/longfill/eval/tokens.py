"""The tokenizer of a model directory."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib

from .errors import UsageError


class TextTokenizer:
    """tokenizer.json of a Hugging Face model directory."""

    def __init__(self, model_dir: str | pathlib.Path):
        try:
            import tokenizers
        except ImportError:
            raise UsageError("the Python package tokenizers is missing: pip install tokenizers") from None
        path = pathlib.Path(model_dir) / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; the evaluation needs the model's tokenizer in that form") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # pylint: disable=broad-except  # tokenizers raises Exception itself
            raise UsageError(f"{path}: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        # What the tokenizer puts before a text by itself, such as <|begin_of_text|>.
        plain = self.encode("a")
        whole = self._tokenizer.encode("a").ids
        self.prefix: list[int] = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain):] == plain else []

    @functools.lru_cache(maxsize=1 << 16)
    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, *pieces: str) -> list[int]:
        """The tokens of the pieces, each tokenized by itself; nothing is put before or after."""
        return [token for piece in pieces for token in self._encode(piece)]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def model_key_words(model_dir: str | pathlib.Path) -> tuple[list[str], list[str]] | None:
    """words.json of the model directory, {"w1": [...], "w2": [...]}: the key words it was trained on; None: no such file."""
    path = pathlib.Path(model_dir) / "words.json"
    if not path.is_file():
        return None
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return list(words["w1"]), list(words["w2"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: expected {{\"w1\": [...], \"w2\": [...]}}: {error}") from None
