"""raymem measures what a training algorithm memorizes.

    examples -> plan -> train (fleet) -> scores

Each stage is a module; this is the public door to all of them.
"""

# Before torch: with torch loaded first, pyarrow's threads abort some processes as they exit.
import pyarrow.parquet as _  # noqa: F401

from raymem.errors import (
    DamagedObjectError,
    DivergedError,
    ExamplesError,
    FleetError,
    ImportFileError,
    OutOfMemoryError,
    PlanError,
    RaymemError,
    RecipeError,
    ResultMismatchError,
    StoreError,
    StoreFullError,
    StoreHeldError,
    StudyMismatchError,
    TrialError,
)
from raymem.examples import Examples, load_examples
from raymem.fleet import Progress, run_fleet
from raymem.interop import import_npz
from raymem.job import JobOptions, run_job
from raymem.memorization import (
    Estimate,
    InfluencePairs,
    Memorization,
    PairRule,
    find_pairs,
    influence,
    memorization,
)
from raymem.plan import Plan, Seeds
from raymem.scoring import EpsilonSummary, score
from raymem.store import Problem, Store, Target, TrialKey, verify
from raymem.study import Study
from raymem.training import Images, Recipe, TrialResult, run_trial
from raymem.version import VERSION as __version__

__all__ = [
    "DamagedObjectError",
    "DivergedError",
    "EpsilonSummary",
    "Estimate",
    "Examples",
    "ExamplesError",
    "FleetError",
    "Images",
    "ImportFileError",
    "InfluencePairs",
    "JobOptions",
    "Memorization",
    "OutOfMemoryError",
    "PairRule",
    "Plan",
    "PlanError",
    "Problem",
    "Progress",
    "RaymemError",
    "Recipe",
    "RecipeError",
    "ResultMismatchError",
    "Seeds",
    "Store",
    "StoreError",
    "StoreFullError",
    "StoreHeldError",
    "Study",
    "StudyMismatchError",
    "Target",
    "TrialError",
    "TrialKey",
    "TrialResult",
    "__version__",
    "find_pairs",
    "import_npz",
    "influence",
    "load_examples",
    "memorization",
    "run_fleet",
    "run_job",
    "run_trial",
    "score",
    "verify",
]
