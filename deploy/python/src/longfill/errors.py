"""What goes wrong in a prefill."""

from __future__ import annotations

import grpc

# Trailing metadata of a refusal that is worth repeating, in milliseconds.
RETRY_KEY = "grpc-retry-pushback-ms"


class PrefillError(Exception):
    """A prefill or the hand-off of its KV cache failed.

    code: grpc.StatusCode; DATA_LOSS where bytes did not arrive as they were sent.
    message: what the service or the client found wrong.
    retry_after: seconds after which the same request may be taken, or None: repeating it is no use.
    max_tokens: the longest prompt that would have been taken, or None where length is not the trouble.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None,
                 max_tokens: int | None = None):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.max_tokens = max_tokens

    @classmethod
    def from_rpc(cls, error: grpc.RpcError, what: str = "") -> PrefillError:
        """From the status of a call; `what` names it in the message."""
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        details = (error.details() if isinstance(error, grpc.Call) else str(error)) or "no details"
        retry_after = None
        if isinstance(error, grpc.Call):
            for key, value in error.trailing_metadata() or ():
                if key == RETRY_KEY and value.isdigit():
                    retry_after = int(value) / 1000
        return cls(code, f"{what}: {details}" if what else details, retry_after)


def data_loss(message: str) -> PrefillError:
    return PrefillError(grpc.StatusCode.DATA_LOSS, message)
