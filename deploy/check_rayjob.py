"""Is a RayJob of KubeRay right? Its parts must agree with each other and with the tested versions.

There is no schema of KubeRay's resources to ask offline; deploy/keys.py has their keys. Run by
deploy/check_cluster.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from deploy.keys import RAYJOB, unknown
from deploy.shared import Config, cpu_node_problems, image_problems, tested_ray

GPU = "nvidia.com/gpu"
LEAST_HEAD_MEMORY = 32
GIBI = {"Mi": 1 / 1024, "Gi": 1, "Ti": 1024}
# How clouds label their spot machines; a head must not ask for one, a worker must.
SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def problems(config: Config) -> list[str]:
    """What is wrong with a RayJob, one line each."""
    found = list(unknown(config, RAYJOB, "RayJob"))
    try:
        spec = config["spec"]
        cluster = spec["rayClusterSpec"]
        head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        containers = [g["template"]["spec"]["containers"][0] for g in (head, *workers)]
    except (KeyError, IndexError, TypeError) as error:
        return [*found, f"spec: {error} is missing"]
    found += _job(config, spec)
    found += _cluster(cluster, containers)
    found += _head(head, "headGroupSpec")
    for i, group in enumerate(workers):
        found += _workers(group, f"workerGroupSpecs[{i}]")
    found += _cpu_nodes(head, workers)
    return found


def _job(config: Config, spec: Config) -> Iterator[str]:
    if config.get("apiVersion") != "ray.io/v1" or config.get("kind") != "RayJob":
        yield "apiVersion, kind: must be ray.io/v1, RayJob"
    if not config.get("metadata", {}).get("name"):
        yield "metadata.name: missing"
    if not str(spec.get("entrypoint", "")).strip():
        yield "spec.entrypoint: missing"
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield "spec.shutdownAfterJobFinishes: the cluster would stay, and cost; say true"
    if not spec.get("ttlSecondsAfterFinished", 0) > 0:
        yield "spec.ttlSecondsAfterFinished: leave some minutes to read the logs"
    if not spec.get("backoffLimit", 0) > 0:
        yield "spec.backoffLimit: a lost head would end the study; jobs resume, so say 1 or more"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"):
        yield f"spec.submissionMode: there is no {mode}"


def _cluster(cluster: Config, containers: list[Config]) -> Iterator[str]:
    where = "rayClusterSpec"
    if cluster.get("rayVersion") != tested_ray():
        yield (
            f"{where}.rayVersion: {cluster.get('rayVersion')}; constraints.txt has {tested_ray()}"
        )
    images = {container.get("image", "") for container in containers}
    if len(images) > 1:
        yield f"{where}: head and workers have different images: {', '.join(sorted(images))}"
    for image in sorted(images):
        yield from image_problems(image, f"{where}: image")
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield f"{where}.authOptions.mode: anyone in reach could run code; say token"
    if cluster.get("enableInTreeAutoscaling") is not True:
        yield f"{where}.enableInTreeAutoscaling: nodes would neither come nor go; say true"


def _head(head: Config, where: str) -> Iterator[str]:
    pod = head["template"]["spec"]
    limits = pod["containers"][0].get("resources", {}).get("limits", {})
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield f'{where}.rayStartParams: trials would run on the head; say num-cpus: "0"'
    if _gibibytes(limits.get("memory")) < LEAST_HEAD_MEMORY:
        yield f"{where}: the head wants {LEAST_HEAD_MEMORY}Gi of memory as its limit"
    if GPU in limits:
        yield f"{where}: a GPU that nobody uses"
    if _wants_spot(pod) or any(t.get("key") in SPOT_LABELS for t in pod.get("tolerations", [])):
        yield f"{where}: the head must not be on a spot node; its loss ends the job"
    yield from _pod(pod, where)


def _workers(group: Config, where: str) -> Iterator[str]:
    pod = group["template"]["spec"]
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if least != 0 or not isinstance(most, int) or not 0 <= group.get("replicas", 0) <= most:
        yield f"{where}: wants minReplicas 0 and 0 <= replicas <= maxReplicas"
    limits = _limits(group)
    params = group.get("rayStartParams", {})
    for param, resource in (("num-cpus", "cpu"), ("num-gpus", GPU)):
        if params.get(param, "None") != str(limits.get(resource)):
            yield (
                f"{where}: rayStartParams.{param} is {params.get(param)}, the limit of {resource} "
                f"{limits.get(resource)}; Ray would count wrong"
            )
    if not _wants_spot(pod):
        yield f"{where}: nodeSelector asks for no spot node"
    keys = {t.get("key") for t in pod.get("tolerations", [])}
    if GPU in limits and GPU not in keys:
        yield f"{where}: GPU nodes turn away pods that do not tolerate {GPU}"
    for label in set(pod.get("nodeSelector", {})) & set(SPOT_LABELS):
        if label.startswith("cloud.google.com") and label not in keys:
            yield f"{where}: spot nodes turn away pods that do not tolerate {label}"
    yield from _pod(pod, where)


def _cpu_nodes(head: Config, workers: list[Config]) -> Iterator[str]:
    groups = {str(group.get("groupName")): _custom(group) for group in workers}
    gpus = [str(group.get("groupName")) for group in workers if GPU in _limits(group)]
    yield from cpu_node_problems(_custom(head), groups, gpus)


def _custom(group: Config) -> list[str]:
    """The custom resources of a group: JSON, in quotes, in the form that KubeRay wants."""
    text = group.get("rayStartParams", {}).get("resources", "")
    return re.findall(r'\\"(\w+)\\":', text) if text[:1] == text[-1:] == '"' else []


def _limits(group: Config) -> Config:
    limits: Config = (
        group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    )
    return limits


def _pod(pod: Config, where: str) -> Iterator[str]:
    container = pod["containers"][0]
    resources = container.get("resources", {})
    if resources.get("limits") != resources.get("requests"):
        yield f"{where}: Ray counts limits, nodes are chosen by requests; make them equal"
    if pod.get("restartPolicy") != "Never":
        yield f"{where}: a restarted pod is another Ray node under the same name; say Never"
    volumes = {volume.get("name") for volume in pod.get("volumes", [])}
    mounts = container.get("volumeMounts", [])
    for mount in mounts:
        if mount.get("name") not in volumes:
            yield f"{where}: there is no volume {mount.get('name')}"
    cache = {e.get("name"): e.get("value") for e in container.get("env", [])}.get(
        "RAYMEM_CACHE_DIR"
    )
    paths = [str(mount.get("mountPath")) for mount in mounts]
    if not cache or not any(cache.startswith(f"{path}/") for path in paths):
        yield f"{where}: RAYMEM_CACHE_DIR is not on a volume of its own"


def _wants_spot(pod: Config) -> bool:
    wanted = pod.get("nodeSelector", {})
    return any(str(wanted.get(label)) == value for label, value in SPOT_LABELS.items())


def _gibibytes(memory: Any) -> float:
    found = re.fullmatch(r"(\d+)(Mi|Gi|Ti)", str(memory))
    return float(found[1]) * GIBI[found[2]] if found else 0.0
