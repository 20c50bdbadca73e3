"""An experiment tracker beside the store: TensorBoard, MLflow or Weights & Biases.

Each by its own library, which is an extra of raymem's. A tracker sees accuracies and seconds of
every committed trial, and the counts of trials, over the number of trials that are done. It is for
looking at a run among others; what counts is in the store. What it fails at later than its start is
said once, and the fleet goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raymem.errors import FleetError, first_line
from raymem.fleet.progress import Progress, TrialEvent
from raymem.fleet.resources import Tracker
from raymem.fleet.trial_queue import COMMITTED
from raymem.store import Store

# A tracker that does not answer is not waited for longer, at the end of a fleet.
CLOSE_SECONDS = 60.0
MOST_WAITING = 100_000


@dataclass(frozen=True, kw_only=True)
class RunAbout:
    """What a tracker is told of a run at its start.

    A study in one store is one run: another run of its job goes on in it.
    """

    name: str
    id: str
    settings: Mapping[str, str]

    @classmethod
    def of(cls, store: Store) -> RunAbout:
        """The run of a study."""
        study = store.study()
        recipe = {f"recipe.{k}": str(v) for k, v in study.identity["recipe"].items()}
        return cls(
            name=f"{study.data_name}-{study.hash[:12]}",
            id=hashlib.sha256(f"{study.hash} {store.url}".encode()).hexdigest()[:16],
            settings={
                "store": store.url,
                "study": study.hash,
                "data": study.data_name,
                "plan": str(study.plan),
                "trials": str(store.target.trials),
                **recipe,
            },
        )


class Client(Protocol):
    """One run in a tracker."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers at a step."""

    def close(self) -> None:
        """The run is over."""


class TensorBoardClient:
    """A folder of event files, by torch's own writer."""

    def __init__(self, about: RunAbout, url: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        made: Callable[..., Any] = SummaryWriter
        self._writer = made(f"{url or 'runs'}/{about.name}-{about.id}")
        self._writer.add_text("study", json.dumps(about.settings, indent=1))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See Client."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """See Client."""
        self._writer.close()


class MLflowClient:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, by default raymem."""

    def __init__(self, about: RunAbout, url: str | None) -> None:
        import mlflow

        self._client = mlflow.MlflowClient(tracking_uri=url)
        named = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raymem")
        experiment = self._client.get_experiment_by_name(named)
        where = experiment.experiment_id if experiment else self._client.create_experiment(named)
        known = self._client.search_runs([where], f"tags.raymem_id = '{about.id}'")
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"raymem_id": about.id}
        self._run = self._client.create_run(where, run_name=about.name, tags=tags).info.run_id
        for name, value in about.settings.items():
            self._client.log_param(self._run, name, value)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See Client."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(
            self._run, metrics=[Metric(name, n, now, step) for name, n in numbers.items()]
        )

    def close(self) -> None:
        """See Client."""
        self._client.set_terminated(self._run)


class WandbClient:
    """A run of the project WANDB_PROJECT, by default raymem; offline with WANDB_MODE=offline."""

    def __init__(self, about: RunAbout, url: str | None) -> None:
        import wandb

        if url is not None:
            Path(url).mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raymem"),
            id=about.id,
            resume="allow",
            name=about.name,
            config=dict(about.settings),
            dir=url,
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See Client."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """See Client."""
        self._run.finish()


CLIENTS: Mapping[Tracker, Callable[[RunAbout, str | None], Client]] = {
    "tensorboard": TensorBoardClient,
    "mlflow": MLflowClient,
    "wandb": WandbClient,
}


class TrackedRun:
    """A run in a tracker, fed by a thread of its own: no tracker holds up a fleet.

    Raises FleetError if the tracker's package is missing, or it cannot be reached at the start.
    """

    def __init__(
        self, tracker: Tracker, url: str | None, store: Store, say: Callable[[str], None]
    ) -> None:
        self._tracker, self._say = tracker, say
        try:
            self._client = CLIENTS[tracker](RunAbout.of(store), url)
        except ImportError as error:
            raise FleetError(
                f"--tracker {tracker} needs its package ({error}); pip install 'raymem[{tracker}]'"
            ) from error
        except Exception as error:  # whatever the tracker's library raises
            raise FleetError(
                f"--tracker {tracker} does not start: {first_line(error)}; check its settings, or "
                "leave it out"
            ) from error
        self._waiting: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(MOST_WAITING)
        self._counts: dict[str, float] = {}
        self._done: int | None = None
        self._thread = threading.Thread(target=self._feed, name="raymem-tracker", daemon=True)
        self._thread.start()

    def add(self, events: list[TrialEvent], progress: Progress) -> None:
        """Tell of committed trials, and of the counts if they changed."""
        if self._done is None:
            self._done = progress.done - progress.committed
        for event in events:
            if event.outcome in COMMITTED:
                self._done += 1
                folder, measures = event.key.folder, event.report.measures
                self._put({f"{folder}/{name}": n for name, n in measures.items()}, self._done)
        counts = {
            "trials/done": float(self._done),
            "trials/running": float(progress.running),
            "trials/failed": float(progress.failed),
        }
        if counts != self._counts:
            self._counts = counts
            self._put(counts, self._done)

    def close(self) -> None:
        """Wait until all is told, but not for ever."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _put(self, numbers: dict[str, float], step: int) -> None:
        try:
            self._waiting.put_nowait((numbers, step))
        except queue.Full:  # a tracker that hangs
            return

    def _feed(self) -> None:
        working = True
        while (told := self._waiting.get()) is not None:
            if working:
                working = self._try(lambda told=told: self._client.log(*told))  # type: ignore[misc]
        if working:
            self._try(self._client.close)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever the tracker's library raises
            self._say(f"--tracker {self._tracker} failed, going on without it: {first_line(error)}")
            return False
        return True
