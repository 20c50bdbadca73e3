"""Work -> scored blocks: Ray Data's tasks read and decode, its actors hold models and score.

    shards -> readers: blocks of encoded images -> decoders: pixels -> scorers: numbers -> driver

Each arrow hands on one block at a time, and Ray Data holds back those before a stage that is
behind: memory does not grow with the size of a shard, and a single large one keeps all decoders
and scorers busy. A block is decoded once for all models of a pass.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from raymem.curvature.streaming.blocks import Reading, decode_block, read_blocks
from raymem.curvature.streaming.scorer import Scored, Scorers, Work
from raymem.curvature.streaming.scorer_options import ScorerOptions
from raymem.data.shards.ray_data import actors, batches_of, ray_data, with_readers
from raymem.store import Store

# Ray Data plans each block by itself; more would only cost its driver.
MOST_BLOCKS = 5_000
# Share of a scorer's memory that models may fill; a folded model is held beside the first one.
SHARE_OF_MEMORY, COPIES = 0.25, 2
# With so many models decoding is next to nothing; more would only make a pass lose more when it is
# killed.
MOST_MODELS = 32
# Readers wait for disks and networks: several share a CPU.
READER_CPUS = 0.5


def score(
    work: Work, store: Store, options: ScorerOptions, *, weight_bytes: int
) -> Generator[Scored]:
    """All blocks of some work under all their models, in any order.

    `weight_bytes` is what the weights of one of the models take.
    """
    threads, asked = options.threads, options.models_per_pass
    if options.engine == "serial":
        fit = asked or models_that_fit(weight_bytes, scorer_memory(1.0, threads))
        for part in work.passes(fit):
            yield from _in_process(part, store)
        return
    with ray_data(num_cpus=with_readers(), block_bytes=1, verbose=options.verbose) as ray:
        n, held = actors(ray.cluster_resources(), threads, options.scorers, options.gpus_per_scorer)
        if asked is None:
            memory = ray.remote(**held)(scorer_memory).remote(held.get("num_gpus", 0.0), threads)
            asked = models_that_fit(weight_bytes, ray.get(memory))
        for part in work.passes(asked):
            yield from _on_ray(ray, part, n, held)


def models_that_fit(weight_bytes: int, memory: float) -> int:
    """How many models of that size one scorer holds in its share of so many bytes.

    >>> [models_that_fit(100_000_000, memory) for memory in (80e9, 4e9, 0.5e9)]
    [32, 5, 1]
    """
    return int(np.clip(SHARE_OF_MEMORY * memory / (COPIES * weight_bytes), 1, MOST_MODELS))


def scorer_memory(gpus: float, threads: int) -> float:
    """Bytes of free memory that are for one scorer, on the machine that this runs on.

    Of a GPU that several scorers share, and of the machine's where they take CPUs, its part.
    """
    if gpus and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return float(min(free, gpus * total))
    share = min(1.0, threads / (os.cpu_count() or 1))
    return share * float(psutil.virtual_memory().available)


def _in_process(work: Work, store: Store) -> Generator[Scored]:
    scorers = Scorers(work, store)
    for number in work.wanted:
        for block in read_blocks(work.reading, number):
            yield scorers(decode_block(work.reading, block))


def _on_ray(ray: Any, work: Work, n: int, held: dict[str, float]) -> Generator[Scored]:
    numbers = list(work.wanted)
    shards = ray.data.from_items(
        [{"number": number} for number in numbers],
        override_num_blocks=min(len(numbers), MOST_BLOCKS),
    )
    # In a list the reference is passed on; alone, Ray Data would replace it by its value.
    reading, shared = [ray.put(work.reading)], [ray.put(work)]
    # Neighbours differ in what they ask of Ray, or Ray Data would fuse them: a whole shard would be
    # decoded by its reader, and blocks by the actors that score.
    encoded = shards.map_batches(
        _read_on_ray,
        batch_size=1,
        # A shard that is being read is not done yet, and lost when a run is killed.
        compute=ray.data.TaskPoolStrategy(size=n),
        num_cpus=READER_CPUS,
        fn_kwargs={"reading": reading},
    )
    decoded = encoded.map_batches(
        _decode_on_ray,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        fn_kwargs={"reading": reading},
    )
    scored = decoded.map_batches(
        _RayScorers,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=n),
        scheduling_strategy="SPREAD",
        fn_constructor_args=(shared,),
        **held,
    )
    for batch in batches_of(ray, scored, "measuring curvature"):
        for data in batch["block"]:
            found: Scored = pickle.loads(data)
            yield found


def _packed(block: object) -> pa.Table:
    """A block as one row of one cell, so that Ray Data neither cuts nor joins blocks."""
    data = pickle.dumps(block, protocol=pickle.HIGHEST_PROTOCOL)
    return pa.table({"block": pa.array([data], pa.large_binary())})


def _unpacked(batch: pa.Table) -> Any:
    return pickle.loads(batch["block"][0].as_buffer())


def _read_on_ray(batch: dict[str, Any], reading: Any) -> Iterator[pa.Table]:
    import ray

    for block in read_blocks(ray.get(reading[0]), int(batch["number"][0])):
        yield _packed(block)


def _decode_on_ray(batch: pa.Table, reading: Any) -> pa.Table:
    import ray

    found: Reading = ray.get(reading[0])
    return _packed(decode_block(found, _unpacked(batch)))


class _RayScorers:
    """`Scorers` as an actor of Ray Data."""

    def __init__(self, work: Any) -> None:
        import ray

        found: Work = ray.get(work[0])
        self.scorers = Scorers(found, Store(found.store_url))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _packed(self.scorers(_unpacked(batch)))
