"""`Resources`: what the trials of a fleet run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from raymem.errors import FleetError
from raymem.settings import Setting

Engine = Literal["ray", "serial"]
Tracker = Literal["tensorboard", "mlflow", "wandb"]
OPERATION = "Operation of the fleet"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What trials run on.

    Not part of the study's identity. Raises FleetError for settings that make no sense.
    """

    engine: Engine = "ray"
    """Where trials run; serial: in this process, without Ray."""
    cpus_per_trial: Annotated[int, Setting(least=1)] = 1
    """CPU threads of each worker."""
    gpus_per_trial: float | None = None
    """GPUs of each worker; a fraction packs several workers on one GPU; None: 1 if there are any,
    else 0."""
    workers_per_trial: Annotated[int, Setting(least=1)] = 1
    """Train each model on this many GPUs (or cores) together."""
    models_per_step: Annotated[int | None, Setting(least=1, none="auto", form="auto|N")] = None
    """Train this many models at once in each worker, in the same steps; auto: on a GPU as many as
    is fastest, on a CPU one."""
    max_workers: Annotated[int | None, Setting(least=1)] = None
    """Most workers at once, over all nodes; None: as many as fit."""
    checkpoint_seconds: Annotated[
        float, Setting(option="checkpoint-minutes", unit=60, least=0, form="MINUTES")
    ] = 600.0
    """Save each trial this often while it trains, so that a lost node does not cost all of it."""
    stalled_seconds: Annotated[
        float,
        Setting(
            option="stalled-minutes",
            unit=60,
            least=0,
            above_least=True,
            form="MINUTES",
            heading=OPERATION,
        ),
    ] = 1800.0
    """Say why, when no trial was committed for this long."""
    tracker: Annotated[Tracker | None, Setting(heading=OPERATION)] = None
    """Also log accuracies and counts of trials there; needs raymem's extra of the same name; None:
    nowhere."""
    tracker_url: Annotated[str | None, Setting(path=True, heading=OPERATION)] = None
    """Where the tracker keeps runs: folder of tensorboard or wandb, tracking URI of mlflow; None:
    as the library is set up."""
    log_format: Annotated[Literal["text", "json"], Setting(heading=OPERATION)] = "text"
    """Format of the driver's messages; json: one object per line."""
    verbose: bool = False
    """Show Ray's own output."""

    def __post_init__(self) -> None:
        for name in ("cpus_per_trial", "workers_per_trial"):
            if getattr(self, name) < 1:
                raise FleetError(f"{name} must be 1 or more, got {getattr(self, name)}")
        g = self.gpus_per_trial or 0.0
        if g < 0 or (g > 0 and g != 1 and not g < 1):
            raise FleetError(
                f"gpus_per_trial must be 0, 1 or a fraction of 1, got {g}; for one model on "
                "several GPUs give workers_per_trial"
            )
        if self.workers_per_trial > 1 and 0 < g < 1:
            raise FleetError(
                f"workers_per_trial {self.workers_per_trial} needs whole GPUs, got {g} each"
            )
        if self.max_workers is not None and self.max_workers < self.workers_per_trial:
            raise FleetError(
                f"max_workers must be {self.workers_per_trial} or more, got {self.max_workers}"
            )

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker takes, as Ray's resources."""
        gpus = {"GPU": self.gpus_per_trial} if self.gpus_per_trial else {}
        return {"CPU": float(self.cpus_per_trial), **gpus}

    @property
    def need(self) -> str:
        """What one trial takes, for people."""
        need = f"{self.cpus_per_trial} CPUs and {self.gpus_per_trial or 0:g} GPUs"
        return need if self.workers_per_trial == 1 else f"{self.workers_per_trial} times {need}"

    def fit(self, resources: dict[str, float]) -> int:
        """How many workers fit a node with these Ray resources at once."""
        workers = resources.get("CPU", 0) // self.cpus_per_trial
        if self.gpus_per_trial:
            per_gpu = math.floor(1 / self.gpus_per_trial + 1e-9)
            workers = min(workers, resources.get("GPU", 0) * per_gpu)
        return int(workers)
