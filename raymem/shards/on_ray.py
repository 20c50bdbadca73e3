"""Ray Data, connected and quiet, and its errors as raymem's."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterator
from typing import Any

from raymem.errors import FleetError, RaymemError, first_line
from raymem.shards.work import Batch

OBJECT_STORE_BYTES = 500_000_000


@contextlib.contextmanager
def ray_data(*, num_cpus: int | None = None, verbose: bool = False) -> Iterator[Any]:
    """The module `ray`, connected for Ray Data, which is silent unless `verbose`.

    `num_cpus` is what a local cluster says it has.
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
        yield ray


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
