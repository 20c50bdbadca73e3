"""One study's store: layout, schemas, commits, and who may write. Works on any fsspec URL.

    study.json                          the study as data, its hash; never replaced
    target.json                         how many trials at which epsilons are wanted; replaceable
    driver.json                         who drives it now
    examples.parquet                    the set's index
    privacy/eps-2.json                  the mechanism of an epsilon, fixed by the first run
    trials/eps-inf/000017.parquet       one trained model; that it exists means "done"
    models/eps-inf/000017.safetensors   its weights, for the trials whose weights are kept
    curvature/MODEL/SHARD.parquet       curvature under one model, streamed over shards
    failed/eps-inf/000017.1.json        an attempt that failed: cause
    failures.json                       failed attempts by cause, each with its first traceback
    scores/*.parquet, links.json, ...   derived, replaced whole
    damaged/...                         what `verify --repair` moved away

Trial objects are created if absent, derived objects are replaced whole, nothing is appended to.
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.store.failure_log import FailureCause, FailureLog, failure_causes
    from raymem.store.files import Files, read_ahead
    from raymem.store.lock import DriverLock, is_alive, read_driver
    from raymem.store.merge_stores import MergeSummary, merge
    from raymem.store.store import Store
    from raymem.store.study_record import StudyRecord, study_hash
    from raymem.store.target import Failure, Part, Target, parse_part
    from raymem.store.trials import TrialKey, trial_table
    from raymem.store.verify_store import Problem, verify


__all__ = [
    "DriverLock",
    "Failure",
    "FailureCause",
    "FailureLog",
    "Files",
    "MergeSummary",
    "Part",
    "Problem",
    "Store",
    "StudyRecord",
    "Target",
    "TrialKey",
    "failure_causes",
    "is_alive",
    "merge",
    "parse_part",
    "read_ahead",
    "read_driver",
    "study_hash",
    "trial_table",
    "verify",
]

__getattr__ = lazy_attributes(__name__, __file__)
