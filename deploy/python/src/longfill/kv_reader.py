"""Fetches the KV cache of one transfer from all ranks at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import google_crc32c
import grpc
import numpy

from .errors import PrefillError, data_loss
from .manifest import KvManifest, KvShard
from .v1 import kv_pb2, kv_pb2_grpc

_END_TIMEOUT_SECONDS = 5.0
_DEFAULT_LEASE_SECONDS = 30.0
# A prefill that fails ends its transfer too, and the readers may hear of it first. Its own status says more, so it gets
# this long to arrive before a failed reader ends the prefill.
_GRACE_SECONDS = 2.0
_WILDCARD_HOSTS = ("", "0.0.0.0", "[::]", "::", "*")


def resolve_endpoint(endpoint: str, target: str) -> str:
    """The endpoint of a rank as this client reaches it: a wildcard host stands for the one that rank 0 is reached at."""
    host, _, port = endpoint.rpartition(":")
    if host not in _WILDCARD_HOSTS:
        return endpoint
    return f"{target.rpartition(':')[0]}:{port}"


def end_transfer(manifest: KvManifest, target: str, channel_options: list[tuple[str, int]]) -> None:
    """Ends a transfer unread, on all ranks."""
    channels = [grpc.insecure_channel(resolve_endpoint(s.endpoint, target), options=channel_options) for s in manifest.shards]
    _end_on_ranks([kv_pb2_grpc.KvServiceStub(channel) for channel in channels], manifest.transfer_id, complete=False)
    for channel in channels:
        channel.close()


def _end_on_ranks(stubs: list[kv_pb2_grpc.KvServiceStub], transfer_id: str, complete: bool) -> None:
    outcome = kv_pb2.TRANSFER_STATE_COMPLETE if complete else kv_pb2.TRANSFER_STATE_ABORTED
    request = kv_pb2.EndTransferRequest(transfer_id=transfer_id, outcome=outcome, reason="client")
    pending = [stub.EndTransfer.future(request, timeout=_END_TIMEOUT_SECONDS) for stub in stubs]
    for call in pending:
        try:
            call.result()
        except grpc.RpcError:
            pass  # a rank that does not answer frees the transfer when its lease runs out


class KvReader:
    """Starts to read at once, in a thread for every rank; one more thread renews the leases.

    Then either finish(), which waits and ends the transfer as complete, or close() alone, which ends it as aborted.
    close() is always called. on_error is called once, from another thread, some time after the first reader has failed.
    """

    def __init__(self, manifest: KvManifest, target: str, channel_options: list[tuple[str, int]],
                 on_error: Callable[[], object], lease_seconds: float | None = None):
        self._manifest = manifest
        self._grace = threading.Timer(_GRACE_SECONDS, on_error)
        shape = (manifest.num_kv_heads, manifest.num_tokens, manifest.head_dim)
        self._kv = [(numpy.empty(shape, manifest.storage_type), numpy.empty(shape, manifest.storage_type))
                    for _ in range(manifest.num_layers)]
        # How often each token of a layer has arrived, with all heads. Ranks write at tokens of their own.
        self._seen = numpy.zeros((manifest.num_layers, manifest.num_tokens), dtype=numpy.uint8)
        self._begin = time.monotonic()
        self._lock = threading.Lock()  # guards error, _calls, _arrivals and _num_bytes
        self._arrivals: dict[int, tuple[float, float, int]] = {}  # of each rank: first page, last page, bytes
        self._num_bytes = 0  # so far, of all ranks
        self._num_bytes_before_end = 0
        self.error: PrefillError | None = None
        self._calls: list[grpc.Call] = []
        self._closed = threading.Event()
        self._complete = False
        self._channels = [grpc.insecure_channel(resolve_endpoint(s.endpoint, target), options=channel_options)
                          for s in manifest.shards]
        self._stubs = [kv_pb2_grpc.KvServiceStub(channel) for channel in self._channels]
        self._threads = [threading.Thread(target=self._read_shard, args=(shard, stub), daemon=True)
                         for shard, stub in zip(manifest.shards, self._stubs) if shard.token_ranges]
        self._renewer = threading.Thread(
            target=self._renew_leases, args=((lease_seconds or _DEFAULT_LEASE_SECONDS) / 3,), daemon=True)
        for thread in [*self._threads, self._renewer]:
            thread.start()

    def finish(self, timeout: float | None = None) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
        """Waits for all ranks, at most `timeout` seconds, and checks that every token came once. Raises PrefillError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise PrefillError(grpc.StatusCode.DEADLINE_EXCEEDED, "the KV cache did not arrive in time")
            if self.error is not None:
                raise self.error
        if self._seen.size and (self._seen != 1).any():
            layer, token = (int(i) for i in numpy.argwhere(self._seen != 1)[0])
            raise data_loss(f"KV cache: layer {layer}, token {token} came {self._seen[layer, token]} times")
        self._complete = True
        return self._kv

    def prefill_ended(self) -> None:
        """Says that compute is over: what has come until now came beside it."""
        with self._lock:
            self._num_bytes_before_end = self._num_bytes

    def transfer(self) -> dict[str, Any]:
        """How the pages came, for figures; after finish()."""
        with self._lock:
            arrivals = dict(sorted(self._arrivals.items()))
        return {
            "bytes": sum(num_bytes for _, _, num_bytes in arrivals.values()),
            "bytes_before_end": self._num_bytes_before_end,
            "first_page_seconds": min((first for first, _, _ in arrivals.values()), default=0.0),
            "last_page_seconds": max((last for _, last, _ in arrivals.values()), default=0.0),
            "ranks": [{"rank": rank, "bytes": num_bytes, "first_page_seconds": first, "last_page_seconds": last}
                      for rank, (first, last, num_bytes) in arrivals.items()],
        }

    def close(self) -> None:
        """Ends streams, threads and the transfer on every rank."""
        with self._lock:
            self._closed.set()
            self._grace.cancel()
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        _end_on_ranks(self._stubs, self._manifest.transfer_id, self._complete)
        for thread in [*self._threads, self._renewer]:
            thread.join()
        for channel in self._channels:
            channel.close()

    def _renew_leases(self, interval_seconds: float) -> None:
        request = kv_pb2.RenewLeaseRequest(transfer_id=self._manifest.transfer_id)
        while not self._closed.wait(interval_seconds):
            for stub in self._stubs:
                try:
                    stub.RenewLease(request, timeout=interval_seconds)
                except grpc.RpcError:
                    pass  # whoever reads from that rank learns why

    def _read_shard(self, shard: KvShard, stub: kv_pb2_grpc.KvServiceStub) -> None:
        what = f"KV cache of rank {shard.rank} ({shard.endpoint})"
        try:
            call = stub.ReadPages(kv_pb2.ReadPagesRequest(transfer_id=self._manifest.transfer_id,
                                                          layout=kv_pb2.KV_LAYOUT_HND))
            with self._lock:
                self._calls.append(call)
            if self._closed.is_set():
                call.cancel()
            self._take_pages(call, shard, what)
        except grpc.RpcError as error:
            self._fail(PrefillError.from_rpc(error, what))
        except PrefillError as error:
            self._fail(error)

    def _take_pages(self, call: grpc.Call, shard: KvShard, what: str) -> None:
        num_bytes, end, first_page = 0, None, 0.0
        for response in call:
            for page in response.pages:
                first_page = first_page or time.monotonic() - self._begin
                self._place(page, shard, what)
                num_bytes += len(page.key) + len(page.value)
                with self._lock:
                    self._num_bytes += len(page.key) + len(page.value)
            if response.HasField("end"):
                end = response.end
        if end is None or not end.complete:
            raise data_loss(f"{what}: the stream ended early{f': {end.reason}' if end is not None else ''}")
        m = self._manifest
        expected = 2 * m.num_layers * m.num_kv_heads * shard.num_tokens * m.head_dim * m.storage_type.itemsize
        if num_bytes != expected or end.num_bytes != expected:
            raise data_loss(f"{what}: got {num_bytes} bytes, {end.num_bytes} were sent, {expected} were expected")
        with self._lock:
            self._arrivals[shard.rank] = (first_page, time.monotonic() - self._begin, num_bytes)

    def _place(self, page: kv_pb2.KvPage, shard: KvShard, what: str) -> None:
        m = self._manifest
        begin, end = page.token_begin, page.token_begin + page.num_tokens
        where = f"{what}: layer {page.layer}, tokens [{begin}, {end})"
        owned = any(first <= begin < end <= last for first, last in shard.token_ranges)
        if not (0 <= page.layer < m.num_layers and owned and page.head_begin == 0 and page.num_heads == m.num_kv_heads):
            raise data_loss(f"{where}: a page that was not asked for")
        for part, data, checksum in ((0, page.key, page.key_crc32c), (1, page.value, page.value_crc32c)):
            if len(data) != page.num_heads * page.num_tokens * m.head_dim * m.storage_type.itemsize:
                raise data_loss(f"{where}: a page of {len(data)} bytes")
            if google_crc32c.value(data) != checksum:
                raise data_loss(f"{where}: the CRC-32C does not hold")
            values = numpy.frombuffer(data, m.storage_type).reshape(m.num_kv_heads, page.num_tokens, m.head_dim)
            self._kv[page.layer][part][:, begin:end] = values
        self._seen[page.layer, begin:end] += 1

    def _fail(self, error: PrefillError) -> None:
        with self._lock:
            first = self.error is None
            self.error = self.error or error
            if first and not self._closed.is_set():
                self._grace.start()
