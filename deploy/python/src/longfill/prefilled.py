"""The result of a prefill: logits, figures and the KV cache."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from typing import Any

import numpy

from . import safetensors_io
from .manifest import KvFile, KvManifest, KvShard

_FORMAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass
class Prefilled:
    """What one prompt left behind.

    manifest: shape and identity of the KV cache.
    positions: int64 [P], the positions whose logits were asked for; logits: float32 [P, vocab_size].
    figures: what was measured, the fields of `longfill prefill --json`; empty where it was read from files.
    transfer: how the KV cache came, seconds since the service accepted the prompt: {"bytes", "first_page_seconds",
        "last_page_seconds", "bytes_before_end" (of the prefill), "ranks": the first three and "rank" for each that has
        tokens}; empty where it was not fetched.
    kv: for each layer (key, value), each [kv_heads, tokens, head_dim] as stored (bits of bfloat16 as uint16); empty where
        the KV cache was not fetched.
    """

    manifest: KvManifest
    positions: numpy.ndarray
    logits: numpy.ndarray
    figures: dict[str, Any]
    transfer: dict[str, Any]
    kv: list[tuple[numpy.ndarray, numpy.ndarray]]

    def next_token(self) -> int:
        """The greedy first token after the prompt, from the logits of its last position."""
        rows = numpy.flatnonzero(self.positions == self.manifest.num_tokens - 1)
        if rows.size == 0:
            raise ValueError("the logits of the last position were not asked for")
        return int(self.logits[rows[0]].argmax())

    def to_numpy(self, raw: bool = False) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
        """For each layer (key, value), each [kv_heads, tokens, head_dim]; keys are post-RoPE.

        float32 and float16 come as they are, without a copy. numpy has no bfloat16: it is widened to float32, which is
        exact; with raw=True its bits come as uint16.
        """
        self._require_kv()
        if self.manifest.dtype != "bfloat16" or raw:
            return list(self.kv)
        return [(_widen(key), _widen(value)) for key, value in self.kv]

    def to_dynamic_cache(self, config: Any = None, *, dtype: Any = None, device: Any = None) -> Any:
        """A transformers.DynamicCache of the prompt (batch of one) in the dtype of the KV cache, or in `dtype`.

        config: the model's config; its layers, KV heads and head dim must be those of the cache. To go on, feed the next
        token: that is next_token(), because the cache already holds every token of the prompt. The first tensors share
        memory with this object where neither dtype nor device is changed; transformers does not write into them.
        ValueError for a prompt beyond the first chunk of dual chunk attention, which transformers does not have.
        """
        import torch
        from transformers import DynamicCache

        self._require_kv()
        self._check_plain_keys(config)
        if config is not None:
            self._check_config(config)
        # transformers 5 builds its layers from the config, 4.45 has no such parameter.
        takes_config = config is not None and "config" in inspect.signature(DynamicCache.__init__).parameters
        cache = DynamicCache(config=config) if takes_config else DynamicCache()
        for layer, pair in enumerate(self.kv):
            key, value = (_to_torch(torch, array, self.manifest.dtype).to(device=device, dtype=dtype) for array in pair)
            cache.update(key[None], value[None], layer)
        return cache

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes what `longfill prefill` writes, one file a layer, so that load_manifest() reads it back."""
        self._require_kv()
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        manifest = self.manifest
        everything = [(0, manifest.num_tokens)]
        files = []
        for layer, (key, value) in enumerate(self.kv):
            name = f"kv-layer-{layer:03d}-rank-000.safetensors"
            kind = _FORMAT_NAMES[manifest.dtype]
            safetensors_io.write(directory / name, {"key": (kind, key), "value": (kind, value)})
            files.append(KvFile(name, (layer, layer + 1), (0, manifest.num_kv_heads), 0, everything))
        safetensors_io.write(directory / "logits.safetensors",
                             {"positions": ("I64", self.positions), "logits": ("F32", self.logits)})
        saved = dataclasses.replace(manifest, files=files, shards=[KvShard(0, "", everything)])
        (directory / "manifest.json").write_text(saved.to_json(), encoding="utf-8")  # last: it stands for a whole result

    def _require_kv(self) -> None:
        if not self.kv:
            raise ValueError("the KV cache was not fetched")

    def _check_plain_keys(self, config: Any) -> None:
        plain = self.manifest.rotary_chunk_tokens
        if plain == 0:
            return
        dual_chunk = getattr(config, "dual_chunk_attention_config", None) or {}
        plain = min(plain, dual_chunk.get("original_max_position_embeddings", plain))  # keys are scaled beyond
        if self.manifest.num_tokens > plain:
            raise ValueError(f"the keys of {self.manifest.num_tokens} tokens are those of dual chunk attention, which is "
                             f"plain up to {plain} tokens; transformers does not have it")

    def _check_config(self, config: Any) -> None:
        def read(*names: str) -> Any:  # the second name is that of remote-code ChatGLM
            return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

        heads = read("num_key_value_heads", "multi_query_group_num") or config.num_attention_heads
        head_dim = read("head_dim", "kv_channels") or config.hidden_size // config.num_attention_heads
        wanted = (read("num_hidden_layers", "num_layers"), heads, head_dim)
        got = (self.manifest.num_layers, self.manifest.num_kv_heads, self.manifest.head_dim)
        if wanted != got:
            raise ValueError(f"the config has (layers, KV heads, head dim) {wanted}, the KV cache has {got}")


def load_manifest(directory: str | pathlib.Path) -> Prefilled:
    """Reads what `longfill prefill`, `longfill submit` or Prefilled.save() wrote.

    ValueError, naming the file, where the manifest, the files and the shape of the cache do not belong together; OSError
    where a file cannot be read.
    """
    directory = pathlib.Path(directory)
    path = directory / "manifest.json"
    manifest = KvManifest.from_json(path.read_text(encoding="utf-8"), str(path))
    shape = (manifest.num_kv_heads, manifest.num_tokens, manifest.head_dim)
    kv = [(numpy.empty(shape, manifest.storage_type), numpy.empty(shape, manifest.storage_type))
          for _ in range(manifest.num_layers)]
    seen = numpy.zeros((manifest.num_layers, manifest.num_kv_heads, manifest.num_tokens), dtype=numpy.uint8)
    for file in manifest.files:
        _load_file(directory / file.name, file, manifest, kv, seen)
    if seen.size and (seen.min() != 1 or seen.max() != 1):
        layer, head, token = (int(i) for i in numpy.argwhere(seen != 1)[0])
        raise ValueError(f"{path}: layer {layer}, KV head {head}, token {token} is in {seen[layer, head, token]} files")
    positions, logits = _load_logits(directory / "logits.safetensors")
    return Prefilled(manifest, positions, logits, {}, {}, kv)


def _load_logits(path: pathlib.Path) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(positions [P], logits [P, vocab_size])."""
    tensors = safetensors_io.read(path)
    nothing = ("nothing", numpy.empty(0))
    (kind, positions), (logits_kind, logits) = (tensors.get(name, nothing) for name in ("positions", "logits"))
    right = (kind, logits_kind, positions.ndim, logits.ndim) == ("I64", "F32", 1, 2)
    if not right or len(positions) != len(logits):
        raise ValueError(f"{path}: positions are {kind}{list(positions.shape)} and logits {logits_kind}{list(logits.shape)}, "
                         "expected I64[P] and F32[P, vocab_size]")
    return numpy.array(positions), numpy.array(logits)


def _load_file(path: pathlib.Path, file: KvFile, manifest: KvManifest,
               kv: list[tuple[numpy.ndarray, numpy.ndarray]], seen: numpy.ndarray) -> None:
    if file.layers[1] != file.layers[0] + 1:
        raise ValueError(f"{path}: holds layers {file.layers}, expected one layer")
    tensors = safetensors_io.read(path)
    heads = slice(*file.kv_heads)
    num_tokens = sum(end - begin for begin, end in file.token_ranges)
    expected = (file.kv_heads[1] - file.kv_heads[0], num_tokens, manifest.head_dim)
    for part, name in enumerate(("key", "value")):
        kind, array = tensors.get(name, ("nothing", numpy.empty(0)))
        if kind != _FORMAT_NAMES[manifest.dtype] or array.shape != expected:
            raise ValueError(f"{path}: {name} is {kind}{list(array.shape)}, expected {manifest.dtype}{list(expected)}")
        row = 0
        for begin, end in file.token_ranges:
            kv[file.layers[0]][part][heads, begin:end] = array[:, row : row + end - begin]
            row += end - begin
    for begin, end in file.token_ranges:
        seen[file.layers[0], heads, begin:end] += 1


def _widen(bits: numpy.ndarray) -> numpy.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def _to_torch(torch: Any, array: numpy.ndarray, dtype: str) -> Any:
    """A tensor over the array's memory."""
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
