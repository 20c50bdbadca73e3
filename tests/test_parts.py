"""Tables too large for memory: written in parts, to the same bytes as whole."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.store import Files, trials
from raymem.store.trials import encode, encode_parts


@pytest.fixture(params=["local", "memory"])
def files(request, tmp_path):
    return Files(tmp_path / "store" if request.param == "local" else f"memory://{tmp_path.name}")


def rows(start, stop):
    """Rows start..stop-1 of a table with strings, nulls, delta-packed and plain columns."""
    n = np.arange(start, stop)
    values = {
        "split": pa.array(np.where(n % 7 < 5, "train", "test").tolist(), pa.string()),
        "index": pa.array(n),
        "p_true_in": pa.array(np.sin(n), mask=n % 11 == 0),
        "n_in": pa.array((n % 13).astype(np.int32)),
    }
    return pa.table(values)


def in_parts(cuts):
    sink = pa.BufferOutputStream()
    parts = [rows(a, b) for a, b in itertools.pairwise(cuts)]
    encode_parts(sink, rows(0, 0).schema, [rows(0, 0), *parts], {"about": [1, 2]})
    return sink.getvalue().to_pybytes()


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=6), group=st.sampled_from([1, 64, 100, 1000]))
def test_parts_are_the_bytes_of_the_whole(cuts, group):
    cuts = [0, *sorted(cuts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "ROWS_PER_GROUP", group)
        assert in_parts(cuts) == encode(rows(0, cuts[-1]), {"about": [1, 2]})


def test_row_groups_are_pyarrows_own():
    """At real size, against pyarrow left to itself."""
    table = rows(0, 1_100_000)
    written = in_parts([0, 400_000, 800_000, 1_100_000])
    sink = pa.BufferOutputStream()
    metadata = pq.read_schema(pa.BufferReader(written)).metadata
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        use_dictionary=["split"],
        column_encoding={"index": "DELTA_BINARY_PACKED"},
        write_page_checksum=True,
    )
    assert sink.getvalue().to_pybytes() == written


def test_what_is_written_to_a_file_replaces_the_object_whole(files):
    files.replace("scores/a.parquet", b"before")
    files.replace_with("scores/a.parquet", lambda file: file.write(b"after"))
    assert files.read("scores/a.parquet") == b"after"

    def fails(file):
        file.write(b"half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        files.replace_with("scores/a.parquet", fails)
    assert files.read("scores/a.parquet") == b"after"
    assert files.list() == ["scores/a.parquet"]
    assert list(files.temporaries()) == []
