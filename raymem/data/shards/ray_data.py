"""Connects to Ray Data, quietly; turns its errors into raymem's; counts the actors that fit."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from raymem.data.shards.transform import Batch
from raymem.errors import FleetError, RaymemError, first_line

OBJECT_STORE_BYTES = 500_000_000
READERS = 2


@contextlib.contextmanager
def ray_data(
    *, num_cpus: int | None = None, block_bytes: int | None = None, verbose: bool = False
) -> Iterator[Any]:
    """The module `ray`, connected for Ray Data, which is silent unless `verbose`.

    `num_cpus` is what a local cluster says it has. Ray Data joins rows until they are `block_bytes`
    (None: its default, 128 MB) before it hands them on.
    """
    # Ray takes seconds to import, and nothing but this needs it.
    from raymem.fleet.cluster import connected

    if not verbose:
        # Else each of Ray Data's actors starts with an error line about its arguments.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with connected(data_bytes=OBJECT_STORE_BYTES, num_cpus=num_cpus, verbose=verbose):
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = verbose
        if not verbose:
            # Ray Data sets its own levels when it is imported.
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        before = context.target_max_block_size
        context.target_max_block_size = block_bytes or before
        try:
            yield ray
        finally:
            context.target_max_block_size = before


def batches_of(ray: Any, rows: Any, what: str) -> Generator[Batch]:
    """The batches of a Ray dataset as they come. Raises FleetError saying that `what` failed, or
    the error of raymem that a worker raised."""
    try:
        yield from rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, RaymemError):
            raise cause from error
        raise FleetError(
            f"{what} failed ({first_line(cause)}); what is done is kept: run the same command "
            "again, with --verbose to see more"
        ) from error


def with_readers() -> int:
    """Number of CPUs for a local Ray: one for each core, and two for reading.

    On small machines scoring actors would otherwise hold all CPUs, and no task could read.
    """
    return (os.cpu_count() or 1) + READERS


def actors(
    resources: Mapping[str, float], threads: int, scorers: int | None, gpus: float | None
) -> tuple[int, dict[str, float]]:
    """The number of scoring actors, and the resources of each.

    >>> actors({"CPU": 8, "GPU": 2}, 1, None, None), actors({"CPU": 4}, 1, None, None)
    ((2, {'num_gpus': 1.0}), (2, {'num_cpus': 1.0}))
    """
    there = resources.get("GPU", 0.0)
    each = gpus if gpus is not None else (1.0 if there else 0.0)
    if each > 0:
        return scorers or max(1, int(there / each)), {"num_gpus": each}
    cpus = int(resources.get("CPU", 0))
    n = scorers or max(1, (cpus - READERS) // threads)
    if n * threads >= cpus:
        raise FleetError(
            f"{n} scorers of {threads} CPUs leave none of the cluster's {cpus} CPUs to read with; "
            "take fewer --scorers or --threads, or a larger cluster"
        )
    return n, {"num_cpus": float(threads)}
