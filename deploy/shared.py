"""What the checks of cluster files and of RayJobs share."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

Config = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
FILL_IN = "FILL-IN"
# The resource of nodes without GPUs, and of the head, to say that there are such nodes.
CPU_NODE = "raymem_cpu"


def image_problems(image: str, where: str) -> Iterator[str]:
    """Is a container image that of the tested versions? Its tag says Ray's and Python's."""
    found = re.search(r":(?:ray-)?(\d+\.\d+\.\d+)-py(\d)(\d+)(?:-gpu)?$", image)
    if found is None or "ray-ml" in image:
        yield f"{where}: {image} does not tell its versions; take rayproject/ray:VERSION-pyXYZ-gpu"
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = tested_ray()
    ray, python = found[1], f"{found[2]}.{found[3]}"
    if ray != tested:
        yield f"{where}: {image} has Ray {ray}; constraints.txt has {tested}"
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name == "ray" and not requirement.specifier.contains(ray):
            yield f"{where}: {image} has Ray {ray}; pyproject.toml wants {requirement.specifier}"
    if not SpecifierSet(project["requires-python"]).contains(python):
        wanted = project["requires-python"]
        yield f"{where}: {image} has Python {python}; pyproject.toml wants {wanted}"


def cpu_node_problems(
    head: Iterable[str], workers: Mapping[str, Iterable[str]], gpus: Container[str]
) -> Iterator[str]:
    """Do decoding tasks find the nodes that are for them, and no others?

    Takes the resources of the head and of each type of worker, and which of these have GPUs.

    >>> list(cpu_node_problems(["CPU"], {"large": ["CPU", "raymem_cpu"]}, []))
    ['head: `raymem ingest` would start GPU nodes; give it the resource raymem_cpu: 1']
    """
    cpus = [name for name in workers if name not in gpus]
    for name in cpus:
        if CPU_NODE not in workers[name]:
            yield f"{name}: nodes without GPUs want the resource {CPU_NODE}: 1, for ingesting"
    for name in workers:
        if name in gpus and CPU_NODE in workers[name]:
            yield f"{name}: `raymem ingest` would start GPU nodes; take {CPU_NODE} away"
    if cpus and CPU_NODE not in head:
        yield f"head: `raymem ingest` would start GPU nodes; give it the resource {CPU_NODE}: 1"
    if CPU_NODE in head and not cpus:
        yield f"head: `raymem ingest` would wait for ever for {CPU_NODE}; take it away"


def tested_ray() -> str:
    """The version of Ray in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix("ray==") for line in lines if line.startswith("ray=="))


def fill_ins(value: Any, where: str = "") -> list[str]:
    """One line for each text in a file that only its user can fill in.

    >>> fill_ins({"provider": {"project_id": "PROJECT-FILL-IN"}})
    ["provider.project_id: replace 'PROJECT-FILL-IN'"]
    """
    if isinstance(value, dict):
        below = [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        below = [(f"{where}[{i}]", item) for i, item in enumerate(value)]
    else:
        return [f"{where}: replace {value!r}"] if FILL_IN in str(value) else []
    return [line for place, item in below for line in fill_ins(item, place)]
