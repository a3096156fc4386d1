"""The gRPC client: one call is one prompt, its KV cache is fetched from all ranks while later layers compute."""

from __future__ import annotations

import dataclasses
import numbers
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import google_crc32c
import grpc
import numpy

from .errors import PrefillError, data_loss
from .kv_reader import KvReader, end_transfer
from .manifest import KvManifest
from .prefilled import Prefilled
from .v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

TOKENS_PER_CHUNK = 16384
_DTYPES = {"float32": kv_pb2.DATA_TYPE_FLOAT32, "bfloat16": kv_pb2.DATA_TYPE_BFLOAT16, "float16": kv_pb2.DATA_TYPE_FLOAT16}
_COVERAGES = {"tiles": prefill_pb2.COVERAGE_TILES, "parity": prefill_pb2.COVERAGE_PARITY}
# A page holds at least one token of all heads, whatever its size.
_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 64 << 20)]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a prompt is; `processed_tokens` is the finished share of the work, in tokens."""

    total_tokens: int
    processed_tokens: int
    layers_done: int
    num_layers: int
    seconds: float
    queue_position: int | None = None  # while it waits: how many are before it; all else is 0 then


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    architecture: str
    model_fingerprint: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    weights_bytes: int
    ranks: int
    mesh: dict[str, int]
    default_attention: str
    max_tokens: int
    instance_epoch: str
    server_version: str
    kv_endpoints: list[str]


class Client:
    """A connection to one service. Thread-safe; several prefills may run at a time, the service computes one by one."""

    def __init__(self, target: str):
        """target: HOST:PORT of rank 0. Connects at the first call."""
        self._target = target
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._stub = prefill_pb2_grpc.PrefillServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def model_info(self, timeout: float | None = 10) -> ModelInfo:
        try:
            info = self._stub.GetModelInfo(prefill_pb2.GetModelInfoRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise PrefillError.from_rpc(error) from None
        fields = {f.name: getattr(info, f.name) for f in dataclasses.fields(ModelInfo)}
        fields["mesh"] = {"sequence": info.mesh.sequence, "head": info.mesh.head}
        fields["kv_endpoints"] = list(info.kv_endpoints)
        return ModelInfo(**fields)

    def prefill(
        self,
        ids: Sequence[int] | numpy.ndarray,
        attention: str | os.PathLike[str] = "auto",
        logits: Literal["last"] | Sequence[int] = "last",
        on_progress: Callable[[Progress], None] | None = None,
        *,
        kv_dtype: str | None = None,
        coverage: str = "tiles",
        recall_monitor: bool | None = None,
        min_recall: float | None = None,
        kv: Literal["fetch", "leave", "drop"] = "fetch",
        request_id: str = "",
        timeout: float | None = None,
    ) -> Prefilled:
        """Prefills one prompt and fetches its KV cache from all ranks while later layers compute.

        ids: token ids of the prompt, integers of at most 32 bits. attention: "auto", "dense", "a-shape:N_INIT,N_LOCAL",
        "vertical-slash:V,S", "block-sparse:K" or "block-share:R,TAU[,S[,C]][,fp8]"; a path object is a pattern file, read here.
        logits: "last" or the positions wanted. on_progress is called in this thread. kv_dtype: "float32", "bfloat16", "float16", or None for what the service
        computes in. coverage: "tiles", "parity".
        recall_monitor: measure, on some rows, what share of the softmax weight sparse attention covers; figures["recall"]
        has it for each layer and head. min_recall, in (0, 1]: heads below it are computed again over more keys, and it is
        reported. None for both: as the service was started.
        timeout: seconds for all of it, the KV cache included. kv: "fetch" it; "leave" it on the ranks for another
        consumer, which finds it by the manifest, until its lease ends; or "drop" it, where the logits are all that is wanted.

        Raises PrefillError, ValueError for arguments that are wrong in themselves. Whatever ends this call, Ctrl-C
        included, ends the prefill and frees its memory on the ranks.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if kv not in ("fetch", "leave", "drop"):
            raise ValueError(f"kv {kv!r}: expected 'fetch', 'leave' or 'drop'")
        tokens = _integers("ids", ids, numpy.int32)
        header = _make_header(len(tokens), attention, logits, kv_dtype, coverage, request_id)
        if recall_monitor is not None or min_recall is not None:
            header.recall.CopyFrom(_make_recall(recall_monitor, min_recall))
        call = self._stub.Prefill(_requests(header, tokens), timeout=_seconds_left(deadline))
        reader: KvReader | None = None
        state = _Events()
        try:
            for event in call:
                kind = event.WhichOneof("event")
                if kind == "accepted":
                    state.manifest = KvManifest.from_proto(event.accepted.manifest)
                    if kv == "drop":
                        end_transfer(state.manifest, self._target, _CHANNEL_OPTIONS)
                    elif kv == "fetch":
                        lease_seconds = event.accepted.manifest.lease_ms / 1000
                        reader = KvReader(state.manifest, self._target, _CHANNEL_OPTIONS, call.cancel, lease_seconds)
                else:
                    state.take(event, on_progress)
            result = state.finish()
            if reader is not None:
                reader.prefill_ended()
                result.kv = reader.finish(_seconds_left(deadline))
                result.transfer = reader.transfer()
            return result
        except grpc.RpcError as error:
            # A reader that failed cancels the call; then its reason is the one that counts.
            if reader is not None and reader.error is not None and error.code() == grpc.StatusCode.CANCELLED:
                raise reader.error from None
            raise state.error_of(error) from None
        finally:
            call.cancel()  # nothing to do where it has ended
            if reader is not None:
                reader.close()


def _seconds_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _integers(name: str, values: Any, kind: type[numpy.signedinteger]) -> numpy.ndarray:
    """`values` as an array [N] of `kind`. ValueError, naming the first that is no integer of that range."""
    array = numpy.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has the shape {list(array.shape)}, expected one dimension")
    if array.dtype.kind not in "iu":  # also where some need more than 64 bits
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ValueError(f"{name}[{index}] is {value!r}, expected an integer")
        array = numpy.array([int(value) for value in values], dtype=object)
    limits = numpy.iinfo(kind)
    if array.size and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
        index, value = next((i, v) for i, v in enumerate(array.tolist()) if not limits.min <= v <= limits.max)
        raise ValueError(f"{name}[{index}] is {value}, which {limits.bits} bits do not hold")
    return array.astype(kind)


def _make_header(num_tokens: int, attention: str | os.PathLike[str], logits: Literal["last"] | Sequence[int],
                 kv_dtype: str | None, coverage: str, request_id: str) -> prefill_pb2.PrefillHeader:
    if kv_dtype is not None and kv_dtype not in _DTYPES:
        raise ValueError(f"kv_dtype {kv_dtype!r}: expected one of {', '.join(_DTYPES)}")
    if coverage not in _COVERAGES:
        raise ValueError(f"coverage {coverage!r}: expected one of {', '.join(_COVERAGES)}")
    if isinstance(logits, str) and logits != "last":
        raise ValueError(f"logits {logits!r}: expected 'last' or a list of positions")
    if isinstance(attention, str):
        spec = prefill_pb2.AttentionSpec(spec=attention)
    else:
        path = pathlib.Path(attention)
        spec = prefill_pb2.AttentionSpec(spec=path.name, pattern_json=path.read_text(encoding="utf-8"))
    return prefill_pb2.PrefillHeader(
        request_id=request_id, num_tokens=num_tokens, attention=spec, coverage=_COVERAGES[coverage],
        logits_positions=[] if isinstance(logits, str) else _integers("logits", logits, numpy.int64).tolist(),
        kv_dtype=kv_pb2.DATA_TYPE_UNSPECIFIED if kv_dtype is None else _DTYPES[kv_dtype],
    )


def _make_recall(monitor: bool | None, min_recall: float | None) -> prefill_pb2.RecallOptions:
    if min_recall is not None and not 0 < min_recall <= 1:
        raise ValueError(f"min_recall {min_recall!r}: expected a number in (0, 1]")
    return prefill_pb2.RecallOptions(monitor=bool(monitor), min_recall=min_recall or 0.0)


def _requests(header: prefill_pb2.PrefillHeader, ids: numpy.ndarray) -> Iterator[prefill_pb2.PrefillRequest]:
    yield prefill_pb2.PrefillRequest(header=header)
    for begin in range(0, len(ids), TOKENS_PER_CHUNK):
        chunk = prefill_pb2.TokenChunk(ids=ids[begin : begin + TOKENS_PER_CHUNK].tolist())
        yield prefill_pb2.PrefillRequest(tokens=chunk)


class _Events:
    """What the events of one call have said so far."""

    def __init__(self) -> None:
        self.manifest: KvManifest | None = None
        self._result: Any = None
        self._error: Any = None
        self._logits = bytearray()

    def take(self, event: Any, on_progress: Callable[[Progress], None] | None) -> None:
        kind = event.WhichOneof("event")
        if kind == "progress" and on_progress is not None:
            p = event.progress
            on_progress(Progress(p.total_tokens, p.processed_tokens, p.layers_done, p.num_layers, p.seconds))
        elif kind == "queued" and on_progress is not None:
            on_progress(Progress(0, 0, 0, 0, 0.0, queue_position=event.queued.position))
        elif kind == "logits":
            if event.logits.offset_bytes != len(self._logits):
                raise data_loss(f"logits: {event.logits.offset_bytes} bytes expected before a part, got {len(self._logits)}")
            self._logits += event.logits.data
        elif kind == "result":
            self._result = event.result
        elif kind == "error":
            self._error = event.error

    def finish(self) -> Prefilled:
        """After the call has ended with OK."""
        if self.manifest is None or self._result is None:
            raise data_loss("the service ended the call without a result")
        positions = numpy.array(self._result.positions, dtype=numpy.int64)
        expected = 4 * len(positions) * self._result.vocab_size
        if len(self._logits) != expected:
            raise data_loss(f"logits: got {len(self._logits)} bytes, expected {expected}")
        if google_crc32c.value(bytes(self._logits)) != self._result.logits_crc32c:
            raise data_loss("logits: the CRC-32C does not hold")
        logits = numpy.frombuffer(self._logits, dtype="<f4").reshape(len(positions), self._result.vocab_size)
        return Prefilled(self.manifest, positions, logits, _figures(self._result.figures), {}, [])

    def error_of(self, error: grpc.RpcError) -> PrefillError:
        """The exception for a call that failed, with what the error event added to its status."""
        exception = PrefillError.from_rpc(error)
        if self._error is not None:
            if self._error.retry_after_ms > 0 and exception.retry_after is None:
                exception.retry_after = self._error.retry_after_ms / 1000
            exception.max_tokens = self._error.max_tokens or None
        return exception


def _figures(figures: Any) -> dict[str, Any]:
    """The fields of `longfill prefill --json`."""
    fields = _fields(figures)
    if figures.HasField("recall"):
        for layer in fields["recall"]["layers"]:
            heads = layer["heads"]
            layer["mean"] = sum(heads) / len(heads)
            layer["min"] = min(heads)
            layer["min_head"] = heads.index(layer["min"])
    else:
        del fields["recall"]
    return fields


def _fields(message: Any) -> dict[str, Any]:
    """The fields of a message, and of those in it, by name."""
    fields: dict[str, Any] = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        if descriptor.label == descriptor.LABEL_REPEATED:
            value = [_fields(item) if descriptor.message_type else item for item in value]
        elif descriptor.message_type:
            value = _fields(value)
        fields[descriptor.name] = value
    return fields
