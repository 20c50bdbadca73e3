"""raymem measures what a training algorithm memorizes.

    examples -> plan -> train (fleet) -> scores -> links

Each stage is a module; this is the public door to all of them.
"""

# Before torch: with torch loaded first, pyarrow's threads abort some processes as they exit.
from typing import TYPE_CHECKING

import pyarrow.parquet as _  # noqa: F401

from raymem.lazy import lazy_attributes
from raymem.version import VERSION as __version__

if TYPE_CHECKING:
    from raymem.cli import (
        JobOptions,
        PrivateStudy,
        Smoke,
        run_curvature_job,
        run_job,
        run_leave_one_out_job,
        run_removal_job,
    )
    from raymem.curvature import Curvature, CurvatureRule, PaperRule, curvature, paper_score
    from raymem.curvature.streaming import (
        ScoringModel,
        StageSummary,
        measure_kept,
        stream_curvature,
    )
    from raymem.data import (
        Cache,
        CachedExamples,
        Examples,
        add_canaries,
        flip_labels,
        load_examples,
    )
    from raymem.data.shards import IngestSummary, Transform, ingest, list_shards
    from raymem.errors import (
        CurvatureError,
        DamagedObjectError,
        DivergedError,
        ExamplesError,
        FleetError,
        ImportFileError,
        OutOfMemoryError,
        PlanError,
        PrivacyError,
        RaymemError,
        RecipeError,
        ResultMismatchError,
        StoreError,
        StoreFullError,
        StoreHeldError,
        StudyMismatchError,
        TrialError,
    )
    from raymem.experiments import LeaveOneOut, Removal
    from raymem.fleet import Progress, run_fleet
    from raymem.interop import export, import_fleet, import_npz, import_scores
    from raymem.links import (
        Correlation,
        Links,
        Removed,
        correlations,
        find_links,
        find_removal,
    )
    from raymem.plan import Plan, Seeds
    from raymem.privacy import (
        Bound,
        Mechanism,
        Privacy,
        bounds_on_memorization,
        mechanism_for,
        one_run_epsilon,
    )
    from raymem.scores import (
        EpsilonSummary,
        Estimate,
        InfluencePairs,
        Membership,
        Memorization,
        PairRule,
        find_pairs,
        influence,
        membership,
        memorization,
        score,
    )
    from raymem.show.notebook import Opened
    from raymem.show.notebook import open_store as open
    from raymem.store import Problem, Store, Target, TrialKey, merge, verify
    from raymem.study import Study
    from raymem.training import Images, Recipe, TrialResult, run_trial
    from raymem.training.measure import Measured, measure

__all__ = [
    "Bound",
    "Cache",
    "CachedExamples",
    "Correlation",
    "Curvature",
    "CurvatureError",
    "CurvatureRule",
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
    "IngestSummary",
    "JobOptions",
    "LeaveOneOut",
    "Links",
    "Measured",
    "Mechanism",
    "Membership",
    "Memorization",
    "Opened",
    "OutOfMemoryError",
    "PairRule",
    "PaperRule",
    "Plan",
    "PlanError",
    "Privacy",
    "PrivacyError",
    "PrivateStudy",
    "Problem",
    "Progress",
    "RaymemError",
    "Recipe",
    "RecipeError",
    "Removal",
    "Removed",
    "ResultMismatchError",
    "ScoringModel",
    "Seeds",
    "Smoke",
    "StageSummary",
    "Store",
    "StoreError",
    "StoreFullError",
    "StoreHeldError",
    "Study",
    "StudyMismatchError",
    "Target",
    "Transform",
    "TrialError",
    "TrialKey",
    "TrialResult",
    "__version__",
    "add_canaries",
    "bounds_on_memorization",
    "correlations",
    "curvature",
    "export",
    "find_links",
    "find_pairs",
    "find_removal",
    "flip_labels",
    "import_fleet",
    "import_npz",
    "import_scores",
    "influence",
    "ingest",
    "list_shards",
    "load_examples",
    "measure",
    "measure_kept",
    "mechanism_for",
    "membership",
    "memorization",
    "merge",
    "one_run_epsilon",
    "open",
    "paper_score",
    "run_curvature_job",
    "run_fleet",
    "run_job",
    "run_leave_one_out_job",
    "run_removal_job",
    "run_trial",
    "score",
    "stream_curvature",
    "verify",
]

__getattr__ = lazy_attributes(__name__, __file__)
