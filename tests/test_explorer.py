"""The explorer's arrays, page, figures and server; what a browser does is in another file."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from click.testing import CliRunner
from explored import EVIL, served, trained

import raymem
from benchmarks.explorer import large_page, tables_only
from raymem import Store
from raymem.cli import main
from raymem.errors import StoreError
from raymem.show import explorer
from raymem.show.explorer import explorer_page, explorer_section
from raymem.show.explorer_data import ExplorerTables, packed, spread, thinned
from raymem.show.explorer_spec import ExplorerError, draw_figure, specification


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("explored"))


@pytest.fixture(scope="module")
def tables(study):
    return ExplorerTables(Store(study.store))


@pytest.fixture(scope="module")
def text(study):
    return explorer_section(raymem.open(study.store, data=study.examples))


def blob_of(text, name):
    found = re.search(rf'data-blob="{re.escape(name)}">([^<]*)</script>', text)
    return None if found is None else gzip.decompress(base64.b64decode(found[1]))


def array_of(text, name, dtype):
    """As a browser unpacks it."""
    planes = np.frombuffer(blob_of(text, name), np.uint8)
    return planes.reshape(np.dtype(dtype).itemsize, -1).T.copy().view(dtype).ravel()


def told_of(text):
    return json.loads(re.search(r'id="explorer-about">(.*?)</script>', text, re.DOTALL)[1])


# Arrays


def test_floats_keep_four_digits_and_nan():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=100), 10.0 ** np.arange(-30, 30), [0, np.nan, 1]])
    raw = np.frombuffer(gzip.decompress(packed(values)), np.uint8)
    back = raw.reshape(4, -1).T.copy().view("<f4").ravel()
    assert np.isnan(back[-2])
    whole = np.isfinite(values)
    assert (np.abs(back[whole] - values[whole]) <= np.abs(values[whole]) * 2.0**-13).all()
    assert back[-1] == 1
    assert gzip.decompress(packed(np.empty(0, np.int32))) == b""


def test_columns_are_those_of_the_score_table(study, tables):
    rows = study.scores().to_pylist()
    assert tables.ids == [r["example_id"] for r in rows]
    assert (tables.n_train, tables.n_examples) == (60, 90)
    for name in ("memorization", "curvature_out", "memorized", "n_in"):
        expected = [math.nan if r[name] is None else float(r[name]) for r in rows]
        np.testing.assert_allclose(tables.column(math.inf, name), expected, rtol=1e-6)
    assert tables.column(math.inf, "group_memorization") is not None
    assert tables.column(math.inf, "vulnerability") is None
    assert tables.groups[6] == tables.groups[9] >= 0 > tables.groups[0]


def test_menus_offer_measures_in_plain_words(tables):
    found = {m.name: m for m in tables.measures}
    assert list(found)[:2] == ["memorization", "curvature_out"]
    assert found["curvature_out"].label == "curvature, out (nats/pixel^2)"
    assert "trace of the Hessian" in found["curvature_out"].meaning
    assert found["memorization"].around == ("memorization_low", "memorization_high")
    assert found["curvature_out"].around == ("curvature_out_stderr",)
    assert not {"label", "index", "epsilon", "memorization_low", "near_duplicate_group"} & {*found}


def test_outcomes_are_those_of_the_trials(study, tables):
    store = Store(study.store)
    found = tables.outcomes(math.inf)
    assert found.shape == (20, 90)
    for row, key in enumerate(store.scored(math.inf)):
        table = store.trial(key)
        inside = [bool(v) for v in table["in_subset"].to_pylist()]
        assert (found[row] & 1).tolist() == [int(v) for v in inside]
        assert (found[row] >> 1).tolist() == [int(v) for v in table["correct"].to_pylist()]


def test_relations_are_those_of_the_influence_table(study, tables):
    rows = Store(study.store).scores("influence").to_pylist()
    pairs = tables.pairs(math.inf)
    found = {
        (tables.ids[a], tables.ids[b]): value
        for a, b, value in zip(pairs["train"], pairs["test"], pairs["influence"], strict=True)
    }
    assert found == {
        (r["train_id"], r["test_id"]): pytest.approx(r["influence"], abs=1e-6) for r in rows
    }
    assert (np.diff(pairs["influence"]) <= 0).all()


def test_large_sets_keep_the_most_memorized():
    memorization = np.linspace(-1, 1, 1000).astype(np.float32)
    memorization[990:] = np.nan
    rows = thinned(memorization, 1000, 100)
    assert len(rows) == 100
    assert {*range(940, 990)} <= {*rows.tolist()}
    assert (np.diff(rows) > 0).all()
    assert thinned(None, 5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread(range(10), 0).tolist() == []


# The page


def test_a_page_has_every_example_and_needs_no_network(study, tables, text):
    told = told_of(text)
    assert (told["n"], told["n_train"], told["epsilons"]) == (90, 60, ["inf"])
    assert json.loads(blob_of(text, "ids")) == tables.ids
    assert array_of(text, "labels", "<i4").tolist() == tables.labels.tolist()
    memorization = array_of(text, "m/inf/memorization", "<f4")
    np.testing.assert_allclose(memorization, tables.column(math.inf, "memorization"), rtol=2e-4)
    for name in told["columns"]["inf"]:
        assert len(array_of(text, f"m/inf/{name}", "<f4")) == 90, name
    assert told["sampled"] == []
    assert not re.findall(r"(?:src|href|srcset)=\"(?!data:|#)", text)


def test_pictures_and_outcomes_of_each_example(study, tables, text):
    import io

    from PIL import Image

    detail = array_of(text, "detail", "<i4")
    starts = array_of(text, "pictures/starts", "<u4")
    images = blob_of(text, "pictures/bytes")
    assert sorted(detail.tolist()) == list(range(90))
    x = np.concatenate([study.examples.x_train, study.examples.x_test])
    for place, row in enumerate(detail):
        with Image.open(io.BytesIO(images[starts[place] : starts[place + 1]])) as image:
            assert (np.asarray(image) == x[row, :, :, 0]).all()
    packed_codes = array_of(text, "outcomes/inf", "u1").reshape(90, 5)
    codes = np.stack([packed_codes >> 2 * k & 3 for k in range(4)], axis=2).reshape(90, 20)
    assert (codes == tables.outcomes(math.inf).T[detail]).all()


def test_names_are_text(text):
    assert EVIL not in text
    assert told_of(text)["classes"][1] == EVIL
    assert 'train-0"' not in text
    page = explorer_page(text, EVIL)
    assert EVIL not in page
    assert "&lt;script&gt;alert" in page


def test_what_does_not_fit_is_left_out_and_said(study, monkeypatch):
    monkeypatch.setattr(explorer, "MOST_EXAMPLES", 40)
    monkeypatch.setattr(explorer, "MOST_DETAILS", 10)
    monkeypatch.setattr(explorer, "MOST_PAIRS", 3)
    monkeypatch.setattr(explorer, "COLUMN_BYTES", 2000)
    text = explorer_section(raymem.open(study.store, data=study.examples))
    told = told_of(text)
    said = " ".join(told["sampled"])
    assert told["n"] == len(json.loads(blob_of(text, "ids"))) == 40
    assert "40 of 90 examples are on this page" in said
    assert "do not fit this page" in said
    assert "3 most influential of" in said
    assert "Pictures and outcomes of single models are here for 10 examples" in said
    assert "memorization" in told["columns"]["inf"]
    rows = study.scores().to_pylist()
    most = max(rows, key=lambda r: -1 if r["memorization"] is None else r["memorization"])
    assert most["example_id"] in json.loads(blob_of(text, "ids"))


def test_a_store_without_images_or_trials_has_an_explorer(tmp_path):
    store = tables_only(tmp_path / "store", n=50, m=10, trials=0, pairs=4)
    text = explorer_section(raymem.open(store.url))
    told = told_of(text)
    assert told["trials"] == {}
    assert told["pictures"] is False
    assert "Pictures are missing" in told["sampled"][0]
    assert len(array_of(text, "pairs/inf/train", "<i4")) == 4


@pytest.mark.slow
def test_sixty_thousand_examples_fit_a_page(tmp_path):
    path = large_page(tmp_path, trials=100)
    text = path.read_text()
    told = told_of(text)
    assert told["n"] == 60_000
    assert told["pictures"]
    assert len(array_of(text, "detail", "<i4")) >= 3000
    # 15 MB with the rest of the report.
    assert len(text) < 12e6


def test_no_scores_say_what_to_run(tmp_path, study):
    store = tables_only(tmp_path / "store", n=5, m=5, trials=0, pairs=1)
    store.files.delete("scores/examples.parquet")
    with pytest.raises(StoreError, match="score"):
        ExplorerTables(store)


# Figures


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")]
)
def test_figures_for_papers(study, tmp_path, suffix, start):
    path = tmp_path / f"plot.{suffix}"
    draw_figure(Store(study.store), path, across="memorization", up="loss_out")
    data = path.read_bytes()
    assert data.startswith(start)
    if suffix == "svg":
        assert b"loss, out (nats)" in data
        assert data.count(b'aria-roledescription="point"') == 60


def test_figures_that_there_are_not(study, tables, tmp_path):
    with pytest.raises(
        ExplorerError, match="there is no measure nothing; take one of memorization"
    ):
        specification(tables, math.inf, "nothing", "loss_out")
    with pytest.raises(ExplorerError, match="take one of inf"):
        draw_figure(Store(study.store), tmp_path / "a.png", epsilon=2)
    with pytest.raises(ExplorerError, match="no known suffix"):
        draw_figure(Store(study.store), tmp_path / "a.gif")
    done = CliRunner().invoke(
        main, ["explore", str(study.store), "--figure", str(tmp_path / "a.svg"), "--up", "n_in"]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.svg").exists()


# The server


@pytest.fixture(scope="module")
def address(study):
    with served(study) as address:
        yield address


def get(url, headers=None, method="GET"):
    """Status and body."""
    request = urllib.request.Request(url, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_server_gives_what_the_page_asks_for(study, tables, address):
    status, page = get(address)
    assert status == 200
    told = told_of(page.decode())
    assert told["served"]
    assert told["n"] == 90
    assert EVIL.encode() not in page
    assert json.loads(gzip.decompress(get(f"{address}blob/ids")[1])) == tables.ids
    for name in ("labels", "groups", "vega", "m/inf/memorization", "pairs/inf/train"):
        assert get(f"{address}blob/{name}")[0] == 200, name
    codes = np.frombuffer(gzip.decompress(get(f"{address}blob/outcomes/inf/7")[1]), np.uint8)
    assert (codes == tables.outcomes(math.inf)[:, 7]).all()
    assert get(f"{address}picture/3")[1].startswith(b"\x89PNG")
    row = study.scores().to_pylist()[5]
    example = json.loads(get(f"{address}example/inf/5")[1])
    assert example["memorization"]["value"] == pytest.approx(row["memorization"], abs=1e-6)
    assert example["memorization"]["low"] == pytest.approx(row["memorization_low"], abs=1e-6)
    assert example["curvature_out"]["high"] == pytest.approx(
        row["curvature_out"] + 1.96 * row["curvature_out_stderr"], rel=1e-5
    )


@pytest.mark.parametrize(
    "path",
    ["blob/nothing", "blob/m/inf/example_id", "blob/m/7/memorization", "blob/outcomes/inf/90",
     "picture/-1", "picture/x", "example/inf/9999", "../study.json", "study.json"],
)  # fmt: skip
def test_what_is_not_there_is_not_found(address, path):
    assert get(address + path)[0] in (403, 404)


def test_strangers_are_refused(address):
    base = address.removesuffix("secret/")
    for path in ("", "secre/", "secret2/", "wrong/blob/ids", "wrong/"):
        assert get(base + path)[0] == 403, path
    assert get(address, {"Host": "evil.example"})[0] == 403
    assert get(address, {"Host": "evil.example:80"})[0] == 403
    port = address.split(":")[2].split("/")[0]
    assert get(address, {"Host": f"localhost:{port}"})[0] == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert get(address, method=method)[0] == 405, method


@pytest.mark.alone
def test_ctrl_c_ends_the_server_and_the_port_is_of_this_machine_only(study):
    started = subprocess.Popen(
        [sys.executable, "-m", "raymem.cli", "explore", str(study.store)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = started.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:(\d+)/[\w-]{20,}/", line)
        assert url, line
        assert get(url[0])[0] == 200
        outside = socket.gethostbyname(socket.gethostname())
        if not outside.startswith("127."):
            with (
                pytest.raises(OSError),
                socket.create_connection((outside, int(url[1])), timeout=2),
            ):
                pass
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=30)
    finally:
        started.kill()
    assert started.returncode == 0
    assert out.splitlines()[-1] == "ended"
    assert err == ""


def test_a_port_in_use_is_said(study):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["explore", str(study.store), "--port", str(port)])
    assert done.exit_code == 1
    assert f"port {port} is in use" in done.output
