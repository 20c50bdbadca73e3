"""Results as people read them: tables and sentences for a terminal, the page, notebooks.

*_text         what the commands and jobs print
write_report   a scored store -> report.html, figures/*, links.json
open_store     a store in a notebook
planned        what a study would take and tell, before it is paid for (`show.dry_run`)
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.show.build_report import write_report
    from raymem.show.notebook import Opened, open_store
    from raymem.show.tables import TableError, top, where
    from raymem.show.terminal_leave_one_out import (
        extrapolated_text,
        leave_one_out_text,
        write_leave_one_out,
    )
    from raymem.show.terminal_links import correlations_text, label_errors_text, links_text
    from raymem.show.terminal_membership import membership_text
    from raymem.show.terminal_removal import removal_text, write_removal
    from raymem.show.terminal_scores import (
        as_text,
        example_text,
        for_people,
        ingest_text,
        pairs_for_people,
        summary_text,
    )
    from raymem.show.terminal_status import describe_store, merge_text


__all__ = [
    "Opened",
    "TableError",
    "as_text",
    "correlations_text",
    "describe_store",
    "example_text",
    "extrapolated_text",
    "for_people",
    "ingest_text",
    "label_errors_text",
    "leave_one_out_text",
    "links_text",
    "membership_text",
    "merge_text",
    "open_store",
    "pairs_for_people",
    "removal_text",
    "summary_text",
    "top",
    "where",
    "write_leave_one_out",
    "write_removal",
    "write_report",
]

__getattr__ = lazy_attributes(__name__, __file__)
