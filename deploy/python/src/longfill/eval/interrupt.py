"""SIGINT and SIGTERM as a request to stop, looked at where it is safe to."""

from __future__ import annotations

import signal


class StopSignals:
    """Takes SIGINT and SIGTERM over, in the main thread. The first one is seen by check(), a second one ends what runs at once.

    An exception out of the handler itself could come while a lock of gRPC is held, which nobody would release then.
    """

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as shells leave SIGINT to jobs in the background
                signal.signal(number, self._take)

    def _take(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self._asked:
            raise KeyboardInterrupt
