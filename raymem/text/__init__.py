"""Tables and sentences for a terminal."""

from raymem.text.links import correlations_text, label_errors_text, links_text
from raymem.text.membership import membership_text
from raymem.text.scores import (
    as_text,
    example_text,
    for_people,
    ingest_text,
    pairs_for_people,
    summary_text,
)
from raymem.text.status import describe_store, merge_text

__all__ = [
    "as_text",
    "correlations_text",
    "describe_store",
    "example_text",
    "for_people",
    "ingest_text",
    "label_errors_text",
    "links_text",
    "membership_text",
    "merge_text",
    "pairs_for_people",
    "summary_text",
]
