"""README and the site: built strictly without the network, held to the code, their examples run."""

from __future__ import annotations

import doctest
import html.parser
import re
import shlex
import sys
import warnings
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import numpy as np
import pytest
from click.testing import CliRunner
from mkdocs.commands.build import build
from mkdocs.config import load_config
from PIL import Image

import raymem
from raymem.cli import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import docstrings  # noqa: E402
import hooks  # noqa: E402
import site_reference  # noqa: E402

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
JOBS = sorted(ROOT.glob("jobs/*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """What a reader would type: the words of each command, parts of a pipe by themselves."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append([])
            for word in shlex.split(line[2:], comments=True):
                if word in ("&&", "|", ">", ";"):
                    found.append([])
                else:
                    found[-1].append(word)
    return [words for words in found if words]


class Page(html.parser.HTMLParser):
    """Anchors, links and whatever else a page loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[k] for k in ("id", "name") if found.get(k)}
        if tag == "a" and found.get("href"):
            self.links.add(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.add(found["href"])
        elif found.get("src"):
            self.loaded.add(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MkDocs's own dependencies; its log is what is strict
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    return folder


def test_every_link_of_the_site_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 25
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and target in pages and link in page.links:
                assert unquote(parts.fragment) in pages[target].anchors | {"__comments"}, link


def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not [x for x in Page(path).loaded if urlsplit(x).netloc], path
        assert "unpkg.com" not in path.read_text()
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", path.read_text()), path


@pytest.mark.parametrize("function", [docstrings.with_fences, hooks.site_path])
def test_examples_in_the_sites_own_code_run(function):
    (test,) = doctest.DocTestFinder().find(function, globs={function.__name__: function})
    tried = doctest.DocTestRunner().run(test)
    assert tried.attempted > 0
    assert tried.failed == 0


def test_formulas_are_drawn_by_the_browser(site):
    text = (site / "concepts" / "memorization.html").read_text()
    assert text.count("<math") > 10
    assert "arithmatex" not in text


def test_every_public_name_is_on_the_site(site):
    anchors = Page(site / "reference" / "python.html").anchors
    names = set(raymem.__all__) - {"__version__"}
    assert {name for name in names if f"raymem.{name}" not in anchors} == set()


def test_every_option_is_on_the_site(site):
    text = (site / "reference" / "command-line.html").read_text()
    shown = set(re.findall(r"--[a-z][a-z-]*", text))
    for command in [*main.commands.values(), *(site_reference.job(path) for path in JOBS)]:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert shown >= {o for o in parameter.opts if o.startswith("--")}, parameter
    for name in (*main.commands, *(path.name for path in JOBS)):
        assert re.search(rf"<h3[^>]*>[^<]*{re.escape(name)}", text), name


def test_the_readme_is_a_landing_page():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    prose = re.sub(r"^```.*?^```", "", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    wide = [x for x in prose.splitlines() if len(x) > 100 and not x.startswith(("|", "!["))]
    assert wide == []
    assert {"make demo", "make test", "make docs"} <= set(re.findall(r"make \w+", " ".join(lines)))


def test_every_command_is_explained_on_a_page():
    written = "".join(page.read_text() for page in PAGES)
    for name in main.commands:
        assert f"raymem {name}" in written, name
    for path in JOBS:
        assert f"jobs/{path.name}" in written, path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in set(targets) - {"clean"}:
        assert f"make {target}" in written, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_on_a_page_is_understood(page):
    """Its options and values are those of the code; the command is not run."""
    for words in commands(page):
        understood(words)


def understood(words: list[str]) -> None:
    if "--" in words and words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    if words[0] == "raymem":
        command, arguments = main.commands[words[1]], words[2:]
    elif words[0] == "python" and words[1].startswith("jobs/"):
        command, arguments = site_reference.job(ROOT / words[1]), words[2:]
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        return
    else:
        return
    if "..." not in arguments:
        command.make_context(words[1], list(arguments))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p.stem != "tutorial"], ids=lambda p: p.stem
)
def test_python_on_a_page_runs(page, tmp_path, monkeypatch):
    """The tutorial's blocks have a test of their own."""
    monkeypatch.chdir(tmp_path)
    for k in range(20):  # a folder of images, as clean-a-data-set.md has one
        folder = tmp_path / "clothes" / ("shirt", "shoe")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 12 * k, np.uint8)).save(folder / f"{k}.png")
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "page"})


def test_commands_that_read_a_store_run(tmp_path, monkeypatch):
    """On a small store in place of the demo's.

    All but those that draw or serve pages, which take long and have tests of their own.
    """
    monkeypatch.chdir(tmp_path)
    examples = raymem.load_examples("digits")
    recipe = raymem.Recipe(model="mlp-8", epochs=1)
    store = "runs/feldman_digits"
    study = raymem.Study(examples=examples, recipe=recipe, store=store, trials=40)
    study.train(engine="serial")
    study.score()
    masks = np.random.default_rng(0).random((40, 30)) < 0.7
    np.savez("fleet.npz", masks=masks, correct_train=masks)
    ran = 0
    for page in ("getting-started", "how-to/import-and-export", "how-to/resume-and-merge"):
        for words in commands(ROOT / "docs" / f"{page}.md"):
            known = any(word in (store, "fleet.npz") for word in words)
            if words[0] == "raymem" and known and words[1] not in ("report", "explore"):
                result = CliRunner().invoke(main, words[1:])
                assert result.exit_code == 0, f"{words}\n{result.output}"
                ran += 1
    assert ran >= 12


def test_the_glossary_is_in_order():
    terms = re.findall(r"^\*\*(.+)\*\*$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 50
    assert terms == sorted(terms, key=str.casefold)
    words = " ".join(terms).casefold()
    for word in (
        "example", "subset", "trial", "fleet", "in, out", "memorization", "influence", "curvature",
        "epsilon", "store", "worker group", "queue", "lease", "heartbeat", "shadow model", "block",
        "cache", "shard", "delta", "accountant", "clip control", "recipe", "plan", "probe", "stage",
    ):  # fmt: skip
        assert word in words, word
