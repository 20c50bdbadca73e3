"""Mid-trial checkpoints in the store: checkpoints/eps-inf/000017/state, replaced whole, not kept.

One is written every so often while a trial trains, and at once when its node is about to go. The
next worker that leases the trial goes on from there. They are only ever a saving of time: one that
is damaged, or of another attempt, is left aside.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable

from raymem.store import Store, TrialKey

# Interval of checkpoints once the node is about to go.
PREEMPTED_SECONDS = 20.0


class StoreCheckpoints:
    """The checkpoints of one attempt at one trial; see `raymem.training.Checkpoints`."""

    def __init__(
        self,
        store: Store,
        key: TrialKey,
        identity: dict[str, object],
        seconds: float,
        preempted: threading.Event,
        clock: Callable[[], float] = time.monotonic,
        *,
        share: float = 1.0,
    ) -> None:
        self.store, self.key, self.seconds, self.preempted = store, key, seconds, preempted
        self.identity = json.loads(json.dumps(identity))
        self.seconds_before = 0.0
        """What earlier workers spent on the trial, up to the checkpoint that was loaded. Of a group
        that is a `share` of the time."""
        self.resumed = False
        """Was one loaded?"""
        self.written = False
        """Was one saved?"""
        self._clock, self._share = clock, share
        self._start = self._last = clock()
        self._saved_when_preempted = False

    def load(self) -> bytes | None:
        """The last one of this attempt, or None."""
        data = self.store.read_checkpoint(self.key)
        if data is None:
            return None
        line, _, body = data.partition(b"\n")
        try:
            about = json.loads(line)
        except ValueError:
            return None
        if not isinstance(about, dict) or about.get("digest") != hashlib.sha256(body).hexdigest():
            return None
        if about.get("identity") != self.identity:
            return None
        self.seconds_before, self.resumed = float(about["seconds"]), True
        return body

    def due(self) -> bool:
        """After `seconds`; at once when the node is about to go, and then every 20 s."""
        if self.preempted.is_set() and not self._saved_when_preempted:
            return True
        wait = min(self.seconds, PREEMPTED_SECONDS) if self._saved_when_preempted else self.seconds
        return self._clock() - self._last >= wait

    def save(self, data: bytes) -> None:
        """Replace the last checkpoint. Raises StoreFullError."""
        self._saved_when_preempted = self.preempted.is_set()
        self._last = self._clock()
        about = {
            "identity": self.identity,
            "digest": hashlib.sha256(data).hexdigest(),
            "seconds": self.seconds_before + self._share * (self._last - self._start),
        }
        self.written = True
        self.store.write_checkpoint(self.key, json.dumps(about).encode() + b"\n" + data)
