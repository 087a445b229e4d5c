"""Wall time, and the processor time that tells implementations apart on a busy machine."""

from __future__ import annotations

from dataclasses import dataclass
from time import process_time

from safeopt.timing import clock


@dataclass(frozen=True)
class Time:
    """How long something took.

    Attributes:
        seconds: of wall time.
        processor_seconds: of all threads of this process together.
    """

    seconds: float
    processor_seconds: float


class Stopwatch:
    """Runs from its construction on."""

    def __init__(self) -> None:
        self._wall, self._processor = clock(), process_time()

    def read(self) -> Time:
        """The time so far."""
        return Time(clock() - self._wall, process_time() - self._processor)
