"""The safetensors format, as far as KV files and logits need it. numpy's own reader of that package has no bfloat16."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct

import numpy

# Name in the format -> element type in memory; the bits of BF16 stay bits.
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_MAX_HEADER_BYTES = 100_000_000


def read(path: pathlib.Path) -> dict[str, tuple[str, numpy.ndarray]]:
    """Tensor name -> (dtype name, array over the mapped file). ValueError for a file that breaks the format."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: not a safetensors file")
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise ValueError(f"{path}: bad safetensors header: {error}") from error
    begin_of_data = 8 + header_bytes
    mapped = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype = numpy.dtype(_TYPES[entry["dtype"]])
        expected = math.prod(entry["shape"]) * dtype.itemsize
        if not 0 <= begin <= end <= size - begin_of_data or end - begin != expected:
            raise ValueError(f"{path}: tensor {name}: bytes [{begin}, {end}) do not hold {entry['dtype']}{entry['shape']}")
        data = mapped[begin_of_data + begin : begin_of_data + end]
        tensors[name] = (entry["dtype"], data.view(dtype).reshape(entry["shape"]))
    return tensors


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
