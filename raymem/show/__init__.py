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
    from raymem.show.notebook import StudyResults, open_store
    from raymem.show.score_tables import examples_table, pairs_table
    from raymem.show.story import Story, story_text, tell
    from raymem.show.table import Table, format_table
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
        example_text,
        ingest_text,
        summary_text,
    )
    from raymem.show.terminal_status import describe_store, merge_text, watch_status


__all__ = [
    "Story",
    "StudyResults",
    "Table",
    "TableError",
    "correlations_text",
    "describe_store",
    "example_text",
    "examples_table",
    "extrapolated_text",
    "format_table",
    "ingest_text",
    "label_errors_text",
    "leave_one_out_text",
    "links_text",
    "membership_text",
    "merge_text",
    "open_store",
    "pairs_table",
    "removal_text",
    "story_text",
    "summary_text",
    "tell",
    "top",
    "watch_status",
    "where",
    "write_leave_one_out",
    "write_removal",
    "write_report",
]

__getattr__ = lazy_attributes(__name__, __file__)
