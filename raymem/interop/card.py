"""A store's card for Hugging Face: README.md, with pictures, that says what the tables are.

In:  a scored store; figures and thumbnails, if `raymem report` made them. Out: files in a folder.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from raymem.encoding import at_epsilon, counted
from raymem.errors import StoreError
from raymem.store import Store
from raymem.store.columns import as_markdown

SHOWN = 12
# Pictures are enlarged to at least this many pixels, for small ones are invisible on a page.
SIDE = 96
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
         (10**7, "1M<n<10M"), (math.inf, "n>10M"))  # fmt: skip
# Of Markdown, of HTML, or of a table.
MARKS = set("\\`*_[]<>|&~#!\n\r")
LOAD = """```python
import os
from datasets import load_dataset

source = os.getcwd()  # this folder; once it is on the Hub: "USER/NAME"
table = load_dataset(source, "examples", split="train").to_pandas()
examples = table[table["split"] == "train"].sort_values("memorization", ascending=False)
print(examples[["example_id", "label", "epsilon", "memorization"]].head(10))
```

`split="train"` is what `datasets` calls a table in one piece; the column `split` tells training
from test examples. Without that library: `pandas.read_parquet("data/examples.parquet")`."""


def write_card(store: Store, folder: Path, tables: Sequence[str], *, pictures: bool) -> None:
    """Write README.md, figures/ and, if `pictures`, pictures/ of the most memorized examples.

    `tables` are the names of data/NAME.parquet.
    """
    scores = store.scores()
    epsilon = max(scores["epsilon"].to_pylist())
    first = _most_memorized(scores, epsilon)
    files = _write_pictures(store, folder, first) if pictures else {}
    study, trials = store.study(), store.scores("trials").num_rows
    command = (store.note("command") or {}).get("command")
    parts = [
        _front_matter(study.data_name, scores.num_rows, tables),
        f"# {_text(study.data_name)}: what was memorized",
        f"Memorization and influence (Feldman & Zhang 2020) of {study.n_train:,} training and "
        f"{study.n_test:,} test examples, from "
        f"{counted(trials, 'model') + ' on ' if trials else ''}{study.plan}; study "
        f"`{study.hash[:16]}`. {_about_pictures(files)}",
        *([f"Made by `{command}`."] if command else []),
        f"## The most memorized training examples{at_epsilon(epsilon)}",
        _gallery(store, first, files, epsilon),
        "## Load the tables",
        LOAD,
        *_figures(store, folder),
        "Every number has its standard error or interval and its counts beside it; undefined "
        "values are null.",
        as_markdown(),
    ]
    (folder / "README.md").write_text("\n\n".join(parts))


def _front_matter(name: str, rows: int, tables: Sequence[str]) -> str:
    size = next(text for most, text in SIZES if rows < most)
    configs = "\n".join(
        f"- config_name: {name}\n  data_files: data/{name}.parquet"
        + ("\n  default: true" if name == "examples" else "")
        for name in tables
    )
    return (
        f"---\npretty_name: {_yaml(name + ': memorization')}\n"
        "tags: [memorization, influence, data-quality, raymem]\n"
        f"size_categories: [{_yaml(size)}]\nconfigs:\n{configs}\n---"
    )


def _most_memorized(scores: pa.Table, epsilon: float) -> list[dict[str, Any]]:
    here = scores.filter(
        pc.and_(pc.equal(scores["epsilon"], epsilon), pc.is_valid(scores["memorization"]))
    )
    order = [("memorization", "descending"), ("memorization_soft", "descending")]
    found: list[dict[str, Any]] = here.take(pc.sort_indices(here, order)[:SHOWN]).to_pylist()
    return found


def _write_pictures(store: Store, folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Pictures of the rows' examples; their paths by id."""
    known, files = store.thumbnails(), {}
    for place, row in enumerate(rows):
        if row["example_id"] not in known:
            continue
        files[row["example_id"]] = name = f"pictures/{place + 1:02d}.png"
        (folder / "pictures").mkdir(exist_ok=True)
        with Image.open(io.BytesIO(known[row["example_id"]])) as image:
            times = -(-SIDE // max(image.size))
            size = (image.width * times, image.height * times)
            image.resize(size, Image.Resampling.NEAREST).save(folder / name)
    return files


def _about_pictures(files: dict[str, str]) -> str:
    if not files:
        return "No images are in it."
    return f"Pictures of {counted(len(files), 'training example')} are in it, and no other images."


def _gallery(
    store: Store, rows: Sequence[dict[str, Any]], files: dict[str, str], epsilon: float
) -> str:
    classes, helped = store.study().classes, _most_helped(store, epsilon)
    lines = [
        "| picture | example | label | memorization [95%] | test example that it most helps |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["example_id"]
        label = "" if row["label"] is None else classes[row["label"]]
        picture = f"![{_text(name)}]({files[name]})" if name in files else ""
        cells = [picture, _text(name), _text(label), _interval(row), helped.get(name, "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(row: dict[str, Any]) -> str:
    value, low, high = (row[f"memorization{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f}" if low is None else f"{value:.3f} &#91;{low:.3f}, {high:.3f}&#93;"


def _most_helped(store: Store, epsilon: float) -> dict[str, str]:
    """The test example that each training example most helps, with its influence."""
    try:
        pairs = store.scores("influence")
    except StoreError:
        return {}
    pairs = pairs.filter(pc.equal(pairs["epsilon"], epsilon))
    found: dict[str, str] = {}
    for pair in pairs.take(pc.sort_indices(pairs, [("influence", "descending")])).to_pylist():
        text = f"{_text(pair['test_id'])} (influence {pair['influence']:.2f})"
        found.setdefault(pair["train_id"], text)
    return found


def _figures(store: Store, folder: Path) -> list[str]:
    """The report's figures, copied, as sections of the card; titles are in the files."""
    keys = [
        key
        for key in sorted(store.files.list("figures"), key=lambda k: ("memorization." not in k, k))
        if key.endswith(".png") and not key.endswith("-dark.png")
    ]
    found = ["## Figures"] if keys else []
    for key in keys:
        (folder / key).parent.mkdir(exist_ok=True)
        (folder / key).write_bytes(store.files.read(key))
        with Image.open(folder / key) as image:
            title = str(image.info.get("Title", Path(key).stem))
            about = str(image.info.get("Description", ""))
        found.append(f"![{_text(title)}]({key})\n\n{_text(title)}. {_text(about)}".rstrip())
    return found


def _text(words: str) -> str:
    """Words of the data for Markdown, without its marks.

    >>> _text("a|b <i>")
    'a&#124;b &#60;i&#62;'
    """
    return "".join(f"&#{ord(c)};" if c in MARKS else c for c in words)


def _yaml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
