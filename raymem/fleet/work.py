"""What a worker does: lease, train, commit, again. The same code in-process and on Ray."""

from __future__ import annotations

import platform
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from raymem.curvature import CurvatureRule
from raymem.errors import ResultMismatchError, StoreError, StoreFullError, TrialError
from raymem.examples import Examples
from raymem.fleet.ledger import Lease, Outcome
from raymem.plan import Plan, Seeds
from raymem.store import Store, TrialKey, trial_table
from raymem.store.weights import weights_digest
from raymem.training import Images, Measured, Recipe, TrialResult, run_trial
from raymem.version import VERSION


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What trials do beside training and evaluation, and which of them."""

    curvature: CurvatureRule | None = None
    """How curvature is measured; None: not at all."""
    curvature_trials: int | None = None
    """Only in trials below this number; None: in all."""
    keep_models: int = 0
    """Weights are kept of the trials below this number."""

    def of(self, trial: int) -> dict[str, Any]:
        """Arguments for `run_trial`."""
        measured = self.curvature_trials is None or trial < self.curvature_trials
        return {
            "curvature": self.curvature if measured else None,
            "keep_weights": trial < self.keep_models,
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """All a worker needs to know, sent to each node once; its arrays are mapped, not copied."""

    store_url: str
    study_hash: str
    plan: Plan
    recipe: Recipe
    threads: int
    """CPU threads per trial."""
    extras: Extras
    """What trials do beside training and evaluation."""
    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    n_classes: int

    @classmethod
    def of(
        cls,
        examples: Examples,
        plan: Plan,
        recipe: Recipe,
        store: Store,
        threads: int,
        extras: Extras,
    ) -> Job:
        """The job of a study."""
        return cls(
            store_url=store.url,
            study_hash=store.study()["hash"],
            plan=plan,
            recipe=recipe,
            threads=threads,
            extras=extras,
            x_train=examples.x_train,
            y_train=examples.y_train,
            x_test=examples.x_test,
            y_test=examples.y_test,
            n_classes=examples.n_classes,
        )

    def images(self, device: torch.device) -> Images:
        """The set as tensors on `device`."""
        return Images.from_arrays(
            self.x_train, self.y_train, self.x_test, self.y_test, self.n_classes, device
        )


class LedgerClient(Protocol):
    """The ledger as a worker sees it: the object itself, or a Ray actor behind it."""

    def lease(self, worker: str) -> Lease | None:
        """See Ledger.lease."""

    def finish(self, worker: str, key: TrialKey, outcome: Outcome, message: str = "") -> None:
        """See Ledger.finish."""


def work(
    ledger: LedgerClient,
    job: Job,
    device: torch.device,
    worker: str,
    *,
    after_trial: Callable[[], None] = lambda: None,
) -> None:
    """Train trials until the ledger has none left."""
    images, store = job.images(device), Store(job.store_url)
    while (lease := ledger.lease(worker)) is not None:
        if lease.key is None:
            time.sleep(lease.wait)
            continue
        outcome, message = attempt(job, images, store, lease)
        ledger.finish(worker, lease.key, outcome, message)
        after_trial()


def attempt(job: Job, images: Images, store: Store, lease: Lease) -> tuple[Outcome, str]:
    """Train and commit one trial; what goes wrong becomes an outcome and a message."""
    key = lease.key
    assert key is not None
    mask = job.plan.mask(key.trial)
    seeds = job.plan.seeds(key.trial, key.epsilon, lease.seed_attempt)
    try:
        result = run_trial(
            images, mask, job.recipe, seeds, threads=job.threads, **job.extras.of(key.trial)
        )
        about = provenance(job, lease, seeds, result, images.device)
        if result.weights is not None:
            store.keep_weights(key, result.weights, about)
            about["weights"] = weights_digest(result.weights)
        committed: Any = store.commit(key, trial_table(key, mask, result), about)
    except StoreFullError as error:
        return "full", str(error)
    except ResultMismatchError as error:
        return "mismatch", str(error)
    except TrialError as error:
        cause: Any = error.cause
        store.record_failure(key, lease.attempt, cause, str(error))
        return cause, str(error)
    except StoreError as error:  # tried again for as long as that makes sense
        return "store", str(error)
    except Exception as error:  # the user's model can raise anything; the ledger decides what next
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}:{where.lineno}"
        return "error", f"{key} failed: {type(error).__name__}: {error} ({place})"
    return committed, ""


def provenance(
    job: Job, lease: Lease, seeds: Seeds, result: TrialResult, device: torch.device
) -> dict[str, Any]:
    """How a trial came about, for the metadata of its object."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    measured = result.curvature
    curvature = {} if measured is None else {"curvature": curvature_about(job, measured)}
    return {
        **curvature,
        "study_hash": job.study_hash,
        "attempt": lease.attempt,
        "seeds": vars(seeds),
        "seconds": round(result.seconds, 3),
        "device": device.type,
        # Two results may differ between these, and must not within one.
        "arithmetic": f"{name} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__} "
        f"threads {job.threads}",
        "host": socket.gethostname(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "raymem": VERSION,
    }


def curvature_about(job: Job, measured: Measured) -> dict[str, Any]:
    """How curvature was measured, for the metadata beside it."""
    rule = None if job.extras.curvature is None else job.extras.curvature.as_dict()
    return {"mode": measured.mode, "rule": rule, "seconds": round(measured.seconds, 3)}
