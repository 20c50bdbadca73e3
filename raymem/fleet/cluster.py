"""Connecting to Ray, quietly: a private local cluster, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import warnings
from collections.abc import Iterator

# One per process: Ray reads it once.
TOKEN = secrets.token_hex(32)
_OURS: list[bool] = []
# What nodes without GPUs have in our cluster files, and the head, to say that there are such nodes.
CPU_NODE = "raymem_cpu"
QUIET_LOGGERS = ("ray", "ray.train", "ray.data", "ray.tune", "ray.serve")


@contextlib.contextmanager
def connected(
    *, data_bytes: int = 0, num_cpus: int | None = None, verbose: bool = False
) -> Iterator[None]:
    """Ray, connected: as it is if the process is connected, else RAY_ADDRESS's cluster, else local.

    A local cluster lives as long as the block, and is protected by a token of its own that is never
    written to disk: a token that `ray.init()` leaves in the home folder would switch authentication
    on in a later `ray start`, and break `ray job submit`. Unless `verbose`, Ray is silent.
    `num_cpus` is what a local cluster says it has.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    if ray.is_initialized():
        yield
        return
    options = {
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
    }
    if os.environ.get("RAY_ADDRESS"):
        with _quiet(verbose), _own_sigterm():
            ray.init(**options)
        try:
            yield
        finally:
            ray.shutdown()
        return
    with _private_token(), _quiet(verbose):
        with _own_sigterm():
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=num_cpus,
                object_store_memory=max(200_000_000, 2 * data_bytes),
                **options,
            )
        _OURS.append(True)
        try:
            yield
        finally:
            _OURS.pop()
            ray.shutdown()


def is_private() -> bool:
    """Is the connected Ray local to this process, so that no autoscaler grows it?"""
    return bool(_OURS)


def on_head() -> dict[str, object]:
    """Options of an actor that must run on the head node: other nodes may be lost."""
    from raymem.fleet.ray_internals import HEAD_RESOURCE

    return _where(HEAD_RESOURCE)


def on_cpu_nodes() -> dict[str, object]:
    """Options of tasks that need no GPU: on nodes without, where the cluster has such.

    Beyond what these nodes hold, other waiting tasks make Ray start nodes with GPUs. It is no label
    selector: Ray's first autoscaler does not know of these.
    """
    return _where(CPU_NODE)


def _where(resource: str) -> dict[str, object]:
    import ray

    known = any(resource in node["Resources"] for node in ray.nodes() if node["Alive"])
    return {"resources": {resource: 0.001}} if known else {}


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which `ray.init()` replaces by `sys.exit(15)`."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _private_token() -> Iterator[None]:
    # Without RAY_AUTH_MODE, ray.init() switches token mode on by itself, and writes a token into
    # the home folder unless it finds one in the environment.
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = TOKEN
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.pop("RAY_AUTH_MODE", None)


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    if verbose:
        yield
        return
    before = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="ray")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
