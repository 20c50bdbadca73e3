"""Objects derived from the trials of a study: scores, notes, streamed curvature."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import IO, Any, Literal

import pyarrow as pa

from raymem.encoding import json_bytes
from raymem.errors import DamagedObjectError, StoreError
from raymem.store import columns, trials
from raymem.store.files import Files
from raymem.store.study_record import SHOWN, StudyRecord
from raymem.store.trials import TrialKey

THUMBNAILS = "figures/thumbnails.parquet"
Note = Literal[
    "links", "repeat", "command", "until", "membership", "removal", "leave_one_out", "failures"
]  # fmt: skip


class Derived:
    """Scores, notes and streamed curvature of one store, and its study."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.files = Files(url)

    @property
    def url(self) -> str:
        """URL of the store."""
        return self.files.url

    def study(self) -> StudyRecord:
        """study.json. Raises StoreError if there is none or it is from a newer raymem."""
        try:
            data = self.files.read("study.json")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"there is no study in {self.url}; check the path, or run a job with --store "
                f"{self.url}"
            ) from error
        return StudyRecord.decode(data, self.url)

    def write_scores(self, name: str, table: pa.Table, metadata: Mapping[str, object]) -> None:
        """Replace scores/NAME.parquet whole."""
        self.files.replace(f"scores/{name}.parquet", trials.encode(table, dict(metadata)))

    def write_scores_in_parts(
        self,
        name: str,
        schema: pa.Schema,
        parts: Iterable[pa.Table],
        metadata: Mapping[str, object],
    ) -> None:
        """Replace scores/NAME.parquet from parts of it, of which one is in memory at a time."""

        def write(file: IO[bytes]) -> None:
            trials.encode_parts(file, schema, parts, dict(metadata))

        self.files.replace_with(f"scores/{name}.parquet", write)

    def scores(self, name: str = "examples") -> pa.Table:
        """scores/NAME.parquet. Raises StoreError if there are no scores yet."""
        advice = "run the study's job or its `score` stage, or import again"
        if name == "membership":
            advice = f"run `raymem membership {self.url}`"
        table = self._table(f"scores/{name}.parquet", advice)
        lost = [c for c in columns.NEEDED.get(name, ()) if c not in table.column_names]
        if lost:
            raise DamagedObjectError(
                f"scores/{name}.parquet in {self.url} lacks {', '.join(lost[:SHOWN])}; {advice}"
            )
        return table

    def scored(self, epsilon: float) -> list[TrialKey]:
        """The trials from which the scores at `epsilon` were computed, in order.

        Raises StoreError without scores.
        """
        rows = self.scores("trials").to_pylist()
        done = {r["trial"] for r in rows if r["epsilon"] == epsilon and r["status"] == "done"}
        return [TrialKey(epsilon, trial) for trial in sorted(done)]

    def write_note(self, name: Note, result: object) -> None:
        """Replace NAME.json by a result, as `raymem.encoding.to_json` has it."""
        self.files.replace(f"{name}.json", json_bytes(result))

    def note(self, name: Note) -> dict[str, Any] | None:
        """NAME.json; None if it was never written, or is damaged."""
        try:
            return dict(json.loads(self.files.read(f"{name}.json")))
        except (FileNotFoundError, ValueError):
            return None

    def thumbnails(self) -> dict[str, bytes]:
        """The small pictures that the store has, by example id; none if they are damaged."""
        try:
            table = trials.decode(self.files.read(THUMBNAILS), THUMBNAILS)
            names, images = (table[name].to_pylist() for name in ("example_id", "image"))
            return dict(zip(names, images, strict=True))
        except (FileNotFoundError, NotADirectoryError, DamagedObjectError, KeyError):
            return {}  # made again

    def streamed(self) -> dict[str, set[str]]:
        """The shards that were scored, by model: a listing, nothing is read."""
        found: dict[str, set[str]] = {}
        for key in self.files.list("curvature"):
            model, _, shard = key.removeprefix("curvature/").partition("/")
            shards = found.setdefault(model, set())
            if shard.endswith(".parquet"):
                shards.add(shard.removesuffix(".parquet"))
        return found

    def streamed_models(self) -> list[str]:
        """Names of the models in curvature/."""
        return sorted(self.streamed())

    def streamed_shards(self, model: str) -> set[str]:
        """The shards that were scored with a model: a listing, nothing is read."""
        prefix = f"curvature/{model}/"
        found = self.files.list(prefix.rstrip("/"))
        return {
            key.removeprefix(prefix).removesuffix(".parquet")
            for key in found
            if key.endswith(".parquet")
        }

    def write_streamed(
        self, model: str, shard: str, table: pa.Table, about: Mapping[str, object]
    ) -> bool:
        """Create curvature/MODEL/SHARD.parquet, once; False if it is there."""
        key = f"curvature/{model}/{shard}.parquet"
        return self.files.create(key, trials.encode(table, dict(about)))

    def curvature(self, model: str) -> pa.Table:
        """All shards scored with a model as one table. Raises StoreError if there are none."""
        shards = sorted(self.streamed_shards(model))
        if not shards:
            known = ", ".join(self.streamed_models()) or "none"
            raise StoreError(
                f"{self.url} has no curvature of {model!r}; there is {known}; score shards with "
                "jobs/curvature_imagenet.py"
            )
        keys = [f"curvature/{model}/{shard}.parquet" for shard in shards]
        return pa.concat_tables([trials.decode(self.files.read(key), key) for key in keys])

    def _table(self, key: str, advice: str) -> pa.Table:
        try:
            return trials.decode(self.files.read(key), key)
        except (FileNotFoundError, NotADirectoryError) as error:
            self.study()  # raises if there is no store at all
            raise StoreError(f"{self.url} has no {key} yet; {advice}") from error
