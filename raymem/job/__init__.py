"""Job files' command lines: a study's settings, or those of scoring shards, as options.

run_job             a fleet: ingest, plan, train, measure curvature, score
run_curvature_job   curvature of shards under given models
"""

from raymem.job.options import JobOptions, Machine
from raymem.job.paths import absolute_store
from raymem.job.shards import run_curvature_job
from raymem.job.smoke import Smoke
from raymem.job.study import STAGES, PrivateStudy, run_job, score_and_print

__all__ = [
    "STAGES",
    "JobOptions",
    "Machine",
    "PrivateStudy",
    "Smoke",
    "absolute_store",
    "run_curvature_job",
    "run_job",
    "score_and_print",
]
