"""raymem measures what a training algorithm memorizes.

    examples -> plan -> train (fleet) -> scores -> links

What a study or a notebook needs is here; each stage is a package with all there is to it:
`raymem.data`, `raymem.plan`, `raymem.training`, `raymem.fleet`, `raymem.curvature`,
`raymem.privacy`, `raymem.store`, `raymem.scores`, `raymem.links`, `raymem.interop`, `raymem.show`,
and `raymem.errors`, every exception.
"""

# Before torch: with torch loaded first, pyarrow's threads abort some processes as they exit.
from typing import TYPE_CHECKING

import pyarrow.parquet as _  # noqa: F401

from raymem.lazy import lazy_attributes
from raymem.version import VERSION as __version__

if TYPE_CHECKING:
    from raymem.cli import JobSettings, PrivateStudy, run_job
    from raymem.curvature import CurvatureRule, input_curvature, paper_score
    from raymem.curvature.streaming import stream_curvature
    from raymem.data import Examples, add_canaries, flip_labels, load_examples
    from raymem.data.shards import ingest
    from raymem.errors import RaymemError
    from raymem.interop import export, import_fleet, import_npz, import_scores
    from raymem.links import find_links, find_removal
    from raymem.plan import Plan
    from raymem.privacy import Privacy
    from raymem.scores import influence, membership, memorization, score
    from raymem.show.notebook import open_store as open
    from raymem.store import Store, merge, verify
    from raymem.study import Study
    from raymem.training import Recipe

__all__ = [
    "CurvatureRule",
    "Examples",
    "JobSettings",
    "Plan",
    "Privacy",
    "PrivateStudy",
    "RaymemError",
    "Recipe",
    "Store",
    "Study",
    "__version__",
    "add_canaries",
    "export",
    "find_links",
    "find_removal",
    "flip_labels",
    "import_fleet",
    "import_npz",
    "import_scores",
    "influence",
    "ingest",
    "input_curvature",
    "load_examples",
    "membership",
    "memorization",
    "merge",
    "open",
    "paper_score",
    "run_job",
    "score",
    "stream_curvature",
    "verify",
]

__getattr__ = lazy_attributes(__name__, __file__)
