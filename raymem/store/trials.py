"""One trial as one Parquet object: its table, its provenance, its digest.

Shapes: N training and M test examples. Rows are N train, then M test, each by index.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymem.encoding import at_epsilon, epsilon_name
from raymem.errors import DamagedObjectError
from raymem.store import columns

if TYPE_CHECKING:
    from raymem.training import TrialResult

KEY = re.compile(
    r"(?:trials/eps-[^/]+/\d+\.parquet|failed/eps-[^/]+/\d+\.\d+\.json"
    r"|models/eps-[^/]+/\d+\.safetensors|checkpoints/eps-[^/]+/\d+/state)"
)
# pyarrow's own default.
ROWS_PER_GROUP = 1024 * 1024
METADATA, CHECKSUM = b"raymem", b"raymem_checksum"
# A trial's Parquet footer is a few thousand bytes.
FOOTER = 1 << 15


class TrialKey(NamedTuple):
    """Names a trial: its epsilon (inf: not private) and its number, which is its subset's.

    >>> TrialKey(float("inf"), 17).object_key, TrialKey(0.5, 17).object_key
    ('trials/eps-inf/000017.parquet', 'trials/eps-0.5/000017.parquet')
    >>> TrialKey.parse("trials/eps-0.5/000017.parquet")
    TrialKey(epsilon=0.5, trial=17)
    """

    epsilon: float
    trial: int

    @property
    def folder(self) -> str:
        """The folder of its epsilon."""
        return f"eps-{epsilon_name(self.epsilon)}"

    @property
    def name(self) -> str:
        """Its name in folders of trials of all epsilons: eps-inf-000017."""
        return f"{self.folder}-{self.trial:06d}"

    @property
    def object_key(self) -> str:
        """Key of its result, whose existence means that the trial is done."""
        return f"trials/{self.folder}/{self.trial:06d}.parquet"

    @property
    def weights_key(self) -> str:
        """Key of its weights, if the study keeps them."""
        return f"models/{self.folder}/{self.trial:06d}.safetensors"

    @property
    def checkpoint_key(self) -> str:
        """Key of its checkpoint, which is deleted when it is done."""
        return f"checkpoints/{self.folder}/{self.trial:06d}/state"

    def failed_key(self, attempt: int) -> str:
        """Key of the record of a failed attempt."""
        return f"failed/{self.folder}/{self.trial:06d}.{attempt}.json"

    @classmethod
    def parse(cls, key: str) -> TrialKey | None:
        """The trial whose result, failure, weights or checkpoint are at `key`; None if no such."""
        if not KEY.fullmatch(key):
            return None
        _, epsilon, name = key.split("/")[:3]
        try:
            found = cls(float(epsilon.removeprefix("eps-")), int(name.split(".")[0]))
        except ValueError:
            return None
        own = (found.object_key, found.weights_key, found.checkpoint_key)
        # eps-2.0/17.parquet is not written by raymem.
        failed = found.failed_key(int(name.split(".")[1])) if key.startswith("failed/") else ""
        return found if key in (*own, failed) else None

    def __str__(self) -> str:
        at = at_epsilon(self.epsilon)
        return f"trial {self.trial}{at}"


def trial_table(key: TrialKey, mask: NDArray[np.bool_], result: TrialResult) -> pa.Table:
    """The table of one trial: N + M rows, mask is bool [N].

    Columns are those of `columns.TRIAL`, and of `columns.TRIAL_CURVATURE` if it was measured.
    """
    N, M = len(mask), len(result.test.correct)
    subset = np.flatnonzero(mask)

    def over_all(values: NDArray[np.generic], missing: NDArray[np.bool_]) -> pa.Array:
        spread = np.zeros(N + M, values.dtype)
        spread[subset] = values
        absent = np.ones(N + M, bool)
        absent[subset] = missing
        return pa.array(spread, mask=absent)

    history = result.history
    none = np.zeros(len(subset), bool)
    is_test = np.arange(N + M) >= N
    arrays = {
        "trial": pa.array(np.full(N + M, key.trial, np.int32)),
        "epsilon": pa.array(np.full(N + M, key.epsilon)),
        "split": pa.array(["train"] * N + ["test"] * M),
        "index": pa.array(np.concatenate([np.arange(N), np.arange(M)])),
        "in_subset": pa.array(np.concatenate([mask, np.zeros(M, bool)]), mask=is_test),
        "correct": pa.array(np.concatenate([result.train.correct, result.test.correct])),
        "margin": pa.array(np.concatenate([result.train.margin, result.test.margin])),
        "cumulative_loss": over_all(history.cumulative_loss, none),
        "learning_epoch": over_all(history.learning_epoch, history.learning_epoch == 0),
        "forgetting_count": over_all(history.forgetting_count, none),
    }
    of = dict(columns.TRIAL)
    if result.curvature is not None:
        found = {k: v for k, v in result.curvature.values.items() if k in columns.TRIAL_CURVATURE}
        for name, values in found.items():
            spread = np.concatenate([values, np.zeros(M, np.float32)])
            arrays[name] = pa.array(spread, mask=is_test | ~np.isfinite(spread))
        of.update({k: c for k, c in columns.TRIAL_CURVATURE.items() if k in found})
    return pa.Table.from_pydict(arrays, schema=columns.schema(of))


def train_part(table: pa.Table, key: TrialKey) -> pa.Table:
    """The rows of training examples of a trial's table that has `in_subset`, which test rows lack.

    Raises DamagedObjectError if they are not the first.
    """
    n_test = table["in_subset"].null_count
    train = table.slice(0, table.num_rows - n_test)
    if train["in_subset"].null_count:
        raise DamagedObjectError(
            f"{key.object_key} has test rows among its training rows; run `raymem verify STORE "
            "--repair`, then the job"
        )
    return train


def digest(table: pa.Table) -> str:
    """SHA-256 over the names and values of all columns, nulls marked; metadata does not count."""
    sha = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        sha.update(f"{name}:{column.type}:".encode())
        sha.update(np.packbits(column.is_null().to_numpy(zero_copy_only=False)).tobytes())
        if pa.types.is_string(column.type):
            sha.update("\0".join(column.fill_null("").to_pylist()).encode())
        else:
            fill = False if pa.types.is_boolean(column.type) else 0
            sha.update(column.fill_null(fill).to_numpy(zero_copy_only=False).tobytes())
    return sha.hexdigest()


def may_differ(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    """May two runs of one trial give two results, by what is recorded of them?

    They may on different hardware, and on a GPU.
    """
    return bool(first["arithmetic"] != second["arithmetic"] or second["device"] != "cpu")


def encode(table: pa.Table, metadata: Mapping[str, object]) -> bytes:
    """Parquet bytes: zstd, statistics, page checksums, and `metadata` as JSON under `raymem`."""
    sink = pa.BufferOutputStream()
    schema = _with_metadata(table.schema, metadata)
    options = _options(table.column_names)
    pq.write_table(table.cast(schema), sink, row_group_size=ROWS_PER_GROUP, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def encode_parts(
    sink: IO[bytes], schema: pa.Schema, parts: Iterable[pa.Table], metadata: Mapping[str, object]
) -> None:
    """Write tables of one schema, one after the other, as one: the bytes `encode` has for it.

    Memory is that of a row group, of 1,048,576 rows, and of a part.
    """
    schema = _with_metadata(schema, metadata)
    with pq.ParquetWriter(sink, schema, **_options(schema.names)) as writer:
        for group in _row_groups(parts):
            writer.write_table(group.cast(schema))


def _with_metadata(schema: pa.Schema, metadata: Mapping[str, object]) -> pa.Schema:
    words = [(f.name, str(f.type), sorted((f.metadata or {}).items())) for f in schema]
    written = {"pyarrow": pa.__version__, "words": _checksum(repr(words).encode()).decode()}
    text = json.dumps({**metadata, **written}).encode()
    return schema.with_metadata({METADATA: text, CHECKSUM: _checksum(text)})


def _options(names: Sequence[str]) -> dict[str, object]:
    return {
        "compression": "zstd",
        "use_dictionary": [name for name in ("split", "device", "host") if name in names],
        "column_encoding": {"index": "DELTA_BINARY_PACKED"} if "index" in names else None,
        "write_statistics": True,
        "write_page_checksum": True,
    }


def _row_groups(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of all parts, cut where pyarrow cuts one table; without rows, an empty table."""
    held: list[pa.Table] = []
    for part in parts:
        held.append(part)
        while (rows := sum(table.num_rows for table in held)) > ROWS_PER_GROUP:
            last = held.pop()
            room = ROWS_PER_GROUP - (rows - last.num_rows)
            yield pa.concat_tables([*held, last.slice(0, room)]).combine_chunks()
            held = [last.slice(room)]
    yield pa.concat_tables(held).combine_chunks()


class CurvatureOverTraining(TypedDict):
    """How curvature over training was measured."""

    epochs: int
    seconds: float


class CurvatureProvenance(TypedDict, total=False):
    """How a trial's curvature was measured; of streamed curvature, seconds are unknown."""

    mode: str
    rule: Mapping[str, object] | None
    seconds: float | None
    precision: str
    precision_differences: Mapping[str, float]
    over_training: CurvatureOverTraining


class Provenance(TypedDict, total=False):
    """How a trial was made: the metadata of its object. The last five are optional."""

    study_hash: str
    attempt: int
    seeds: dict[str, int]
    seconds: float
    device: str
    arithmetic: str
    host: str
    finished: str
    raymem: str
    digest: str
    pyarrow: str
    weights: str
    """Digest of the weights that are kept."""
    resumed: bool
    """Was it resumed from a checkpoint?"""
    workers: int
    """Number of workers that trained it together, if not one."""
    curvature: CurvatureProvenance
    privacy: Mapping[str, object]
    """Its mechanism."""


def decode(data: bytes, key: str, names: list[str] | None = None) -> pa.Table:
    """The table in Parquet bytes, checksums verified. Raises DamagedObjectError."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        # Objects are read side by side; threads inside each would only race with torch's at exit.
        return file.read(columns=names, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedObjectError(
            f"{key} does not read back ({error}); run `raymem verify STORE --repair`, then the job"
        ) from error


def is_as_written(data: bytes, table: pa.Table) -> bool:
    """Are these, byte for byte, what this pyarrow writes for `table`? True if another wrote them.

    Finds damage where no page checksum looks: in headers, statistics and the footer.
    """
    metadata = metadata_of(table, "the table")
    return metadata["pyarrow"] != pa.__version__ or encode(table, metadata) == data


def metadata_at_end(read_end: Callable[[int], bytes], key: str) -> Any:
    """What `encode` put beside the columns; of the object, only the end is read.

    `read_end` gives the last so many bytes. Raises DamagedObjectError.
    """
    try:
        end = read_end(FOOTER)
        length = int.from_bytes(end[-8:-4], "little") + 8
        if len(end) == FOOTER < length:
            end = read_end(length)
        schema = pq.read_schema(pa.BufferReader(end))
    except (pa.ArrowException, OSError) as error:
        raise DamagedObjectError(
            f"{key} does not read back ({error}); run `raymem verify STORE --repair`"
        ) from error
    return metadata_of(schema, key)


def metadata_of(table_or_schema: pa.Table | pa.Schema, key: str) -> Any:
    """What `encode` put beside the columns. Raises DamagedObjectError if there is nothing."""
    schema = table_or_schema.schema if isinstance(table_or_schema, pa.Table) else table_or_schema
    try:
        text = schema.metadata[METADATA]
        if schema.metadata[CHECKSUM] != _checksum(text):
            raise ValueError("its checksum does not fit")
        return json.loads(text)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedObjectError(
            f"{key} has no sound raymem metadata ({error}); run `raymem verify STORE --repair`"
        ) from error


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()
