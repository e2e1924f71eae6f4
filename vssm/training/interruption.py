"""Stopping politely: the first SIGINT or SIGTERM asks the loop to save and leave, the second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interruption:
    """While it is entered, a signal is kept as `signal` instead of ending the process.

    Outside the main thread, where Python allows no signal handlers, it does nothing.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict = {}

    @property
    def requested(self) -> bool:
        """Whether a signal asked to stop."""
        return self.signal is not None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
