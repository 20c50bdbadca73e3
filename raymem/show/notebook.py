"""A store in a notebook: tables, links, images."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from raymem.data import Examples, add_canaries, flip_labels, load_examples
from raymem.encoding import at_epsilon
from raymem.errors import ExamplesError, RaymemError, StoreError
from raymem.links import Links, find_links
from raymem.show.result_tables import correlations_table
from raymem.show.score_tables import examples_table
from raymem.show.table import Column, Table
from raymem.store import Store

if TYPE_CHECKING:
    from raymem.show.explorer import ExplorerFrame

# So many rows of a table are shown in a notebook.
SHOWN = 10
PICTURE = '<img src="data:{};base64,{}" alt="{}" width="48" style="image-rendering: pixelated">'


@dataclass(frozen=True, kw_only=True, repr=False)
class ShownLinks(Links):
    """Links that a notebook shows as sentences and a table for each epsilon."""

    def _repr_html_(self) -> str:
        sentences = "".join(f"<li>{html.escape(str(verdict))}</li>" for verdict in self.verdicts)
        tables = (
            dataclasses.replace(
                correlations_table(rows),
                title=f"What is correlated with memorization{at_epsilon(epsilon)}",
            )
            for epsilon, rows in self.correlations.items()
            if rows
        )
        return f"<ul>{sentences}</ul>{''.join(table._repr_html_() for table in tables)}"


class StudyResults:
    """What a study found, for reading. See `open`."""

    def __init__(self, store: str | os.PathLike[str], data: Examples | str | None = None) -> None:
        self.store = Store(store)
        """The store itself."""
        self.about = self.store.study()
        """study.json: what the study is."""
        self._data = data

    @property
    def scores(self) -> pa.Table:
        """scores/examples.parquet: one row per example and epsilon; docs/columns.md says what its
        columns mean. `.to_pandas()` makes a data frame of it."""
        return self.store.scores()

    @property
    def pairs(self) -> pa.Table:
        """scores/influence.parquet: pairs of a training and a test example."""
        return self.store.scores("influence")

    @property
    def trials(self) -> pa.Table:
        """scores/trials.parquet: one row per trial."""
        return self.store.scores("trials")

    def links(self) -> ShownLinks:
        """The three links, computed from the tables; takes seconds."""
        return ShownLinks(**vars(find_links(self.store)))

    def data(self) -> Examples:
        """The images, from where the study had them, checked against its index.

        Raises ExamplesError if they are not there, or are others.
        """
        if isinstance(self._data, Examples):
            return self._data
        source = self._data or self.about.data_source
        if not source:
            raise ExamplesError(
                f"{self.store.url} does not say where its images are; give them as data= or --data"
            )
        found = load_examples(source)
        if self.about.flipped:
            found = flip_labels(found, len(self.about.flipped) / len(found.train_ids))
        if self.about.canaries:
            found = add_canaries(found, len(self.about.canaries))
        if found.fingerprint != self.about.fingerprint:
            raise ExamplesError(
                f"the images at {source} are not those of {self.store.url}: ids, labels or pixels "
                "differ; give the right ones as data="
            )
        self._data = found
        return found

    def pixels(self, example_id: str) -> NDArray[np.uint8]:
        """An example's image, uint8 [H, W, C], checked by its content hash.

        Raises StoreError for an id that the study does not have, ExamplesError for other pixels.
        """
        index = self.store.examples()
        rows = index.filter(pc.equal(index["example_id"], example_id)).to_pylist()
        if not rows:
            raise StoreError(
                f"there is no example {example_id!r} in {self.store.url}; see raymem scores"
            )
        data, (row,) = self.data(), rows
        ids = data.train_ids if row["split"] == "train" else data.test_ids
        if row["index"] >= len(ids) or ids[row["index"]] != example_id:
            raise ExamplesError(
                f"{example_id} is another image in {data.name}; give the right data="
            )
        place = row["index"] + (0 if row["split"] == "train" else len(data.train_ids))
        if row["content_hash"] not in (None, data.content_hashes[place]):
            raise ExamplesError(f"the pixels of {example_id} are not those that were scored")
        x = data.x_train if row["split"] == "train" else data.x_test
        return np.asarray(x[row["index"]])

    def image(self, example_id: str) -> Image.Image:
        """The same as a Pillow image, which notebooks show."""
        return as_image(self.pixels(example_id))

    def __repr__(self) -> str:
        done = len(self.store.done())
        return (
            f"raymem.open({self.store.url!r}): {self.about.data_name}, {done:,} trials, "
            f"{self.store.plan()}"
        )

    def explore(self, height: int = 900) -> ExplorerFrame:
        """The explorer of the report, shown inline by notebooks, `height` pixels high: point at an
        example, open it, select some. Its `.html` is a page that opens from disk.

        Nothing is written. Raises StoreError without scores.
        """
        from raymem.show.explorer import explorer_frame

        return explorer_frame(self, height)

    def _repr_html_(self) -> str:
        text = f"<p>{html.escape(repr(self))}</p>"
        try:
            table = self.scores
        except StoreError as error:
            return f"{text}<p>{html.escape(str(error))}</p>"
        order = pc.sort_indices(table, [("memorization", "descending")])[:SHOWN]
        shown = examples_table(table.take(order))
        pictures = self._pictures([str(row[0]) for row in shown.rows])
        if pictures:
            shown = Table(
                columns=[Column(key="picture", title="picture"), *shown.columns],
                rows=[[pictures.get(str(row[0])), *row] for row in shown.rows],
            )
        return (
            f"{text}{shown._repr_html_()}"
            f"<p>{table.num_rows:,} rows; .scores.to_pandas() has all, .explore() shows all</p>"
        )

    def _pictures(self, ids: list[str]) -> dict[str, Markup]:
        """Image elements of those whose pictures are at hand: in the store, or in memory."""
        from raymem.show.thumbnails import encoded, media_type

        found = {k: v for k, v in self.store.thumbnails().items() if k in ids}
        if isinstance(self._data, Examples):
            with contextlib.suppress(RaymemError):  # other images; `image` says so
                found |= {i: encoded(self.image(i)) for i in ids if i not in found}
        return {
            i: Markup(PICTURE).format(media_type(data), base64.b64encode(data).decode(), i)
            for i, data in found.items()
        }


def as_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, C] with one or three channels as a Pillow image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3])


def open_store(store: str | os.PathLike[str], data: Examples | str | None = None) -> StudyResults:
    """A store for reading: `.scores`, `.pairs`, `.trials`, `.links()`, `.image(example_id)`,
    `.explore()`. Notebooks show its most memorized examples.

    `data` is where the images are, if they are not where the study had them: what `load_examples`
    takes, or Examples. Raises StoreError if there is no study.

    >>> from raymem import Recipe, Study, load_examples
    >>> study = Study(
    ...     examples=load_examples("digits"),
    ...     recipe=Recipe(model="mlp-8", epochs=1),
    ...     store="memory://doctest-open",
    ...     trials=2,
    ... )
    >>> progress, summaries = study.train(engine="serial"), study.score()
    >>> results = open_store("memory://doctest-open")
    >>> results.scores.num_rows, results.image("digit-0905").size
    (1797, (8, 8))
    """
    return StudyResults(store, data)
