"""Command lines: `raymem`, which reads, joins and exchanges stores, and those of job files.

main                the command `raymem`
run_job             a fleet: ingest, plan, train, measure curvature, score
run_removal_job     the removal experiment: accuracy without the most memorized examples
run_leave_one_out_job   how far scores are from leaving one out
run_curvature_job   curvature of shards under given models
"""

from typing import TYPE_CHECKING

from raymem.cli import exchange, explore, read
from raymem.cli.base import absolute_store, command_errors, main
from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.cli.job_curvature import ScoringSettings, run_curvature_job
    from raymem.cli.job_experiments import (
        LeaveOneOutSettings,
        RemovalSettings,
        run_leave_one_out_job,
        run_removal_job,
    )
    from raymem.cli.job_settings import (
        CacheSettings,
        JobSettings,
        PoolSettings,
        PrivateStudy,
        RunOptions,
    )
    from raymem.cli.job_study import STAGES, run_job, score_and_print
    from raymem.cli.smoke import Smoke

__all__ = [
    "STAGES",
    "CacheSettings",
    "JobSettings",
    "LeaveOneOutSettings",
    "PoolSettings",
    "PrivateStudy",
    "RemovalSettings",
    "RunOptions",
    "ScoringSettings",
    "Smoke",
    "absolute_store",
    "command_errors",
    "exchange",
    "explore",
    "main",
    "read",
    "run_curvature_job",
    "run_job",
    "run_leave_one_out_job",
    "run_removal_job",
    "score_and_print",
]

__getattr__ = lazy_attributes(__name__, __file__)
