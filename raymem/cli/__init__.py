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
    from raymem.cli.job_curvature import run_curvature_job
    from raymem.cli.job_leave_one_out import run_leave_one_out_job
    from raymem.cli.job_options import JobOptions, Machine
    from raymem.cli.job_removal import run_removal_job
    from raymem.cli.job_study import STAGES, PrivateStudy, run_job, score_and_print
    from raymem.cli.smoke import Smoke

__all__ = [
    "STAGES",
    "JobOptions",
    "Machine",
    "PrivateStudy",
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
