"""Is a cluster file right, and ready for use?

    python deploy/check_cluster.py cluster.yaml && ray up cluster.yaml

`problems` is what is wrong with a file of `ray up` (AWS or Google Cloud): what Ray itself says, and
what Ray lets through until it costs money. `left_to_do` is what only its user can fill in. The
command prints both, for KubeRay's RayJobs too (deploy/check_rayjob.py), and exits with 0 if there
is neither. Nothing is asked of a network.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

# Run as a script, Python looks for modules in this folder and not in the one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deploy import check_rayjob
from deploy.keys import EC2, GCE, unknown
from deploy.shared import ROOT, Config, cpu_node_problems, fill_ins, image_problems

TOKEN = "/home/ray/.ray/auth_token"
# GB of memory of the machines people take as heads.
HEAD_MEMORY = {
    "m5.large": 8, "m5.xlarge": 16, "m5.2xlarge": 32, "m6i.large": 8, "m6i.xlarge": 16,
    "m6i.2xlarge": 32, "m6i.4xlarge": 64, "m7i.xlarge": 16, "m7i.2xlarge": 32,
    "n1-standard-2": 7.5, "n1-standard-4": 15, "n1-standard-8": 30, "n2-standard-4": 16,
    "n2-standard-8": 32, "e2-standard-4": 16, "e2-standard-8": 32,
}  # fmt: skip
LEAST_HEAD_MEMORY = 32
LEAST_ROOT_DISK = 200


def problems(config: Config, root: Path = ROOT) -> list[str]:
    """What is wrong with a cluster file's contents, one line each; local paths are below `root`."""
    refused = list(_ray(config))
    if refused:
        # Not worth looking further into a file without the parts the other checks expect.
        return refused
    kind = config["provider"].get("type")
    if kind not in ("aws", "gcp"):
        return [f"provider.type: {kind} is not known here; take aws or gcp"]
    checks: list[Callable[[Config], Iterator[str]]] = [
        _provider, _limits, _types, _head, _workers, _cpu_nodes, _authentication, _disks,
        _commands,
    ]  # fmt: skip
    found = [line for check in checks for line in check(config)]
    return [*found, *_mounts(config, root), *_images(config)]


def left_to_do(config: Config) -> list[str]:
    """What the user has yet to fill in or make, one line each."""
    found = fill_ins(config)
    token = Path(config.get("file_mounts", {}).get(TOKEN, "/")).expanduser()
    if not token.exists():
        found.append(f"{token}: there is no token; run `ray get-auth-token --generate`")
    return found


def _ray(config: Config) -> Iterator[str]:
    # Ray takes long to import, and RayJobs do not need it.
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        # Ray warns of every mounted file.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:
        yield f"Ray refuses it: {(str(error) or repr(error)).splitlines()[0]}"


def _is_spot(node: Config) -> bool:
    scheduling = node.get("scheduling") or {}
    settings = scheduling if isinstance(scheduling, list) else [scheduling]
    market = node.get("InstanceMarketOptions") or {}
    return market.get("MarketType") == "spot" or any(
        each.get("preemptible") is True or each.get("provisioningModel") == "SPOT"
        for each in settings
    )


def _provider(config: Config) -> Iterator[str]:
    provider = config["provider"]
    if provider.get("cache_stopped_nodes") is not False:
        yield (
            "provider.cache_stopped_nodes: spot machines cannot be stopped, and stopped ones cost "
            "disk; set it to false"
        )
    zones = [zone.strip() for zone in str(provider.get("availability_zone", "")).split(",")]
    if provider["type"] == "aws":
        if len(zones) < 3:
            yield "provider.availability_zone: name several zones; one often has no spot capacity"
        group = provider.get("security_group", {})
        if not group.get("GroupName"):
            yield "provider.security_group.GroupName: Ray's own opens ssh to the world; name one"
        if re.search(r"0\.0\.0\.0/0|::/0", str(group.get("IpPermissions", ""))):
            yield "provider.security_group.IpPermissions: open to the world; name your addresses"
    elif len(zones) != 1 or not zones[0]:
        yield "provider.availability_zone: Ray on Google Cloud takes exactly one zone"
    for zone in zones:
        if not zone.startswith(str(provider.get("region"))):
            yield f"provider.availability_zone: {zone} is not in {provider.get('region')}"


def _limits(config: Config) -> Iterator[str]:
    if "max_workers" not in config:
        yield "max_workers: Ray would take 2; say how many nodes you want at most"
    if "idle_timeout_minutes" not in config:
        yield "idle_timeout_minutes: say when idle nodes are let go"
    most = config.get("max_workers", 2)
    for name, node_type in config["available_node_types"].items():
        if "max_workers" not in node_type:
            yield f"available_node_types.{name}.max_workers: say it; Ray takes the global one"
        elif node_type["max_workers"] > most:
            yield (
                f"available_node_types.{name}.max_workers: {node_type['max_workers']} is more than "
                f"the global max_workers, {most}"
            )
        if node_type.get("min_workers", 0) > 0:
            yield f"available_node_types.{name}.min_workers: nodes that are never let go; set 0"


def _types(config: Config) -> Iterator[str]:
    aws = config["provider"]["type"] == "aws"
    for name, node_type in config["available_node_types"].items():
        where = f"available_node_types.{name}.node_config"
        node = node_type["node_config"]
        yield from unknown(node, EC2 if aws else GCE, where)
        if aws and not str(node.get("ImageId", "")).startswith("ami-"):
            yield f"{where}.ImageId: Ray would take Ubuntu 18.04; name an image (ami-...)"
        if aws and not node.get("IamInstanceProfile"):
            yield f"{where}.IamInstanceProfile: without one this node cannot read the bucket"
        if not aws:
            yield from _google_disks(node, where, str(config["provider"]["availability_zone"]))
            # Ray gives the head its own account, and workers none.
            if name != config["head_node_type"] and not node.get("serviceAccounts"):
                yield f"{where}.serviceAccounts: without one this node cannot read the bucket"


def _google_disks(node: Config, where: str, zone: str) -> Iterator[str]:
    disks = node.get("disks") or []
    if not any(d.get("initializeParams", {}).get("sourceImage") for d in disks if d.get("boot")):
        yield f"{where}.disks: no boot disk with a sourceImage"
    for i, disk in enumerate(disks):
        kind = disk.get("initializeParams", {}).get("diskType", "")
        if not kind.startswith(f"zones/{zone}/diskTypes/"):
            yield f"{where}.disks[{i}]: diskType must be zones/{zone}/diskTypes/..., is {kind!r}"


def _head(config: Config) -> Iterator[str]:
    name = config["head_node_type"]
    head = config["available_node_types"][name]
    where = f"available_node_types.{name}"
    if head.get("resources", {}).get("CPU") != 0:
        yield f"{where}.resources: trials would run on the head; say CPU: 0"
    if head.get("max_workers") != 0:
        yield f"{where}.max_workers: workers of the head's type are not wanted; set 0"
    node = head["node_config"]
    if _is_spot(node):
        yield f"{where}.node_config: the head must not be spot; its loss ends the job"
    machine = node.get("InstanceType") or node.get("machineType")
    if HEAD_MEMORY.get(machine, LEAST_HEAD_MEMORY) < LEAST_HEAD_MEMORY:
        yield f"{where}.node_config: {machine} has less than {LEAST_HEAD_MEMORY} GB; take a larger"


def _workers(config: Config) -> Iterator[str]:
    common = config.get("docker", {})
    for name, node_type in config["available_node_types"].items():
        if name == config["head_node_type"]:
            continue
        where = f"available_node_types.{name}"
        node, docker = node_type["node_config"], node_type.get("docker", {})
        if not _is_spot(node):
            yield f"{where}.node_config: not spot; it costs about twice to three times as much"
        if not node_type["resources"].get("CPU"):
            yield f"{where}.resources: say how many CPUs it has"
        if not node_type["resources"].get("GPU"):
            continue
        options = common.get("worker_run_options", []) + docker.get("worker_run_options", [])
        if "--gpus all" not in options:
            yield f"{where}.docker.worker_run_options: --gpus all is missing; no GPU inside"
        if not str(docker.get("worker_image", common.get("worker_image", ""))).endswith("-gpu"):
            yield f"{where}.docker.worker_image: a node with GPUs wants an image that ends in -gpu"
        if "machineType" in node and "TERMINATE" not in str(node.get("scheduling")):
            yield f"{where}.node_config.scheduling: GPU machines want onHostMaintenance: TERMINATE"


def _cpu_nodes(config: Config) -> Iterator[str]:
    types = config["available_node_types"]
    resources = {name: node_type.get("resources", {}) for name, node_type in types.items()}
    head = resources.pop(config["head_node_type"])
    yield from cpu_node_problems(head, resources, [n for n, r in resources.items() if r.get("GPU")])


def _authentication(config: Config) -> Iterator[str]:
    if "-e RAY_AUTH_MODE=token" not in config.get("docker", {}).get("run_options", []):
        yield "docker.run_options: anyone in reach could run code; add -e RAY_AUTH_MODE=token"
    if TOKEN not in config.get("file_mounts", {}):
        yield f"file_mounts: no node has a token; mount yours as {TOKEN}"


def _disks(config: Config) -> Iterator[str]:
    options = config.get("docker", {}).get("run_options", [])
    wanted = ["-e RAYMEM_CACHE_DIR=/mnt/nvme/cache", "-v /mnt/nvme:/mnt/nvme"]
    for option in [*wanted, "-v /mnt/nvme/ray:/tmp/ray"]:
        if option not in options:
            yield f"docker.run_options: {option} is missing; the root disk would be used"
    made = "\n".join(config.get("initialization_commands", []))
    if "mkfs" not in made or "/mnt/nvme/ray /mnt/nvme/cache" not in made:
        yield "initialization_commands: nothing makes /mnt/nvme with its folders ray and cache"
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        disks = (node.get("BlockDeviceMappings") or []) + (node.get("disks") or [])
        settings = [disk.get("Ebs") or disk.get("initializeParams") or {} for disk in disks]
        sizes = [each.get("VolumeSize") or each.get("diskSizeGb") or 0 for each in settings]
        if max(sizes, default=0) < LEAST_ROOT_DISK:
            where = f"available_node_types.{name}.node_config"
            yield f"{where}: the root disk is too small; give it {LEAST_ROOT_DISK} GB"


def _commands(config: Config) -> Iterator[str]:
    head = " ".join(config.get("head_start_ray_commands", []))
    worker = " ".join(config.get("worker_start_ray_commands", []))
    if not re.search(r"--dashboard-host[= ]127\.0\.0\.1(\s|$)", head):
        yield "head_start_ray_commands: the dashboard is open; say --dashboard-host=127.0.0.1"
    if "--autoscaling-config=" not in head:
        yield "head_start_ray_commands: without --autoscaling-config no worker is ever started"
    for name, said in (("head", head), ("worker", worker)):
        if "ulimit -n 65536" not in said:
            yield f"{name}_start_ray_commands: ulimit -n 65536 is missing; large fleets run out"
        if "--metrics-export-port=" not in said:
            yield f"{name}_start_ray_commands: no --metrics-export-port; metrics are hard to find"
    if "constraints.txt" not in " ".join(config.get("setup_commands", [])):
        yield "setup_commands: nothing installs the project with -c constraints.txt"
    if "head_setup_commands" not in config:
        yield "head_setup_commands: Ray's default replaces packages just installed; say []"
    for name, value in config.items():
        if name.endswith("_commands"):
            for i, command in enumerate(value):
                read = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
                if read.returncode:
                    yield f"{name}[{i}]: not shell: {read.stderr.strip()}"


def _mounts(config: Config, root: Path) -> Iterator[str]:
    mounts = config.get("file_mounts", {})
    for remote, local in mounts.items():
        path = root / Path(local).expanduser()
        if remote != TOKEN and not path.exists():
            yield f"file_mounts.{remote}: there is no {local} here"
        if path.resolve() == root.resolve():
            yield f"file_mounts.{remote}: all of this folder, data and .venv too; mount its parts"


def _images(config: Config) -> Iterator[str]:
    common = config.get("docker", {})
    found = {f"docker.{key}": image for key, image in common.items() if key.endswith("image")}
    if "docker.image" not in found and "docker.head_image" not in found:
        yield "docker: no image; the machine's own Python has no Ray"
    for name, node_type in config["available_node_types"].items():
        if "worker_image" in node_type.get("docker", {}):
            where = f"available_node_types.{name}.docker.worker_image"
            found[where] = node_type["docker"]["worker_image"]
    for where, image in found.items():
        yield from image_problems(image, where)


def main(paths: list[str]) -> int:
    """Print what is wrong and what is left to do in the files at `paths`; 0 if nothing is."""
    if not paths:
        print("usage: python deploy/check_cluster.py FILE...", file=sys.stderr)
        return 2
    ready = True
    for path in paths:
        config = yaml.safe_load(Path(path).read_text())
        if config.get("kind") == "RayJob":
            wrong, to_do = check_rayjob.problems(config), fill_ins(config)
        else:
            wrong, to_do = problems(config, Path(path).resolve().parent), left_to_do(config)
        for line in wrong:
            print(f"{path}: wrong: {line}")
        for line in to_do:
            print(f"{path}: to do: {line}")
        if not wrong and not to_do:
            print(f"{path}: ready")
        ready = ready and not wrong and not to_do
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
