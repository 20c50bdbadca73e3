"""Structured logs: what workers and the driver log, with trial, worker and host as fields.

Workers on Ray log JSON lines into files among Ray's logs, logs/train/ray-train-app-worker-*.log:
Ray Train sets that up, and adds node_id, worker_id and the worker group. With
`Resources(log_format="json")` the driver's messages are JSON lines on stderr too, with those of the
serial engine's trials; otherwise it logs nothing, and shows progress to people.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from raymem.encoding import epsilon_name
from raymem.fleet.progress import Report
from raymem.fleet.trial_queue import COMMITTED, Lease

LOGGER = logging.getLogger("raymem.fleet")
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """A record and its fields as one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = {k: v for k, v in vars(record).items() if k not in STANDARD}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        level, message = record.levelname, record.getMessage()
        return json.dumps({"time": time, "level": level, "message": message, **fields})


@contextlib.contextmanager
def json_logs(wanted: bool) -> Iterator[logging.Logger | None]:
    """While the block runs, log JSON to stderr; gives the logger, or None if it is not wanted."""
    if not wanted:
        yield None
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    before = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    # Other handlers, such as Ray's in a driver, would print every line again.
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield LOGGER
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]


@dataclass(frozen=True, kw_only=True)
class TrialLog:
    """What one worker logs of its trials."""

    study: str
    """The study's hash."""
    worker: str
    device: str

    def leased(self, lease: Lease) -> None:
        """An attempt starts."""
        LOGGER.info("%s starts", lease.key, extra=self._fields("leased", lease))

    def ended(self, lease: Lease, outcome: str, message: str, report: Report) -> None:
        """An attempt has ended; a failed one with its traceback."""
        fields = self._fields("ended", lease) | {"outcome": outcome}
        if outcome in COMMITTED:
            fields |= {k: v for k, v in report.measures.items() if not math.isnan(v)}
            LOGGER.info("%s %s", lease.key, outcome, extra=fields)
            return
        fields |= {"cause": message, "traceback": report.traceback}
        # Not an error of the process: the trial is tried again.
        LOGGER.warning("%s failed: %s", lease.key, outcome, extra=fields)

    def _fields(self, event: str, lease: Lease) -> dict[str, object]:
        assert lease.key is not None
        return {
            "event": event,
            "study": self.study[:12],
            "trial": lease.key.trial,
            "epsilon": epsilon_name(lease.key.epsilon),
            "attempt": lease.attempt,
            "worker": self.worker,
            "host": socket.gethostname(),
            "device": self.device,
        }
