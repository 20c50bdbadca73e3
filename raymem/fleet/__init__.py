"""A fleet: all trials of a study, in any order, on any number of machines, each committed once.

In:  examples, plan, recipe, and a store whose target says what is wanted.
Out: trial objects in the store. `run_fleet` is all there is to call; rerunning it resumes.
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.fleet.fleet import run_fleet
    from raymem.fleet.forecast import estimated_trial, group_size, timed_group, timed_trial
    from raymem.fleet.long_stage import LongStage, StageProgress, Stopped
    from raymem.fleet.progress import Progress
    from raymem.fleet.progress_line import ProgressLine, Snapshot, seconds_left
    from raymem.fleet.repeat import Repeat, repeat_trial
    from raymem.fleet.resources import Engine, Resources
    from raymem.fleet.trial_queue import TrialQueue
    from raymem.fleet.worker import TrialOptions


__all__ = [
    "Engine",
    "LongStage",
    "Progress",
    "ProgressLine",
    "Repeat",
    "Resources",
    "Snapshot",
    "StageProgress",
    "Stopped",
    "TrialOptions",
    "TrialQueue",
    "estimated_trial",
    "group_size",
    "repeat_trial",
    "run_fleet",
    "seconds_left",
    "timed_group",
    "timed_trial",
]

__getattr__ = lazy_attributes(__name__, __file__)
