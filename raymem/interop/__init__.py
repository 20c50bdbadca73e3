"""Stores and other people's formats: fleets and scores in, everything out.

import_fleet    a fleet trained elsewhere -> a store that is scored like any other
import_scores   published scores and pairs -> a store that reads and joins like any other
export          a store -> files that other people's code reads

No pickled object of a file is ever run; orders are never assumed.
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.interop.exports import EXPORTS, export
    from raymem.interop.imports import import_fleet, import_npz
    from raymem.interop.layouts import FORMATS
    from raymem.interop.published import import_scores

__all__ = ["EXPORTS", "FORMATS", "export", "import_fleet", "import_npz", "import_scores"]

__getattr__ = lazy_attributes(__name__, __file__)
