"""The manifest of a KV cache: whose it is, its shape, and who holds which tokens. See proto/longfill/v1/kv.proto."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy

# Name in manifests -> element type of the arrays that hold it. numpy has no bfloat16: its bits are kept as uint16.
STORAGE_TYPES: dict[str, Any] = {
    "float32": numpy.dtype("<f4"), "float16": numpy.dtype("<f2"), "bfloat16": numpy.dtype("<u2"),
}

TokenRange = tuple[int, int]  # [begin, end)


@dataclasses.dataclass(frozen=True)
class KvShard:
    """What one rank owns: all layers, all KV heads, these tokens."""

    rank: int
    endpoint: str
    token_ranges: list[TokenRange]

    @property
    def num_tokens(self) -> int:
        return sum(end - begin for begin, end in self.token_ranges)


@dataclasses.dataclass(frozen=True)
class KvFile:
    """One file of a batch job: `key` and `value`, each [kv_heads, tokens, head_dim]."""

    name: str
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    rank: int
    token_ranges: list[TokenRange]


@dataclasses.dataclass(frozen=True)
class KvManifest:
    request_id: str
    transfer_id: str
    instance_epoch: str
    architecture: str
    model_fingerprint: str
    token_hashes: list[str]
    page_tokens: int
    num_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    shards: list[KvShard]
    files: list[KvFile] = dataclasses.field(default_factory=list)
    layout: str = "HND"
    version: int = 1
    rotary_chunk_tokens: int = 0
    """Dual chunk attention: the key of token p is rotated at p modulo this (kv.proto); 0: at p."""

    @property
    def storage_type(self) -> numpy.dtype:
        return STORAGE_TYPES[self.dtype]

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        if not self.rotary_chunk_tokens:
            del fields["rotary_chunk_tokens"]  # as the C++ writer: readers that do not know it refuse it
        return json.dumps(fields, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str) -> KvManifest:
        """ValueError, naming `source`, for anything that is not a manifest of this version."""
        try:
            fields = json.loads(text)
            if fields["version"] != 1:
                raise ValueError(f"version {fields['version']}, this package reads version 1")
            if fields["dtype"] not in STORAGE_TYPES or fields["layout"] != "HND":
                raise ValueError(f"dtype {fields['dtype']} in layout {fields['layout']} is not known")
            for name in _SIZES & fields.keys():
                _integer(name, fields[name])
            tokens = fields["num_tokens"]
            shards = [KvShard(_integer("rank", s["rank"]), s["endpoint"], _ranges(s, tokens)) for s in fields.pop("shards")]
            files = [KvFile(_file_name(f["name"]), _range("layers", f["layers"], fields["num_layers"]),
                            _range("kv_heads", f["kv_heads"], fields["num_kv_heads"]), _integer("rank", f["rank"]),
                            _ranges(f, tokens)) for f in fields.pop("files")]
            return cls(shards=shards, files=files, **fields)
        except KeyError as error:
            raise ValueError(f"{source}: not a KV manifest: {error} is missing") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{source}: not a KV manifest: {error}") from error

    @classmethod
    def from_proto(cls, message: Any) -> KvManifest:
        dtypes = {1: "float32", 2: "bfloat16", 3: "float16"}  # longfill.v1.DataType
        if message.version != 1 or message.dtype not in dtypes:
            raise ValueError(f"manifest version {message.version}, dtype {message.dtype}: not known to this package")
        return cls(
            request_id=message.request_id, transfer_id=message.transfer_id, instance_epoch=message.instance_epoch,
            architecture=message.architecture, model_fingerprint=message.model_fingerprint,
            token_hashes=[h.hex() for h in message.token_hashes], page_tokens=message.page_tokens,
            num_tokens=message.num_tokens, num_layers=message.num_layers, num_kv_heads=message.num_kv_heads,
            head_dim=message.head_dim, dtype=dtypes[message.dtype], rotary_chunk_tokens=message.rotary_chunk_tokens,
            shards=[KvShard(s.rank, s.endpoint, [(r.begin, r.end) for r in s.token_ranges]) for s in message.shards],
        )


# Of a manifest as JSON, where it has them.
_SIZES = {"page_tokens", "num_tokens", "num_layers", "num_kv_heads", "head_dim", "rotary_chunk_tokens"}


def _integer(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, expected an integer that is not negative")
    return value


def _range(name: str, value: Any, limit: int) -> tuple[int, int]:
    """[begin, end) within [0, limit)."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} {value!r} is no pair")
    begin, end = (_integer(name, bound) for bound in value)
    if not begin <= end <= limit:
        raise ValueError(f"{name} [{begin}, {end}) is no range within {limit}")
    return begin, end


def _ranges(fields: dict[str, Any], num_tokens: int) -> list[TokenRange]:
    return [_range("token_ranges", pair, num_tokens) for pair in fields["token_ranges"]]


def _file_name(value: Any) -> str:
    """Files of a manifest lie beside it."""
    if not isinstance(value, str) or pathlib.PurePath(value).name != value:
        raise ValueError(f"{value!r} is no name of a file")
    return value
