"""Job files' command lines: a study's settings, or those of scoring shards, as options.

run_job             a fleet: plan, train, score
run_curvature_job   curvature of shards under given models
"""

from raymem.job.shards import run_curvature_job
from raymem.job.study import STAGES, JobOptions, absolute_store, run_job, score_and_print

__all__ = [
    "STAGES",
    "JobOptions",
    "absolute_store",
    "run_curvature_job",
    "run_job",
    "score_and_print",
]
