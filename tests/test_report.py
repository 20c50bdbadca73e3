"""The page: what is on it, that data cannot break it, and how it looks to a browser."""

from __future__ import annotations

import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image

import raymem
from raymem import CurvatureRule, Examples, Privacy, Recipe, Store, Study
from raymem.cli import main
from raymem.errors import ExamplesError, StoreError
from raymem.links import diagnostics, find_links, red
from raymem.show import write_report
from raymem.show.choose import choose
from raymem.store.derived import THUMBNAILS
from raymem.store.measures import title_of
from raymem.store.trials import decode

EVIL = '<script>alert("x")</script>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def make(url, *, classes=("zero", EVIL, "two & more"), trials=40, **more):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (90, 8, 8, 1), np.uint8)
    y = np.arange(90) % 3
    x[:, 0, :, 0] = (y * 80)[:, None]
    y[:6] = (y[:6] + 1) % 3  # label errors: nothing but themselves teaches them
    settings = {
        "examples": Examples(
            x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:], classes=classes,
            train_ids=tuple(f"train-{i}\"'><b>" for i in range(60)),
        ),
        "recipe": Recipe(model="mlp-32", epochs=30, batch_size=20, learning_rate=0.3),
        "store": url,
        "trials": trials,
        "curvature": CurvatureRule(),
    }  # fmt: skip
    study = Study(**{**settings, **more})
    study.train(engine="serial")
    study.score()
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make(tmp_path_factory.mktemp("report") / "store")


class Read(html.parser.HTMLParser):
    """Elements, text and attributes of a page, and whether all are closed in order."""

    VOID = ("meta", "link", "img", "source", "br", "input")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text, self.images = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def read(text):
    page = Read()
    page.feed(text)
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def text(study):
    Store(study.store).write_note("command", {"command": "python jobs/mine.py --trials 40"})
    path = write_report(study.store, study.examples)
    return (study.store / "report.html").read_text(), path


def test_the_page_is_one_file_that_needs_nothing_else(study, text):
    page, path = text
    assert path == str(study.store / "report.html")
    assert not re.findall(r"(?:src|href|srcset)=\"(?!data:|#)", page)
    assert "@import" not in page
    assert "url(" not in page
    assert len(page) < 10e6


def test_what_is_on_it(study, text):
    read_page = read(text[0])
    words = " ".join(" ".join(read_page.text).split())
    for part in (
        "What was found", "What is memorized?", "What depends on memorized examples?",
        "Which labels are probably wrong?", "Does curvature tell the same?",
        "What does privacy change?", "Who can be recognized?", "Can this run be trusted?",
        "Settings and command", "The most memorized of each class", "Load the tables",
        "python jobs/mine.py --trials 40", "Link 1: curvature", "polars.read_parquet",
        "training accuracy (mean over models)", "lowest and highest curvature",
    ):  # fmt: skip
        assert part in words, part
    assert all(image.get("alt") for image in read_page.images)
    rows = study.scores().to_pylist()
    first = max((r for r in rows if r["split"] == "train"), key=lambda r: r["memorization"] or -1)
    assert f"memorization {first['memorization']:.2f}" in words


def test_what_was_found_comes_first_and_how_it_was_made_last(text):
    order = ("found", "memorization", "curvature", "table", "trust", "settings")
    places = [text[0].index(f'<h2 id="{part}">') for part in order]
    assert places == sorted(places)


def test_the_story_has_the_numbers_of_the_results(study, text):
    """Three sentences, each with its number and interval, on the page as they are told."""
    from raymem.show import tell

    store = Store(study.store)
    links = find_links(store)
    story = tell(store, links)
    (pool,) = (audit.pool for audit in links.memorization)
    listed = sum(bool(row["memorized"]) for row in study.scores().to_pylist())
    assert story.memorization.startswith(f"{listed} of 60 training examples")
    mean = f"{100 * pool.value:.1f} [{100 * pool.low:.1f}, {100 * pool.high:.1f}]"
    assert f"models are right {mean} percentage points more often" in story.memorization
    strong = [row for row in study.scores("influence").to_pylist() if row["strong"]]
    assert (f"({len(strong):,} of " in story.influence) == bool(strong)
    row = next(r for r in links.correlations[math.inf] if r.measure == "curvature_out")
    assert f"with probability {row.auc.format(3)}" in story.curvature
    assert "cannot be told from these data" in story.curvature
    assert len(story.sentences) == 3
    for sentence in story.sentences:
        assert sentence in html.unescape(text[0])
    assert story.trust.startswith("Yes")
    assert "red-note" not in text[0].split("</style>")[1]


def test_links_that_are_known_are_not_computed_again(study, monkeypatch):
    from raymem.links import correlation as links_room
    from raymem.show import build_report

    known = find_links(Store(study.store))
    calls = []
    monkeypatch.setattr(build_report, "find_links", lambda store: calls.append(store) or known)
    monkeypatch.setattr(links_room, "correlate", lambda *more: calls.append(more))
    write_report(study.store, study.examples, links=known)
    assert calls == []
    write_report(study.store, study.examples)
    assert len(calls) == 1


def test_every_number_of_the_fleet_is_compared_with_memorization(study, text):
    (rows,) = find_links(Store(study.store)).correlations.values()
    section = text[0].split('id="compared"')[1].split("</table>")[0]
    places = []
    for row in rows:
        cell = f"<td>{html.escape(title_of(row.measure))}</td>"
        rho = f">{row.spearman.value:.2f} [{row.spearman.low:.2f}, {row.spearman.high:.2f}]<"
        assert rho in section.split(cell)[1].split("</tr>")[0], row.measure
        places.append((section.index(cell), row.spearman.value))
    values = [value for _, value in sorted(places)]
    assert values == sorted(values, reverse=True)
    assert {"learning_epoch", "forgetting_count", "wrong_out"} <= {row.measure for row in rows}


def test_data_is_text(text):
    page, _ = text
    # Names of classes and ids are seen as they are, and nowhere as markup.
    assert EVIL not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)" in page
    assert "<b>" not in re.sub(r"<b>(zero|two|&lt;script)", "", page)
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<script" not in markup
    data = json.loads(re.search(r'id="rows">(.*?)</script>', page, re.DOTALL)[1])
    keys = [column["key"] for column in data["columns"]]
    ids = {row[keys.index("example_id")] for row in data["rows"]}
    assert "train-0\"'><b>" in ids
    assert EVIL in {row[keys.index("class")] for row in data["rows"]}
    assert {c["title"] for c in data["columns"]} >= {"memorization", "loss, out", "models in"}


def test_label_errors_are_found(study):
    chosen = choose(Store(study.store), math.inf)
    found = [row["index"] for row in chosen.suspicious[:6]]
    assert len(set(found) & set(range(6))) >= 4
    assert all(row["memorization"] > 0.25 for rows in chosen.gallery.values() for row in rows)
    by_hand = sorted(
        (r for r in study.scores().to_pylist() if r["split"] == "train" and r["label"] == 0),
        key=lambda r: -r["curvature_out"],
    )
    assert [r["index"] for r in chosen.highest[0]] == [r["index"] for r in by_hand[:3]]


def test_pictures_are_the_examples_and_stay_in_the_store(study, text):
    table = decode(Store(study.store).files.read(THUMBNAILS), THUMBNAILS)
    ids = table["example_id"].to_pylist()
    # Those that the page shows, and of so small a set all others, for the explorer.
    assert set(choose(Store(study.store), math.inf).ids()) <= set(ids)
    import io

    place = {example_id: row for row, example_id in enumerate(study.examples.train_ids)}
    for example_id, data in zip(ids, table["image"].to_pylist(), strict=True):
        if example_id in place:
            pixels = np.asarray(Image.open(io.BytesIO(data)))
            assert (pixels == study.examples.x_train[place[example_id], :, :, 0]).all()
    # Without the images at hand the pictures of before are shown.
    before = text[0].count("data:image/png")
    write_report(study.store)
    assert (study.store / "report.html").read_text().count("data:image/png") == before


def test_a_store_without_images_has_a_page_without_pictures(tmp_path):
    study = make(tmp_path / "store", trials=20)
    write_report(study.store)
    words = " ".join(read((tmp_path / "store" / "report.html").read_text()).text)
    assert "Some pictures are missing" in words
    assert "give them as data=" in words


def test_figures_are_there_for_papers(study, text):
    names = {path.name for path in (study.store / "figures").iterdir()}
    assert {"memorization.png", "memorization.pdf", "link1-curvature_out.pdf"} <= names
    with Image.open(study.store / "figures" / "memorization.png") as image:
        assert image.size == (896, 560)
    assert (study.store / "figures" / "memorization.pdf").read_bytes().startswith(b"%PDF")
    links = json.loads((study.store / "links.json").read_text())
    assert links["verdicts"][0]["text"].startswith("link 1: curvature")


@pytest.mark.slow
def test_private_studies_have_all_figures(tmp_path):
    make(
        tmp_path / "store", trials=20, subset_ratio=0.5, epsilons=(1, 2, 4, 8, math.inf),
        privacy=Privacy(accountant="rdp"),
    )  # fmt: skip
    write_report(tmp_path / "store")
    page = (tmp_path / "store" / "report.html").read_text()
    assert "Link 2: mean curvature and epsilon" in page
    assert "Link 3: memorization and epsilon" in page
    assert "epsilon 8" in page
    read(page)


def test_the_command(study):
    result = CliRunner().invoke(main, ["report", str(study.store)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"report: {study.store / 'report.html'}"
    missing = CliRunner().invoke(main, ["report", str(study.store / "nowhere")])
    assert missing.exit_code == 1
    assert "there is no study" in missing.output


def test_what_commands_print_fits_the_terminal(study, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in (["links"], ["status"], ["pairs"], ["errors"], ["example"], ["membership"]):
        more = ["train-7\"'><b>"] if command == ["example"] else []
        result = CliRunner().invoke(main, [*command, str(study.store), *more])
        assert result.exit_code == 0, result.output
        wide = [line for line in result.output.splitlines() if len(line) > 80]
        assert wide == [], command


@pytest.mark.parametrize("more", [False, True])
def test_imported_fleets_have_a_page(tmp_path, more):
    """Masks and outcomes alone, or with all that an import may have."""
    rng = np.random.default_rng(0)
    masks = rng.random((40, 50)) < 0.7
    right = masks | (rng.random((40, 50)) < 0.4)
    rest = {
        "correct_test": rng.random((40, 10)) < 0.5,
        "y_train": rng.integers(0, 3, 50), "y_test": rng.integers(0, 3, 10),
        "margins_train": np.where(right, 2.0, -2.0).astype(np.float32),
        "margins_test": np.zeros((40, 10), np.float32),
    }  # fmt: skip
    np.savez(tmp_path / "fleet.npz", masks=masks, correct_train=right, **(rest if more else {}))
    store = str(tmp_path / "store")
    imported = CliRunner().invoke(main, ["import", "npz", str(tmp_path / "fleet.npz"), store])
    assert imported.exit_code == 0, imported.output
    for command in ("report", "links"):
        result = CliRunner().invoke(main, [command, store])
        assert result.exit_code == 0, result.output
    read((tmp_path / "store" / "report.html").read_text())


def test_scores_are_needed(tmp_path):
    study = make(tmp_path / "store", trials=20)
    Store(study.store).files.delete("scores/examples.parquet")
    with pytest.raises(StoreError, match=r"scores/examples\.parquet yet"):
        write_report(study.store)


def thousand_classes(store):
    """Tables of a study of a thousand classes, made here."""
    from raymem.scores import score
    from raymem.store import Target

    rng = np.random.default_rng(0)
    n = 4000
    x = rng.integers(0, 256, (n + 1000, 32, 32, 3), np.uint8)
    y = np.arange(n + 1000) % 1000
    examples = Examples(
        x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:],
        classes=tuple(f"class {k}" for k in range(1000)),
    )  # fmt: skip
    study = Study(
        examples=examples,
        recipe=Recipe(model="mlp-8", epochs=1, batch_size=500),
        store=store,
        trials=4,
    )
    study.train(engine="serial")
    opened = study.open_store()
    opened.target = Target(trials=4)
    score(opened)
    table = opened.scores()
    train = np.array([s == "train" for s in table["split"].to_pylist()])
    values = {
        "memorization": rng.uniform(0, 1, len(train)),
        "memorization_low": np.zeros(len(train)),
        "memorization_high": np.ones(len(train)),
        "loss_out": rng.gamma(2, 2, len(train)),
    }
    for name, column in values.items():
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(column, mask=~train))
    from raymem.store.trials import metadata_of

    about = metadata_of(opened.scores(), "scores/examples.parquet")
    opened.write_scores("examples", table, about)
    return study


@pytest.mark.slow
def test_a_thousand_classes_fit_a_page(tmp_path):
    study = thousand_classes(tmp_path / "store")
    write_report(study.store, study.examples)
    page = (tmp_path / "store" / "report.html").read_text()
    assert len(page) < 10e6
    assert page.count("<summary>class ") >= 900
    if CHROMIUM:
        assert in_browser(tmp_path, tmp_path / "store" / "report.html")["rows"] == 200


PROBE = """
<script>
window.addEventListener("load", function () {
  const found = {errors: window.__errors, broken: 0};
  document.querySelectorAll("img").forEach(function (i) { i.loading = "eager"; });
  setTimeout(function () {
    document.querySelectorAll("details").forEach(function (d) { d.open = true; });
    document.querySelectorAll("img").forEach(function (i) {
      if (!(i.complete && i.naturalWidth > 0)) found.broken += 1;
    });
    const cells = function () {
      return Array.from(document.querySelectorAll("#examples tbody tr td:first-child"))
        .map(function (td) { return td.textContent; });
    };
    found.rows = cells().length;
    found.before = cells()[0];
    document.querySelector("#examples th button").click();
    document.querySelector("#examples th button").click();
    found.sorted = cells().slice(0, 3);
    const search = document.getElementById("search");
    search.value = found.before;
    search.dispatchEvent(new Event("input"));
    found.filtered = cells();
    found.wide = document.documentElement.scrollWidth > window.innerWidth;
    document.body.innerHTML = "";
    document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
  }, 1500);
});
</script>
"""
ERRORS = "<script>window.__errors = []; window.onerror = function (m) { window.__errors.push(m); };"


def in_browser(tmp_path, report, width=1200):
    """What a headless browser finds on the page."""
    page = report.read_text().replace("<style>", f"{ERRORS}</script><style>", 1)
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
            "--virtual-time-budget=20000", "--dump-dom", f"file://{probed}",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = html.unescape(re.search("FOUND(.*)END", done.stdout, re.DOTALL)[1])
    return json.loads(found)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_has_nothing_to_complain_of(study, text, tmp_path, width):
    report = tmp_path / "report.html"
    report.write_text(text[0])
    found = in_browser(tmp_path, report, width)
    assert found["errors"] == []
    assert found["broken"] == 0
    assert found["rows"] == 60
    assert found["sorted"] == sorted(study.examples.train_ids)[:3]
    assert found["filtered"] == [found["before"]]
    assert not found["wide"]


# raymem.open


def test_a_notebook_opens_a_store(study):
    opened = raymem.open(study.store, data=study.examples)
    assert opened.scores.num_rows == 90
    assert opened.pairs.num_rows > 0
    assert opened.trials.num_rows == 40
    links = opened.links()
    assert links.verdicts[0].text.startswith("link 1")
    assert repr(links).splitlines() == [str(verdict) for verdict in links.verdicts]
    measures = sum(len(rows) for rows in links.correlations.values())
    assert links._repr_html_().count("<tr>") == measures + 1
    assert (opened.pixels("test-00003") == study.examples.x_test[3]).all()
    assert opened.image("train-7\"'><b>").size == (8, 8)
    assert "40 trials" in repr(opened)
    shown = opened._repr_html_()
    assert EVIL not in shown
    assert shown.count("<tr>") == 11
    assert shown.count('<img src="data:image/png;base64,') == 10
    with pytest.raises(StoreError, match="there is no example 'nobody'"):
        opened.image("nobody")


def test_other_images_are_refused(study):
    e = study.examples
    x = e.x_train.copy()
    x[7] ^= 255
    kept = {
        "y_train": e.y_train, "x_test": e.x_test, "y_test": e.y_test, "classes": e.classes,
        "train_ids": e.train_ids,
    }  # fmt: skip
    others = raymem.open(study.store, data=Examples(x_train=x, **kept))
    assert others.image("train-8\"'><b>").size == (8, 8)
    with pytest.raises(ExamplesError, match="are not those that were scored"):
        others.image("train-7\"'><b>")
    with pytest.raises(ExamplesError, match="does not say where its images are"):
        raymem.open(study.store).image("test-00003")


def test_images_are_found_where_the_study_had_them(tmp_path, digits):
    study = Study(
        examples=raymem.flip_labels(digits, 0.05),
        recipe=Recipe(model="mlp-8", epochs=1),
        store=tmp_path / "store",
        trials=2,
    )
    study.train(engine="serial")
    opened = raymem.open(tmp_path / "store")
    assert (opened.pixels(digits.train_ids[5]) == digits.x_train[5]).all()
    assert opened.data().planted == study.examples.planted
    with pytest.raises(ExamplesError, match="are not those of"):
        raymem.open(tmp_path / "store", data=study_npz(tmp_path, digits)).data()


def study_npz(tmp_path, digits):
    path = tmp_path / "other.npz"
    np.savez(
        path, x_train=digits.x_train[::-1], y_train=digits.y_train[::-1], x_test=digits.x_test,
        y_test=digits.y_test,
    )  # fmt: skip
    return str(path)


# Red lines.


def test_a_sound_run_has_no_red_line(study):
    assert red(diagnostics(Store(study.store))) == []


def test_models_that_do_not_fit_are_red(tmp_path):
    make(tmp_path / "s", recipe=Recipe(model="mlp-2", epochs=1, learning_rate=1e-4), curvature=None)
    names = {finding.name for _, finding in red(diagnostics(Store(tmp_path / "s")))}
    assert "training accuracy (mean over models)" in names
    assert "training accuracy on hard examples" in names
    assert "reliability of memorization" in names


def test_outcomes_of_other_subsets_fail_the_placebo(study, monkeypatch):
    """Outcomes that belong to other trials than they say: what is shuffled then is right."""
    sound = placebo_of(study)
    assert 0.75 < sound.value < 1.25
    original = Store.trial

    def another(self, key, names=None):
        table = original(self, key, names)
        right = original(self, key._replace(trial=(key.trial - 21) % 40), names)["correct"]
        place = table.column_names.index("correct")
        return table.set_column(place, table.schema.field("correct"), right)

    monkeypatch.setattr(Store, "trial", another)
    wrong = placebo_of(study)
    assert wrong.red
    assert wrong.value > 1.5


def placebo_of(study):
    findings = diagnostics(Store(study.store))[math.inf]
    return next(finding for finding in findings if finding.name.startswith("placebo"))


def test_few_trials_are_red(tmp_path):
    make(tmp_path / "s", trials=20, curvature=None)
    names = {finding.name for _, finding in red(diagnostics(Store(tmp_path / "s")))}
    assert names == {"reliability of memorization"}
