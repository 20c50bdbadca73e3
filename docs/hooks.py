"""What MkDocs does beside rendering docs/*.md: pages made by code, links, and formulas.

Pages are also read where they lie in the repository, so their links are relative to that place.
`site_path` says where each file of the repository is on the site; files that are no pages, such as
cluster.yaml, are copied to source/.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
import site_reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages that lie elsewhere in the repository.
ELSEWHERE = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/RESULTS.md",
    "changelog.md": "CHANGELOG.md",
}
MADE = {
    "reference/command-line.md": site_reference.command_line,
    "reference/python.md": site_reference.python,
}
FILLED = {
    "reference/settings.md": ("<!-- settings -->", site_reference.settings),
    "reference/exit-codes.md": ("<!-- errors -->", site_reference.errors),
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def site_path(file: str) -> str:
    """Where a file of the repository is on the site.

    >>> site_path("docs/privacy.md"), site_path("README.md"), site_path("cluster.yaml")
    ('privacy.md', 'index.md', 'source/cluster.yaml')
    """
    for page, source in ELSEWHERE.items():
        if file == source:
            return page
    if file.startswith("docs/") and not file.endswith(".py"):
        return file.removeprefix("docs/")
    return f"source/{file}"


def links(markdown: str, folder: str) -> Iterator[str]:
    """The files of the repository to which a page in `folder` links."""
    for match in LINK.finditer(CODE.sub("", markdown)):
        if "://" not in match[2]:
            yield posixpath.normpath(posixpath.join(folder, match[2]))


def relinked(markdown: str, source: str, page: str) -> str:
    """Links of a page that lies at `source` in the repository, as they must be on the site."""

    def moved(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = posixpath.relpath(site_path(file), posixpath.dirname(page) or ".")
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    parts = re.split(f"({CODE.pattern})", markdown, flags=CODE.flags)
    return "".join(p if i % 2 else LINK.sub(moved, p) for i, p in enumerate(parts))


def on_files(files: Files, config: Any) -> Files:
    """Adds pages that lie elsewhere or are made by code, and the files that pages link to."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page, make in MADE.items():
        files.append(File.generated(config, page, content=make()))
    linked: set[str] = set()
    for file in files.documentation_pages():
        folder = posixpath.dirname(ELSEWHERE.get(file.src_uri, f"docs/{file.src_uri}"))
        linked.update(links(file.content_string, folder))
    for name in sorted(linked):
        if site_path(name).startswith("source/") and (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            files.append(File.generated(config, site_path(name), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in what is made by code, and turns links to the site."""
    name = page.file.src_uri
    if name in FILLED:
        mark, make = FILLED[name]
        markdown = markdown.replace(mark, make())
    return relinked(markdown, ELSEWHERE.get(name, f"docs/{name}"), name)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[2]).strip(), display=display)

    return FORMULA.sub(drawn, content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The theme's one script from elsewhere is replaced by ours, so that pages need no network."""
    return _without_network(output, posixpath.dirname(page.file.dest_uri) or ".")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same in pages that are no page of ours, such as 404.html."""
    return _without_network(output_content, ".")


def _without_network(output: str, folder: str) -> str:
    ours = posixpath.relpath("search-from-disk.js", folder)
    return output.replace("https://unpkg.com/iframe-worker/shim", ours)
