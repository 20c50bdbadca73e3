"""`driver.json`: the lock of the process that drives a store; a dead one never holds it.

It holds host, pid, the process's start and a counter that moves while the driver lives. On the
same host a dead pid is seen at once; from another host a driver is dead when its counter stood
still for two intervals. Whatever happens to the lock, commits stay safe by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TypedDict, cast

import psutil

from raymem.errors import StoreError, StoreHeldError
from raymem.store.files import Files

KEY = "driver.json"
INTERVAL = 5.0


class DriverRecord(TypedDict):
    """What driver.json holds."""

    token: str
    host: str
    pid: int
    process_started: float
    """See `process_start`."""
    started: str
    interval: float
    counter: int
    """Moves while the driver lives."""
    progress: dict[str, Any]
    """For `raymem status`: where its stage is."""


class DriverLock:
    """Holds a store while the `with` block runs. Raises StoreHeldError if another driver lives.

    `progress` is asked at each heartbeat for what `raymem status` should show of a running fleet.
    """

    def __init__(
        self,
        files: Files,
        *,
        interval: float = INTERVAL,
        progress: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        self.files, self.interval, self.progress = files, interval, progress
        self.lost = threading.Event()
        """Set when another driver took over: stop, and leave the store to it."""
        self._token = uuid.uuid4().hex
        self._counter = 0
        self._stop = threading.Event()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")

    def __enter__(self) -> DriverLock:
        while not self.files.create(KEY, self._record()):
            holder = read_driver(self.files)
            if holder is None:
                continue
            if is_alive(holder, self.files):
                raise StoreHeldError(
                    f"{self.files.url} is held by process {holder['pid']} on {holder['host']} "
                    f"since {holder['started']}; wait for it, or end it, then run the same "
                    "command again"
                )
            # Only the record that was judged dead may be deleted: another driver may be quicker.
            if read_driver(self.files) == holder:
                self.files.delete(KEY)
        self._thread = threading.Thread(
            target=self._heartbeat, name="raymem-driver-lock", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        # A lock that cannot be deleted counts as a dead driver's once this process ends.
        with contextlib.suppress(StoreError):
            holder = read_driver(self.files)
            if holder is not None and holder["token"] == self._token:
                self.files.delete(KEY)

    def check(self) -> None:
        """Raises StoreHeldError if another driver took over."""
        if self.lost.is_set():
            holder = read_driver(self.files)
            who = f" ({holder['host']}, process {holder['pid']})" if holder else ""
            raise StoreHeldError(
                f"another driver{who} took {self.files.url} over while this one stood still; leave "
                "it to that one"
            )

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                holder = read_driver(self.files)
                if holder is None or holder["token"] != self._token:
                    self.lost.set()
                    return
                self._counter += 1
                self.files.replace(KEY, self._record())
            except (
                Exception
            ):  # one missed heartbeat does no harm; if the store stays away, workers stop
                continue

    def _record(self) -> bytes:
        record: DriverRecord = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": process_start(os.getpid()),
            "started": self._started,
            "interval": self.interval,
            "counter": self._counter,
            "progress": dict(self.progress()),
        }
        return json.dumps(record, indent=1).encode()


def read_driver(files: Files) -> DriverRecord | None:
    """The record of the current driver; None if there is none or it cannot be read."""
    try:
        record: Any = json.loads(files.read(KEY))
    except FileNotFoundError:
        return None
    except ValueError:
        files.delete(KEY)
        return None
    if not isinstance(record, dict) or "token" not in record:
        files.delete(KEY)
        return None
    return cast(DriverRecord, record)


def process_start(pid: int) -> float:
    """When a process started, to tell it from others that had its number: seconds, on Linux since
    the boot. Raises psutil.NoSuchProcess.

    Linux keeps it so, and moves the time of the boot when the clock is set.
    """
    started = float(psutil.Process(pid).create_time())
    return started - float(psutil.boot_time()) if psutil.LINUX else started


def is_alive(holder: DriverRecord, files: Files, *, wait: bool = True) -> bool:
    """Does the driver of this record still live? From another host this takes two intervals.

    With `wait=False` a driver on another host is taken to live.
    """
    if holder["host"] == socket.gethostname():
        try:
            same = abs(process_start(holder["pid"]) - holder["process_started"]) < 1
            return same and bool(psutil.Process(holder["pid"]).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
    if not wait:
        return True
    time.sleep(2 * float(holder["interval"]) + 1)
    now = read_driver(files)
    return now is not None and (now["token"], now["counter"]) != (
        holder["token"],
        holder["counter"],
    )
