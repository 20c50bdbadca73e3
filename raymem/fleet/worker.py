"""The loop of a worker: lease, train, commit. The same code in this process and on Ray."""

from __future__ import annotations

import math
import platform
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from raymem.curvature import CurvatureRule
from raymem.data import CachedExamples, Examples
from raymem.errors import (
    FleetError,
    ResultMismatchError,
    StoreError,
    StoreFullError,
    TrialError,
)
from raymem.fleet.progress import Report
from raymem.fleet.resources import Resources
from raymem.fleet.store_checkpoints import StoreCheckpoints
from raymem.fleet.trial_log import TrialLog
from raymem.fleet.trial_queue import COMMITTED, Lease, Outcome
from raymem.plan import Plan, Seeds
from raymem.privacy import Mechanism
from raymem.store import Store, TrialKey, trial_table
from raymem.store.trials import CurvatureProvenance, Provenance
from raymem.store.weights import weights_digest
from raymem.training import (
    ALONE,
    Images,
    Measured,
    Member,
    Ranks,
    Recipe,
    TrialResult,
    fast_arithmetic,
    models_per_step,
    run_group,
    run_trial,
)
from raymem.version import VERSION

Arrays = tuple[
    NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]
]  # x_train, y_train, x_test, y_test


class TrialArguments(TypedDict):
    """What `run_trial` is given for one trial."""

    curvature: CurvatureRule | None
    keep_weights: bool
    mechanism: Mechanism | None


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """What trials do beyond the recipe, and which of them."""

    curvature: CurvatureRule | None = None
    """How curvature is measured; None: not at all."""
    curvature_trials: int | None = None
    """Only in trials below this number; None: in all."""
    keep_models: int = 0
    """Weights are kept of the trials below this number."""
    mechanisms: Mapping[float, Mechanism] = field(default_factory=dict)
    """Of private studies: what trials at each epsilon do, epsilon inf among them."""

    def of(self, key: TrialKey) -> TrialArguments:
        """Arguments for `run_trial`."""
        measured = self.curvature_trials is None or key.trial < self.curvature_trials
        return {
            "curvature": self.curvature if measured else None,
            "keep_weights": key.trial < self.keep_models,
            "mechanism": self.mechanisms[key.epsilon] if self.mechanisms else None,
        }


class Source(Protocol):
    """Where a node has the set's arrays from: the object store, or a cache that it copies once."""

    def arrays(self) -> Arrays:
        """The arrays, mapped."""


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """Arrays that travel with the job; on each node they are mapped from Ray's object store."""

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]

    def arrays(self) -> Arrays:
        """As they are."""
        return self.x_train, self.y_train, self.x_test, self.y_test


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a worker needs, sent to each node once; its arrays are mapped, not copied."""

    store_url: str
    study_hash: str
    plan: Plan
    recipe: Recipe
    threads: int
    """CPU threads per trial."""
    options: TrialOptions
    """What trials do beside training and evaluation."""
    source: Source
    n_classes: int
    models_per_step: int | None = None
    """How many models a worker trains at once; None: as many as its device is faster with."""
    gpu_share: float = 1.0
    """Of a GPU, for each worker."""
    checkpoint_seconds: float = Resources.checkpoint_seconds
    """How often a trial is saved while it trains."""

    @classmethod
    def of(
        cls,
        examples: Examples,
        plan: Plan,
        recipe: Recipe,
        store: Store,
        options: TrialOptions,
        resources: Resources,
    ) -> Job:
        """The job of a study."""
        return cls(
            store_url=store.url,
            study_hash=store.study().hash,
            plan=plan,
            recipe=recipe,
            threads=resources.cpus_per_trial,
            options=options,
            source=source_of(examples),
            n_classes=examples.n_classes,
            models_per_step=1 if resources.workers_per_trial > 1 else resources.models_per_step,
            gpu_share=min(1.0, resources.gpus_per_trial or 1.0),
            checkpoint_seconds=resources.checkpoint_seconds,
        )

    def models_at_once(self, images: Images) -> int:
        """How many trials a worker with these images leases and trains in one step."""
        if self.options.mechanisms:  # each clips and adds noise by itself
            return 1
        if self.models_per_step is not None:
            return self.models_per_step
        with fast_arithmetic(self.threads):
            return models_per_step(images, self.recipe, self.plan.subset_size, share=self.gpu_share)

    @property
    def data_bytes(self) -> int:
        """Bytes that are sent to each node through Ray's object store."""
        if not isinstance(self.source, InMemory):
            return 0
        return self.source.x_train.nbytes + self.source.x_test.nbytes

    def images(self, device: torch.device) -> Images:
        """The set as tensors, for trials on `device`."""
        return Images.from_arrays(*self.source.arrays(), self.n_classes, device)


def source_of(examples: Examples) -> Source:
    """The cache of the data set, if it has one, else its arrays."""
    if isinstance(examples, CachedExamples):
        return examples.cache
    return InMemory(
        x_train=examples.x_train,
        y_train=examples.y_train,
        x_test=examples.x_test,
        y_test=examples.y_test,
    )


class QueueClient(Protocol):
    """The trial queue as a worker sees it: the object itself, or a Ray actor behind it."""

    def lease_group(self, worker: str, n: int) -> list[Lease] | None:
        """See TrialQueue.lease_group."""

    def finish(
        self,
        worker: str,
        key: TrialKey,
        outcome: Outcome,
        message: str = "",
        report: Report | None = None,
    ) -> None:
        """See TrialQueue.finish."""


# The last frames of a traceback are those that tell.
TRACEBACK_CHARACTERS = 8000


class Ending(NamedTuple):
    """How an attempt at a trial ended."""

    outcome: Any
    """An Outcome; or "peer": another rank failed, this one did not."""
    message: str = ""
    report: Report = Report()

    @classmethod
    def of(cls, outcome: str, message: str, error: BaseException) -> Ending:
        """An attempt that failed."""
        text = "".join(traceback.format_exception(error))
        if len(text) > TRACEBACK_CHARACTERS:
            text = f"...\n{text[-TRACEBACK_CHARACTERS:]}"
        return cls(outcome, message, Report(traceback=text))


def work(
    queue: QueueClient,
    job: Job,
    device: torch.device,
    worker: str,
    *,
    ranks: Ranks = ALONE,
    preempted: threading.Event | None = None,
    count_images: Callable[[int], None] = lambda images: None,
    after_trial: Callable[[], None] = lambda: None,
) -> None:
    """Train trials until the trial queue has none left.

    Of several `ranks` that train each trial together, rank 0 leases and commits, all with the name
    of its `worker`. `preempted` is set when the node is about to go. Raises FleetError if one of
    several failed: the others may be waiting for it, and only starting all of them anew helps.
    """
    images, store = job.images(device), Store(job.store_url)
    attempt = Attempt(job, images, store, ranks, preempted or threading.Event(), count_images)
    at_once = job.models_at_once(images) if ranks.alone else 1

    def next_leases() -> list[Lease] | None:
        return queue.lease_group(worker, at_once) if ranks.rank == 0 else None

    log = TrialLog(study=job.study_hash, worker=worker, device=str(device))

    def finished(lease: Lease, ending: Ending) -> None:
        assert lease.key is not None
        log.ended(lease, *ending)
        queue.finish(worker, lease.key, *ending)
        after_trial()

    while (leases := ranks.broadcast(next_leases())) is not None:
        if leases[0].key is None:
            time.sleep(leases[0].wait)
            continue
        for lease in leases:
            log.leased(lease)
        if len(leases) > 1:
            attempt.together(leases, finished)
        elif ranks.alone:
            finished(leases[0], attempt(leases[0]))
        else:
            _with_others(queue, worker, attempt, leases[0], log)
            after_trial()


def _with_others(
    queue: QueueClient, worker: str, attempt: Attempt, lease: Lease, log: TrialLog
) -> None:
    """A trial that several ranks train together."""
    ranks, key = attempt.ranks, lease.key
    assert key is not None
    ending = attempt(lease)
    log.ended(lease, *ending)
    outcome, message = ending.outcome, ending.message
    failed = FleetError(f"rank {ranks.rank} of {ranks.world} failed: {message}")
    if outcome == "peer":
        # Another rank failed and reports it, or died, which the trial queue detects.
        raise failed
    if ranks.rank == 0 or outcome not in (*COMMITTED, "diverged"):
        queue.finish(worker, key, *ending)
    if outcome not in (*COMMITTED, "diverged"):
        raise failed


@dataclass(frozen=True)
class Attempt:
    """Trains and commits one trial after the other; what goes wrong becomes an outcome."""

    job: Job
    images: Images
    store: Store
    ranks: Ranks
    preempted: threading.Event
    count_images: Callable[[int], None]

    def __call__(self, lease: Lease) -> Ending:
        """How the trial ended."""
        return self._ending(lease, lambda: self._train(lease))

    def together(self, leases: Sequence[Lease], finished: Callable[[Lease, Ending], None]) -> None:
        """Train several trials in one step; `finished` hears of each when it is committed."""
        left = dict(enumerate(leases))
        trials = [_Trial.of(self, lease, share=1 / len(leases)) for lease in leases]

        def committed(number: int, found: TrialResult | Exception) -> None:
            def commit() -> Ending:
                if isinstance(found, Exception):
                    raise found
                return self._commit(leases[number], trials[number], found)

            lease = left.pop(number)
            finished(lease, self._ending(lease, commit))

        members = [self._member(lease, trial) for lease, trial in zip(leases, trials, strict=True)]
        try:
            run_group(
                self.images,
                members,
                self.job.recipe,
                subset_size=self.job.plan.subset_size,
                threads=self.job.threads,
                on_result=committed,
                on_epoch=lambda epoch: self.count_images(self.job.plan.subset_size),
            )
        except Exception as error:  # none of a single trial's: of all that are left
            for lease in list(left.values()):
                finished(lease, self._ending(lease, lambda error=error: _raised(error)))  # type: ignore[misc]

    def _member(self, lease: Lease, trial: _Trial) -> Member:
        assert lease.key is not None
        asked = self.job.options.of(lease.key)
        return Member(
            mask=trial.mask,
            seeds=trial.seeds,
            curvature=asked["curvature"],
            keep_weights=asked["keep_weights"],
            checkpoints=trial.checkpoints,
        )

    def _ending(self, lease: Lease, work: Callable[[], Ending]) -> Ending:
        key = lease.key
        assert key is not None
        try:
            return work()
        except StoreFullError as error:
            return Ending.of("full", str(error), error)
        except ResultMismatchError as error:
            return Ending.of("mismatch", str(error), error)
        except TrialError as error:
            self.store.record_failure(key, lease.attempt, error.cause, str(error))
            # Resuming from it would fail again.
            self.store.delete_checkpoint(key)
            return Ending.of(error.cause, str(error), error)
        except StoreError as error:  # tried again for as long as that makes sense
            return Ending.of("store", str(error), error)
        except Exception as error:  # the user's model can raise anything; the trial queue decides
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename}:{where.lineno}"
            outcome = "peer" if self.ranks.lost_a_peer(error) else "error"
            message = f"{key} failed: {type(error).__name__}: {error} ({place})"
            return Ending.of(outcome, message, error)

    def _train(self, lease: Lease) -> Ending:
        job, trial = self.job, _Trial.of(self, lease)
        share = int(trial.mask.sum()) // self.ranks.world
        assert lease.key is not None
        result = run_trial(
            self.images,
            trial.mask,
            job.recipe,
            trial.seeds,
            subset_size=job.plan.subset_size,
            threads=job.threads,
            checkpoints=trial.checkpoints,
            ranks=self.ranks,
            on_epoch=lambda epoch: self.count_images(share),
            **job.options.of(lease.key),
        )
        return self._commit(lease, trial, result)

    def _commit(self, lease: Lease, trial: _Trial, result: TrialResult) -> Ending:
        key, checkpoints = lease.key, trial.checkpoints
        assert key is not None
        if self.ranks.rank > 0:
            return Ending("committed")
        about = provenance(self.job, key, lease, trial.seeds, result, self.images.device)
        if checkpoints.resumed:
            about["resumed"] = True
            about["seconds"] = round(about["seconds"] + checkpoints.seconds_before, 3)
        if not self.ranks.alone:
            about["workers"] = self.ranks.world
        if result.weights is not None:
            self.store.keep_weights(key, result.weights, about)
            about["weights"] = weights_digest(result.weights)
        committed = self.store.commit(key, trial_table(key, trial.mask, result), about)
        if checkpoints.written or checkpoints.resumed:
            self.store.delete_checkpoint(key)
        return Ending(committed, report=Report(measures=_measures(trial, result, about)))


@dataclass(frozen=True)
class _Trial:
    """The inputs of a leased trial."""

    mask: NDArray[np.bool_]
    seeds: Seeds
    checkpoints: StoreCheckpoints

    @classmethod
    def of(cls, attempt: Attempt, lease: Lease, share: float = 1.0) -> _Trial:
        """`share`: of the worker's time, the trial's."""
        job, key = attempt.job, lease.key
        assert key is not None
        seeds = job.plan.seeds(key.trial, key.epsilon, lease.seed_attempt)
        identity = {
            "study_hash": job.study_hash,
            "seeds": vars(seeds),
            "workers": attempt.ranks.world,
        }
        seconds = job.checkpoint_seconds
        return cls(
            mask=job.plan.mask(key.trial),
            seeds=seeds,
            checkpoints=StoreCheckpoints(
                attempt.store, key, identity, seconds, attempt.preempted, share=share
            ),
        )


def _raised(error: Exception) -> Ending:
    raise error


def _measures(trial: _Trial, result: TrialResult, about: Provenance) -> dict[str, float]:
    """What is told of a committed trial at once; all of it is in its object."""
    return {
        "train_accuracy": float(result.train.correct[trial.mask].mean()),
        "test_accuracy": float(result.test.correct.mean())
        if len(result.test.correct)
        else math.nan,
        "seconds": about["seconds"],
    }


def provenance(
    job: Job, key: TrialKey, lease: Lease, seeds: Seeds, result: TrialResult, device: torch.device
) -> Provenance:
    """The provenance of a trial."""
    mechanism = job.options.mechanisms.get(key.epsilon)
    # Results that nobody can repeat are not to agree with each other.
    by_itself = f" {uuid.uuid4().hex}" if mechanism is not None and mechanism.secure_mode else ""
    about = Provenance(
        study_hash=job.study_hash,
        attempt=lease.attempt,
        seeds=vars(seeds),
        seconds=round(result.seconds, 3),
        device=device.type,
        arithmetic=arithmetic(device, job.threads, job.recipe, result.how)
        + _of_curvature(result.curvature)
        + by_itself,
        host=socket.gethostname(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        raymem=VERSION,
    )
    if result.curvature is not None:
        about["curvature"] = curvature_about(job, result.curvature)
    if mechanism is not None:
        about["privacy"] = mechanism.as_dict()
    return about


def arithmetic(device: torch.device, threads: int, recipe: Recipe, how: str) -> str:
    """The arithmetic of a trial: results may differ between two of these, never within one.

    `how` is the result's: alone, or in a group of how many.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"{name} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__} threads "
        f"{threads}, {recipe.precision}, evaluated in float32, {how}"
    )


def _of_curvature(measured: Measured | None) -> str:
    if measured is None or measured.precision.precision == "float32":
        return ""
    return f", curvature in {measured.precision.precision}"


def curvature_about(job: Job, measured: Measured) -> CurvatureProvenance:
    """How curvature was measured, for the provenance."""
    rule = None if job.options.curvature is None else job.options.curvature.as_dict()
    about: CurvatureProvenance = {
        "mode": measured.mode,
        "rule": rule,
        "seconds": round(measured.seconds, 3),
        "precision": measured.precision.precision,
        "precision_differences": measured.precision.differences,
    }
    if "curvature_over_training" in measured.values:
        seconds = round(measured.epochs_seconds, 3)
        about["over_training"] = {"epochs": measured.epochs, "seconds": seconds}
    return about
