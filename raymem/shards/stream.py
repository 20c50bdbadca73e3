"""Shards and a model -> curvature/MODEL/SHARD.parquet, one object per shard, each once.

Ray Data reads and decodes shards in tasks on CPU workers, and scores in actors that hold the model;
it holds decoding back when scoring is behind. What comes out are numbers, which the driver gathers
until a shard is whole. What is in the store is not scored again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raymem.curvature import CurvatureRule, pick_mode
from raymem.errors import ExamplesError, StudyMismatchError
from raymem.examples.pixels import content_hash
from raymem.fleet import Engine, ProgressLine, Stopped, duration, stop_signals
from raymem.shards.models import ScoringModel
from raymem.shards.readers import Record, Shard, read_shard
from raymem.shards.transform import Transform
from raymem.store import Store, columns
from raymem.training import Meter, as_input, batch_of, default_device
from raymem.version import VERSION

# Rows that a reading task hands on at once.
CHUNK = 64
LAST = -1
OBJECT_STORE_BYTES = 500_000_000
Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class BadImage:
    """An image that was not scored."""

    shard: str
    example_id: str
    error: str


@dataclass(kw_only=True)
class StreamSummary:
    """What one run did with one model."""

    model: str
    shards: int
    """Shards of the set."""
    done_before: int
    """That were in the store already."""
    scored: int = 0
    """Images scored by this run."""
    bad: list[BadImage] = dataclasses.field(default_factory=list)
    """Images that could not be."""
    seconds: float = 0.0
    """From the first result on."""
    mode: str = ""
    """How the trace was computed."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What reading and scoring need to know, sent to every worker."""

    shards: Sequence[Shard]
    transform: Transform
    n_classes: int
    rule: CurvatureRule
    seed: int
    batch_size: int
    threads: int
    channels_last: bool


def stream_curvature(
    shards: Sequence[Shard],
    model: ScoringModel,
    store: Store,
    rule: CurvatureRule | None = None,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    engine: Engine = "ray",
    scorers: int | None = None,
    batch_size: int | None = None,
    threads: int = 1,
    verbose: bool = False,
) -> StreamSummary:
    """Score what `store` does not have yet of `shards`, under `model`.

    `scorers` actors hold the model, one GPU each where the cluster has GPUs, else `threads` CPUs
    each; by default as many as there are GPUs, or all but one of the CPUs of a cluster.

    Raises ExamplesError at the first image that cannot be read, unless `skip_bad`: then it has a
    row without scores. Raises StudyMismatchError if curvature/MODEL was made by another model,
    transform or rule, and Stopped after Ctrl-C.
    """
    rule = rule or CurvatureRule()
    done = store.streamed_shards(model.name)
    missing = [shard for shard in shards if shard.name not in done]
    summary = StreamSummary(
        model=model.name, shards=len(shards), done_before=len(shards) - len(missing)
    )
    about = _identity(store, model, rule, seed, shards)
    summary.mode = about["mode"]
    if not missing:
        return summary
    task = _Task(
        shards=missing,
        transform=model.transform,
        n_classes=model.n_classes,
        rule=dataclasses.replace(rule, mode=about["mode"]),
        seed=seed,
        batch_size=batch_size or batch_of(_values(model.transform)),
        threads=threads,
        channels_last=model.channels_last,
    )
    run: Callable[..., Iterator[Batch]] = _on_ray if engine == "ray" else _in_process
    gathered = _Gathered(store, model, task, about, summary, skip_bad)
    line = ProgressLine()
    with stop_signals() as stops:
        try:
            for batch in run(task, model, scorers, verbose):
                gathered.add(batch)
                line.show_text(gathered.progress(), last=gathered.left == 0)
                if stops.count:
                    raise Stopped(
                        f"stopped after {summary.shards - gathered.left:,} of {summary.shards:,} "
                        "shards; run the same command again to go on"
                    )
        finally:
            line.close()
    return summary


def _values(transform: Transform) -> int:
    return transform.size[0] * transform.size[1] * (1 if transform.grey else 3)


def _identity(
    store: Store, model: ScoringModel, rule: CurvatureRule, seed: int, shards: Sequence[Shard]
) -> dict[str, Any]:
    """curvature/MODEL/about.json, made or checked: what makes its shards comparable."""
    key = f"curvature/{model.name}/about.json"
    here = json.loads(json.dumps({**model.as_dict(), "rule": rule.as_dict(), "seed": seed}))
    if not store.files.exists(key):
        mode = rule.mode if rule.mode != "auto" else _pick_mode(model, shards, seed)
        text = json.dumps({**here, "mode": mode, "raymem": VERSION}, indent=1)
        store.files.create(key, text.encode() + b"\n")
    there: dict[str, Any] = json.loads(store.files.read(key))
    differences = [
        f"{name}: there {there.get(name)}, here {here[name]}"
        for name in here
        if there.get(name) != here[name]
    ]
    if differences:
        raise StudyMismatchError(
            f"curvature/{model.name} in {store.url} was made otherwise ({'; '.join(differences)}); "
            "choose another --name or --store, or go back to those settings"
        )
    return there


def _pick_mode(model: ScoringModel, shards: Sequence[Shard], seed: int) -> str:
    """From the first few images that can be read."""
    found: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for record in (record for shard in shards for record in read_shard(shard)):
        pixels, _ = _decode(record, model.transform, model.n_classes)
        if pixels is not None:
            found.append(pixels)
            labels.append(record.label or 0)
        if len(found) == 8:
            break
    if not found:
        raise ExamplesError(
            "no image of the set can be scored: none can be read and has a label of the model; "
            "check --data and --model"
        )
    x = as_input(torch.from_numpy(np.stack(found)), torch.contiguous_format)
    return pick_mode(model.net.cpu(), x, torch.tensor(labels), seed=seed)


def _decode(
    record: Record, transform: Transform, n_classes: int
) -> tuple[NDArray[np.uint8] | None, str]:
    """Pixels, or why there are none: never a stand-in."""
    if record.error:
        return None, record.error
    if record.label is None:
        return None, "it has no label"
    if not 0 <= record.label < n_classes:
        return None, f"label {record.label} is none of the model's {n_classes} classes"
    try:
        return transform(record.data), ""
    except Exception as error:  # Pillow raises many kinds; what matters is which image it is
        return None, f"{type(error).__name__}: {error}"


def _read(task: _Task, number: int) -> Iterator[Batch]:
    """A shard in chunks of rows, and a last row that says how many there were."""
    rows: list[dict[str, Any]] = []
    H, W = task.transform.size
    blank = np.zeros((H, W, 1 if task.transform.grey else 3), np.uint8)

    def row(position: int, **values: Any) -> dict[str, Any]:
        empty = {"example_id": "", "label": -1, "content_hash": "", "error": "", "pixels": blank}
        return {"shard": number, "position": position, **empty, **values}

    position = 0
    for record in _records(task.shards[number]):
        pixels, error = _decode(record, task.transform, task.n_classes)
        values: dict[str, Any] = {"example_id": record.example_id, "error": error}
        if record.label is not None:
            values["label"] = record.label
        if pixels is not None:
            values |= {"pixels": pixels, "content_hash": content_hash(pixels)}
        rows.append(row(position, **values))
        position += 1
        if len(rows) == CHUNK:
            yield _columns(rows)
            rows = []
    rows.append(row(LAST, label=position))
    yield _columns(rows)


def _records(shard: Shard) -> Iterator[Record]:
    try:
        yield from read_shard(shard)
    except Exception as error:  # file systems raise many kinds; the shard's name must be told
        yield Record(example_id=f"{shard.name} (the rest)", label=None, data=b"", error=str(error))


def _columns(rows: Sequence[Mapping[str, Any]]) -> Batch:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


class _Scorer:
    """Holds a model on its device; scores batches of decoded images."""

    def __init__(self, task: _Task, model: ScoringModel) -> None:
        torch.set_num_threads(task.threads)
        torch.set_flush_denormal(True)
        self.task, self.device = task, default_device()
        self.net = model.net.to(self.device).eval()
        self.meter: Meter | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The batch without pixels, with a value for each row that could be decoded."""
        good = np.flatnonzero((batch["error"] == "") & (batch["position"] != LAST))
        n, found = len(batch["position"]), {}
        if len(good):
            x = torch.from_numpy(np.ascontiguousarray(batch["pixels"][good])).to(self.device)
            y = torch.from_numpy(batch["label"][good].astype(np.int64)).to(self.device)
            found = self._score(x, y)
        values = {}
        for name in columns.STREAMED_VALUES:
            if name == "curvature_paper" and self.task.rule.paper is None:
                continue
            values[name] = np.full(n, np.nan, np.float32)
            if name in found:
                values[name][good] = found[name]
        kept = ("shard", "position", "example_id", "label", "content_hash", "error")
        return {**{name: batch[name] for name in kept}, **values}

    def _score(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        task = self.task
        if self.meter is None:
            self.meter = Meter(
                self.net, x, y, task.rule, seed=task.seed, channels_last=task.channels_last
            )
        size = task.batch_size
        parts = [self.meter(x[at : at + size], y[at : at + size]) for at in range(0, len(x), size)]
        return {
            name: torch.cat([part[name] for part in parts]).to(torch.float32).cpu().numpy()
            for name in parts[0]
        }


class _Gathered:
    """Rows of shards under way; writes a shard when it is whole."""

    def __init__(
        self,
        store: Store,
        model: ScoringModel,
        task: _Task,
        about: Mapping[str, Any],
        summary: StreamSummary,
        skip_bad: bool,
    ) -> None:
        self.store, self.model, self.task, self.about = store, model, task, about
        self.summary, self.skip_bad = summary, skip_bad
        self.left = len(task.shards)
        self._rows: dict[int, dict[int, dict[str, Any]]] = {}
        self._total: dict[int, int] = {}
        self._start = time.monotonic()

    def add(self, batch: Batch) -> None:
        """Take rows of any shards, in any order, and write the shards that they complete."""
        names = list(batch)
        touched = set()
        for values in zip(*(batch[name].tolist() for name in names), strict=True):
            row = dict(zip(names, values, strict=True))
            number = row.pop("shard")
            touched.add(number)
            if row["position"] == LAST:
                self._total[number] = row["label"]
                continue
            if row["error"]:
                self._bad(self.task.shards[number], row)
            else:
                self.summary.scored += 1
            self._rows.setdefault(number, {})[row["position"]] = row
        for number in touched:
            if len(self._rows.get(number, ())) == self._total.get(number, -1):
                self._write(number)
        self.summary.seconds = time.monotonic() - self._start

    def _bad(self, shard: Shard, row: Mapping[str, Any]) -> None:
        if not self.skip_bad:
            raise ExamplesError(
                f"{row['example_id']} in shard {shard.name} cannot be scored ({row['error']}); "
                "repair it, or run again with --on-bad skip, which gives it a row without scores"
            )
        self.summary.bad.append(
            BadImage(shard=shard.name, example_id=row["example_id"], error=row["error"])
        )

    def _write(self, number: int) -> None:
        shard, rows = self.task.shards[number], self._rows.pop(number, {})
        ordered = [rows[position] for position in range(len(rows))]
        of = {
            name: column
            for name, column in columns.STREAMED.items()
            if name != "curvature_paper" or self.task.rule.paper is not None
        }
        cells: dict[str, list[Any]] = {name: [] for name in of}
        for row in ordered:
            ok = not row["error"]
            known = {
                **row,
                "label": row["label"] if row["label"] >= 0 else None,
                "ok": ok,
                "error": row["error"] or None,
                "content_hash": row["content_hash"] or None,
                "mode": self.about["mode"] if ok else None,
            }
            for name in of:
                cells[name].append(known[name])
        schema = columns.schema(of)
        arrays = [pa.array(cells[field.name], field.type, from_pandas=True) for field in schema]
        about = {**self.about, "shard": shard.url}
        self.store.write_streamed(
            self.model.name, shard.name, pa.Table.from_arrays(arrays, schema=schema), about
        )
        self.left -= 1

    def progress(self) -> str:
        """One line: shards, images, rate, time left."""
        s, done = self.summary, len(self.task.shards) - self.left
        parts = [f"shards {s.done_before + done:,}/{s.shards:,}", f"{s.scored:,} images"]
        if s.bad:
            parts.append(f"{len(s.bad):,} BAD")
        if s.seconds > 0 and s.scored:
            parts.append(f"{s.scored / s.seconds:,.1f} images/s")
        if done and self.left:
            parts.append(f"{duration(s.seconds / done * self.left)} left")
        return ", ".join(parts)


def _in_process(
    task: _Task, model: ScoringModel, scorers: int | None, verbose: bool
) -> Iterator[Batch]:
    scorer = _Scorer(task, model)
    for number in range(len(task.shards)):
        for batch in _read(task, number):
            yield scorer(batch)


def _on_ray(
    task: _Task, model: ScoringModel, scorers: int | None, verbose: bool
) -> Iterator[Batch]:
    # Ray takes seconds to import, and nothing but this needs it.
    from raymem.fleet.cluster import connected

    if not verbose:
        # Else each of Ray Data's actors starts with an error line about its arguments.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    cores = os.cpu_count() or 1
    # A local Ray gets two slots for reading beside one for each core: an actor that had a core's
    # slot for itself would leave none to read with on small machines, and nothing would move.
    with connected(data_bytes=OBJECT_STORE_BYTES, num_cpus=cores + 2, verbose=verbose):
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = verbose
        if not verbose:
            # Ray Data sets its own levels when it is imported.
            logging.getLogger("ray.data").setLevel(logging.ERROR)
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources["CPU"])
        n = scorers or gpus or max(1, (cpus - 2) // task.threads)
        held: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": task.threads}
        rows = ray.data.from_items(
            [{"number": number} for number in range(len(task.shards))],
            override_num_blocks=len(task.shards),
        )
        # In a list a reference stays one; alone, Ray Data would put its value in its place.
        shared, net = [ray.put(task)], [ray.put(model)]
        decoded = rows.map_batches(
            _read_on_ray, batch_size=1, num_cpus=1, fn_kwargs={"task": shared}
        )
        scored = decoded.map_batches(
            _RayScorer,
            batch_size=task.batch_size,
            compute=ray.data.ActorPoolStrategy(size=n),
            # Other than the reader's, so that Ray Data does not put decoding into these actors.
            scheduling_strategy="SPREAD",
            fn_constructor_args=(shared, net),
            **held,
        )
        yield from scored.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)


def _read_on_ray(batch: Batch, task: Any) -> Iterator[Batch]:
    import ray

    yield from _read(ray.get(task[0]), int(batch["number"][0]))


class _RayScorer:
    """A scorer as an actor of Ray Data."""

    def __init__(self, task: Any, model: Any) -> None:
        import ray

        self.scorer = _Scorer(ray.get(task[0]), ray.get(model[0]))

    def __call__(self, batch: Batch) -> Batch:
        return self.scorer(batch)
