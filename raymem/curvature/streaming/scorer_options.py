"""`ScorerOptions`: what images are scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from raymem.errors import CurvatureError
from raymem.fleet import Engine
from raymem.settings import Setting


@dataclass(frozen=True, kw_only=True)
class ScorerOptions:
    """What images are scored on: not part of what is measured.

    Raises CurvatureError for settings that make no sense.
    """

    models_per_pass: Annotated[int | None, Setting(least=1, none="auto", form="auto|N")] = None
    """Decode each image once for this many models, all of which every scorer holds; auto: as many
    as fit in a quarter of its memory, 32 at most."""
    engine: Engine = "ray"
    """Where models run; serial: in this process, without Ray."""
    scorers: Annotated[int | None, Setting(least=1)] = None
    """Scorers at work at once; None: one for each GPU, or core."""
    gpus_per_scorer: Annotated[float | None, Setting(least=0)] = None
    """GPUs of each scorer; a fraction packs several on one GPU; None: 1 if there are any, else
    0."""
    batch_size: Annotated[int | None, Setting(least=1)] = None
    """Images in a batch; None: by the size of the images."""
    threads: Annotated[int, Setting(least=1, most=256)] = 1
    """CPU threads of each scorer."""
    verbose: bool = False
    """Show Ray's own output."""

    def __post_init__(self) -> None:
        for name in ("models_per_pass", "scorers", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CurvatureError(f"{name} must be 1 or more, got {value}")
