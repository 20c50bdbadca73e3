"""What can go wrong, drawn.

    RaymemError                  everything raymem raises on purpose
    ├── ExamplesError            the data set cannot be used as it is
    ├── PlanError                subsets asked for do not exist
    ├── RecipeError              the training recipe makes no sense
    ├── PrivacyError             trials cannot be made private so
    ├── CurvatureError           curvature cannot be measured so
    ├── StoreError               the store cannot be read or written
    │   ├── StudyMismatchError   the store belongs to another study, data set or recipe
    │   ├── StoreHeldError       another live driver holds the store (exit code 3)
    │   ├── StoreFullError       no space or quota left (exit code 4)
    │   ├── DamagedObjectError   an object in the store does not read back
    │   ├── ResultMismatchError  one trial, trained twice, gave two results
    │   └── ImportFileError      a file of another fleet cannot become a store
    ├── TrialError               one trial failed; the others go on
    │   ├── DivergedError        its loss or its logits stopped being finite
    │   └── OutOfMemoryError     it did not fit on its device
    └── FleetError               the fleet cannot go on

Every message says the cause, then the next step.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class RaymemError(Exception):
    """Base of all errors raymem raises on purpose; `exit_code` is what commands exit with."""

    exit_code = 1


class ExamplesError(RaymemError, ValueError):
    """The data set cannot be used as it is."""


class PlanError(RaymemError, ValueError):
    """The subsets asked for do not exist."""


class RecipeError(RaymemError, ValueError):
    """The training recipe makes no sense."""


class PrivacyError(RaymemError, ValueError):
    """Trials cannot be made private so: no such budget, or the model mixes examples."""


class CurvatureError(RaymemError, ValueError):
    """Curvature cannot be measured so: of this model, with these inputs or settings."""


class StoreError(RaymemError):
    """The store cannot be read or written."""


class StudyMismatchError(StoreError):
    """The store belongs to another study, data set or recipe."""


class StoreHeldError(StoreError):
    """Another live driver holds the store."""

    exit_code = 3


class StoreFullError(StoreError):
    """No space or quota is left where the store is."""

    exit_code = 4


class DamagedObjectError(StoreError):
    """An object in the store does not read back."""


class ResultMismatchError(StoreError):
    """One trial, trained twice, gave two results."""


class ImportFileError(StoreError, ValueError):
    """A file of another fleet cannot become a store."""


class TrialError(RaymemError):
    """One trial failed; the others go on."""

    cause = "error"


class DivergedError(TrialError):
    """The loss or the logits of a trial stopped being finite."""

    cause = "diverged"


class OutOfMemoryError(TrialError):
    """A trial did not fit on its device."""

    cause = "out-of-memory"


class FleetError(RaymemError):
    """The fleet cannot go on."""
