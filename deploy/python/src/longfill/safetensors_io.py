"""The safetensors format, as far as KV files and logits need it. numpy's own reader of that package has no bfloat16."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from typing import Any

import numpy

# Name in the format -> element type in memory; the bits of BF16 stay bits.
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_MAX_HEADER_BYTES = 100_000_000


def read(path: pathlib.Path) -> dict[str, tuple[str, numpy.ndarray]]:
    """Tensor name -> (dtype name, array over the mapped file). ValueError, naming the file, for one that breaks the format
    or has a dtype that is not among _TYPES."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: not a safetensors file")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: bad safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: bad safetensors header: it is no JSON object")
    begin_of_data = 8 + header_bytes
    mapped = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, begin, end = _parse_entry(entry, size - begin_of_data)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {name}: {error}") from None
        data = mapped[begin_of_data + begin : begin_of_data + end]
        tensors[name] = (dtype, data.view(_TYPES[dtype]).reshape(shape))
    return tensors


def _parse_entry(entry: Any, data_bytes: int) -> tuple[str, list[int], int, int]:
    """(dtype name, shape, begin, end) of a tensor's entry of the header; the data of all tensors is `data_bytes` long."""
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(_TYPES)}")
    if not _are_sizes(shape):
        raise ValueError(f"shape {shape!r} is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {offsets!r} are not two offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes or end - begin != math.prod(shape) * numpy.dtype(_TYPES[dtype]).itemsize:
        raise ValueError(f"bytes [{begin}, {end}) of {data_bytes} do not hold {dtype}{shape}")
    return dtype, shape, begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def write(path: pathlib.Path, tensors: dict[str, tuple[str, numpy.ndarray]]) -> None:
    """The inverse of read(); the file is there whole or not at all."""
    header, offset, arrays = {}, 0, []
    for name, (dtype, array) in tensors.items():
        array = numpy.ascontiguousarray(array, dtype=_TYPES[dtype])
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
        arrays.append(array)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in arrays:
                file.write(array.data)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
