"""Ray Data, quietly: a connection, actors for the models, and results as they come."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from raymem.errors import FleetError, RaymemError, first_line
from raymem.shards.work import Batch

OBJECT_STORE_BYTES = 500_000_000
READERS = 2


@contextlib.contextmanager
def ray_data(verbose: bool) -> Iterator[None]:
    """Ray, connected, and Ray Data set up."""
    # Ray takes seconds to import, and nothing but this needs it.
    from raymem.fleet.cluster import connected

    if not verbose:
        # Else each of Ray Data's actors starts with an error line about its arguments.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    cores = os.cpu_count() or 1
    # A local Ray gets two slots for reading beside one for each core: an actor that had a core's
    # slot for itself would leave none to read with on small machines, and nothing would move.
    with connected(data_bytes=OBJECT_STORE_BYTES, num_cpus=cores + READERS, verbose=verbose):
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = verbose
        if not verbose:
            # Ray Data sets its own levels when it is imported.
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield


def results(dataset: Any) -> Generator[Batch]:
    """What a dataset gives, block by block, as it comes; errors of ours are raised as they are."""
    import ray

    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, RaymemError):
            raise cause from error
        raise FleetError(
            f"scoring failed ({first_line(cause)}); what is scored is kept: run the same command "
            "again, with --verbose to see more"
        ) from error


def actors(
    resources: Mapping[str, float], threads: int, scorers: int | None, gpus: float | None
) -> tuple[int, dict[str, float]]:
    """How many scoring actors, and what each of them holds.

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
