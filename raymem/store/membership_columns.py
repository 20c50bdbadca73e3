"""Columns of scores/membership.parquet: how far apart an example's margins are, in and out."""

from __future__ import annotations

import pyarrow as pa

from raymem.store.column import Column, Columns

_MARGIN = "log p_y - log of the sum of the other classes' p"

MEMBERSHIP_VALUES: Columns = {
    "n_in": Column(pa.int32(), "trials that trained on the example"),
    "n_out": Column(pa.int32(), "trials that did not"),
    "margin_in": Column(
        pa.float64(), f"mean margin ({_MARGIN}) over in-trials; null: none", "nats"
    ),
    "margin_out": Column(pa.float64(), "the same over out-trials", "nats"),
    "margin_in_stdev": Column(
        pa.float64(), "standard deviation over in-trials; null: fewer than two", "nats"
    ),
    "margin_out_stdev": Column(pa.float64(), "the same over out-trials", "nats"),
    "vulnerability": Column(
        pa.float64(),
        "d' = (margin_in - margin_out) / their pooled standard deviation: positive when models "
        "that saw the example are surer of its label, and an attacker can tell; null: an arm is "
        "empty, or margins do not vary",
        "standard deviations",
    ),
    "vulnerability_stderr": Column(
        pa.float64(), "its standard error, if margins are normal", "standard deviations"
    ),
}
