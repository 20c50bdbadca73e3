"""Files for clusters: what Ray says of them, what Ray lets through, and what a job uploads."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
check_cluster = importlib.import_module("deploy.check_cluster")
check_rayjob = importlib.import_module("deploy.check_rayjob")
keys = importlib.import_module("deploy.keys")
shared = importlib.import_module("deploy.shared")
cluster = importlib.import_module("raymem.fleet.cluster")

AWS = yaml.safe_load((ROOT / "cluster.yaml").read_text())
GCP = yaml.safe_load((ROOT / "cluster-gcp.yaml").read_text())
RAYJOB = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
DELETE = object()


def changed(config, path, value):
    """A copy of `config` with another value at `path`, such as "a.b.0"; DELETE takes it away."""
    config = copy.deepcopy(config)
    *above, last = path.split(".")
    place = config
    for part in above:
        place = place[int(part) if isinstance(place, list) else part]
    if isinstance(place, list):
        last = int(last)
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return config


def renamed(config, path, name):
    """A copy of `config` in which the key at `path` is called `name`."""
    above = path.split(".")[:-1]
    value = config
    for part in path.split("."):
        value = value[int(part) if isinstance(value, list) else part]
    return changed(changed(config, path, DELETE), ".".join([*above, name]), value)


@pytest.mark.parametrize("config", [AWS, GCP], ids=["aws", "gcp"])
def test_nothing_is_wrong_with_the_files_that_ship(config):
    assert check_cluster.problems(config) == []


def test_what_is_left_to_the_user_is_said():
    left = check_cluster.left_to_do(AWS)
    assert [line for line in left if "ami-FILL-IN" in line] == [
        f"available_node_types.{name}.node_config.ImageId: replace 'ami-FILL-IN'"
        for name in ("head", "gpu_spot", "cpu_spot")
    ]
    assert any("provider.project_id" in line for line in check_cluster.left_to_do(GCP))


def test_a_file_is_ready_once_it_is_filled_in(tmp_path, capsys):
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "raymem"):
        (tmp_path / name).touch()
    (tmp_path / "token").write_text("token")
    text = (ROOT / "cluster.yaml").read_text()
    path = tmp_path / "cluster.yaml"
    path.write_text(text.replace("ami-FILL-IN", "ami-0123456789abcdef0"))
    path.write_text(path.read_text().replace("~/.ray/auth_token", str(tmp_path / "token")))
    assert check_cluster.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: ready\n"
    path.write_text(path.read_text().replace("InstanceMarketOptions", "InstanceMarketOption"))
    assert check_cluster.main([str(path)]) == 1
    assert "wrong: available_node_types.gpu_spot" in capsys.readouterr().out
    assert check_cluster.main([]) == 2


GPU = "available_node_types.gpu_spot"
HEAD = "available_node_types.head"
IMAGE = "rayproject/ray:{}-gpu"
MUTATIONS = {
    # What Ray's own schema refuses.
    "unknown key": (renamed(AWS, "max_workers", "max_wokers"), "Ray refuses it"),
    "unknown key of a type": (changed(AWS, f"{GPU}.spot", True), "Ray refuses it"),
    "text as a resource": (changed(AWS, f"{GPU}.resources.GPU", "1"), "Ray refuses it"),
    "no head type": (changed(AWS, "head_node_type", "heads"), "Ray refuses it"),
    "more than the most": (changed(AWS, f"{GPU}.min_workers", 40), "Ray refuses it"),
    "unknown docker key": (changed(AWS, "docker.images", "x"), "Ray refuses it"),
    # What it lets through.
    "market typo": (
        renamed(AWS, f"{GPU}.node_config.InstanceMarketOptions", "InstanceMarketOption"),
        "InstanceMarketOption: there is no such key; did you mean InstanceMarketOptions?",
    ),
    "typo within": (
        renamed(AWS, f"{GPU}.node_config.BlockDeviceMappings.0.Ebs.VolumeSize", "Size"),
        "BlockDeviceMappings[0].Ebs.Size: there is no such key",
    ),
    "typo on google": (
        renamed(GCP, f"{GPU}.node_config.machineType", "machinetype"),
        "machinetype: there is no such key; did you mean machineType?",
    ),
    "typo within on google": (
        renamed(GCP, f"{GPU}.node_config.scheduling.provisioningModel", "provisionModel"),
        "scheduling.provisionModel: there is no such key",
    ),
    "other cloud": (changed(AWS, "provider.type", "azure"), "provider.type: azure"),
    "no global most": (changed(AWS, "max_workers", DELETE), "max_workers: Ray would take 2"),
    "no most of a type": (changed(AWS, f"{GPU}.max_workers", DELETE), "gpu_spot.max_workers: say"),
    "most of a type": (changed(AWS, f"{GPU}.max_workers", 99), "99 is more than the global"),
    "never idle": (changed(AWS, f"{GPU}.min_workers", 1), "never let go"),
    "no idle timeout": (changed(AWS, "idle_timeout_minutes", DELETE), "idle_timeout_minutes"),
    "trials on the head": (changed(AWS, f"{HEAD}.resources.CPU", 8), "say CPU: 0"),
    "trials on the head by default": (changed(AWS, f"{HEAD}.resources", {}), "say CPU: 0"),
    "small head": (changed(AWS, f"{HEAD}.node_config.InstanceType", "m5.large"), "less than 32"),
    "small google head": (
        changed(GCP, f"{HEAD}.node_config.machineType", "n2-standard-4"), "less than 32",
    ),
    "spot head": (
        changed(AWS, f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}),
        "head must not be spot",
    ),
    "preemptible head": (
        changed(GCP, f"{HEAD}.node_config.scheduling", [{"preemptible": True}]),
        "head must not be spot",
    ),
    "workers of the head's type": (changed(AWS, f"{HEAD}.max_workers", 2), "not wanted; set 0"),
    "workers on demand": (
        changed(AWS, f"{GPU}.node_config.InstanceMarketOptions", DELETE), "not spot",
    ),
    "google workers on demand": (
        changed(GCP, f"{GPU}.node_config.scheduling.provisioningModel", "STANDARD"), "not spot",
    ),
    "GPU machine that would move": (
        changed(GCP, f"{GPU}.node_config.scheduling.onHostMaintenance", "MIGRATE"), "TERMINATE",
    ),
    "no GPU inside": (changed(AWS, f"{GPU}.docker.worker_run_options", []), "--gpus all"),
    "image without CUDA": (
        changed(AWS, f"{GPU}.docker.worker_image", "rayproject/ray:2.60.0-py311"), "ends in -gpu",
    ),
    "no room for ingesting": (
        changed(AWS, "available_node_types.cpu_spot.resources", {"CPU": 16}),
        "cpu_spot: nodes without GPUs want the resource raymem_cpu",
    ),
    "ingesting on GPU nodes": (
        changed(GCP, f"{GPU}.resources.raymem_cpu", 1), "gpu_spot: `raymem ingest` would start GPU",
    ),
    "nodes for ingesting nobody knows of": (
        changed(GCP, f"{HEAD}.resources", {"CPU": 0}), "head: `raymem ingest` would start GPU",
    ),
    "no nodes for ingesting": (
        changed(AWS, "available_node_types.cpu_spot", DELETE), "would wait for ever",
    ),
    "no CPUs": (changed(AWS, f"{GPU}.resources.CPU", DELETE), "how many CPUs"),
    "stopped nodes kept": (changed(AWS, "provider.cache_stopped_nodes", True), "set it to false"),
    "stopped nodes by default": (
        changed(GCP, "provider.cache_stopped_nodes", DELETE), "set it to false",
    ),
    "one zone": (changed(AWS, "provider.availability_zone", "us-west-2a"), "several zones"),
    "zone of another region": (
        changed(AWS, "provider.availability_zone", "us-west-2a,us-west-2b,us-east-1a"),
        "us-east-1a is not in us-west-2",
    ),
    "two zones on google": (
        changed(GCP, "provider.availability_zone", "us-central1-a,us-central1-b"), "exactly one",
    ),
    "disk in another zone": (
        changed(GCP, "provider.availability_zone", "us-central1-b"), "us-central1-b/diskTypes",
    ),
    "no security group": (changed(AWS, "provider.security_group", DELETE), "ssh to the world"),
    "open to the world": (
        changed(
            AWS, "provider.security_group.IpPermissions",
            [{"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}],
        ),
        "open to the world",
    ),
    "no image": (changed(AWS, f"{HEAD}.node_config.ImageId", DELETE), "Ubuntu 18.04"),
    "no rights": (changed(AWS, f"{GPU}.node_config.IamInstanceProfile", DELETE), "the bucket"),
    "no google rights": (changed(GCP, f"{GPU}.node_config.serviceAccounts", DELETE), "the bucket"),
    "small disk": (
        changed(AWS, f"{GPU}.node_config.BlockDeviceMappings.0.Ebs.VolumeSize", 50), "too small",
    ),
    "no disk": (changed(GCP, f"{HEAD}.node_config.disks", []), "too small"),
    "no boot image": (
        changed(GCP, f"{HEAD}.node_config.disks.0.initializeParams.sourceImage", DELETE),
        "no boot disk with a sourceImage",
    ),
    "nobody makes the disk": (changed(AWS, "initialization_commands", []), "nothing makes"),
    "cache elsewhere": (
        changed(AWS, "docker.run_options.2", "-e RAYMEM_CACHE_DIR=/tmp/cache"), "RAYMEM_CACHE_DIR",
    ),
    "Ray's folder elsewhere": (changed(AWS, "docker.run_options.4", DELETE), "/tmp/ray is missing"),
    "no authentication": (changed(AWS, "docker.run_options.1", DELETE), "RAY_AUTH_MODE=token"),
    "no token": (
        changed(AWS, "file_mounts", {"/home/ray/raymem/raymem": "raymem"}), "no node has a token",
    ),
    "missing file": (
        changed(AWS, "file_mounts", {**AWS["file_mounts"], "/x": "nowhere"}), "no nowhere here",
    ),
    "everything mounted": (
        changed(AWS, "file_mounts", {**AWS["file_mounts"], "/x": "."}), "all of this folder",
    ),
    "ray-ml": (changed(AWS, "docker.head_image", "rayproject/ray-ml:2.60.0-py311"), "ray-ml"),
    "latest": (changed(AWS, "docker.head_image", "rayproject/ray:latest"), "tell its versions"),
    "another Ray": (
        changed(AWS, f"{GPU}.docker.worker_image", IMAGE.format("2.59.0-py311")),
        "has Ray 2.59.0; constraints.txt has",
    ),
    "a Ray out of range": (
        changed(AWS, f"{GPU}.docker.worker_image", IMAGE.format("2.62.0-py311")),
        "pyproject.toml wants",
    ),
    "an old Python": (
        changed(AWS, f"{GPU}.docker.worker_image", IMAGE.format("2.60.0-py310")), "has Python 3.10",
    ),
    "no container": (changed(AWS, "docker", DELETE), "no image"),
    "open dashboard": (
        changed(AWS, "head_start_ray_commands.1",
                AWS["head_start_ray_commands"][1].replace("127.0.0.1", "0.0.0.0")),
        "the dashboard is open",
    ),
    "no autoscaling": (
        changed(AWS, "head_start_ray_commands.1",
                AWS["head_start_ray_commands"][1].replace("--autoscaling-config", "--config")),
        "no worker is ever started",
    ),
    "few files": (
        changed(GCP, "worker_start_ray_commands.1",
                GCP["worker_start_ray_commands"][1].replace("ulimit -n 65536; ", "")),
        "ulimit -n 65536 is missing",
    ),
    "no metrics": (
        changed(GCP, "worker_start_ray_commands.1",
                GCP["worker_start_ray_commands"][1].replace("--metrics-export-port=8080", "")),
        "metrics are hard to find",
    ),
    "unpinned": (changed(AWS, "setup_commands.0", "pip install raymem"), "-c constraints.txt"),
    "Ray's own head setup": (changed(AWS, "head_setup_commands", DELETE), "say []"),
    "not shell": (changed(AWS, "setup_commands.0", "pip -c constraints.txt ("), "not shell"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_wrong_is_found(name):
    config, expected = MUTATIONS[name]
    found = check_cluster.problems(config)
    assert any(expected in line for line in found), found


def test_keys_of_ec2_are_those_of_botocore():
    """The tree in deploy/keys.py knows no key that EC2 does not, and what ships is valid to it."""
    session = pytest.importorskip("botocore.session").get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape

    def compare(tree, shape, where):
        shape = shape.member if shape.type_name == "list" else shape
        for key, below in tree.items():
            if (where, key) != ("RunInstances", "SubnetIds"):
                assert key in shape.members, f"{where}.{key}"
                if below is not None:
                    compare(below, shape.members[key], f"{where}.{key}")

    compare(keys.EC2, shape, "RunInstances")
    validator = importlib.import_module("botocore.validate").ParamValidator()
    for name, node_type in AWS["available_node_types"].items():
        node = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
        assert validator.validate(node, shape).generate_report() == "", name


WORKER = "spec.rayClusterSpec.workerGroupSpecs.0"
CPU_WORKER = "spec.rayClusterSpec.workerGroupSpecs.1"
HEAD_GROUP = "spec.rayClusterSpec.headGroupSpec"
CONTAINER = "template.spec.containers.0"
JOB_MUTATIONS = {
    "typo": (renamed(RAYJOB, "spec.backoffLimit", "backofLimit"), "did you mean backoffLimit?"),
    "typo in the cluster": (
        renamed(RAYJOB, f"{WORKER}.maxReplicas", "maxReplica"), "did you mean maxReplicas?",
    ),
    "no cluster": (changed(RAYJOB, "spec.rayClusterSpec", DELETE), "is missing"),
    "other kind": (changed(RAYJOB, "apiVersion", "ray.io/v1alpha1"), "must be ray.io/v1"),
    "no name": (changed(RAYJOB, "metadata", {}), "metadata.name"),
    "nothing to run": (changed(RAYJOB, "spec.entrypoint", " "), "spec.entrypoint"),
    "stays": (changed(RAYJOB, "spec.shutdownAfterJobFinishes", DELETE), "would stay"),
    "no time to read": (changed(RAYJOB, "spec.ttlSecondsAfterFinished", 0), "read the logs"),
    "no retry": (changed(RAYJOB, "spec.backoffLimit", 0), "jobs resume"),
    "mode": (changed(RAYJOB, "spec.submissionMode", "JobMode"), "there is no JobMode"),
    "version": (
        changed(RAYJOB, "spec.rayClusterSpec.rayVersion", "2.58.0"), "2.58.0; constraints.txt has",
    ),
    "head's image": (
        changed(RAYJOB, f"{HEAD_GROUP}.{CONTAINER}.image", "rayproject/ray:2.58.0-py311-gpu"),
        "different images",
    ),
    "no authentication": (
        changed(RAYJOB, "spec.rayClusterSpec.authOptions.mode", "disabled"), "say token",
    ),
    "no autoscaling": (
        changed(RAYJOB, "spec.rayClusterSpec.enableInTreeAutoscaling", False), "come nor go",
    ),
    "trials on the head": (
        changed(RAYJOB, f"{HEAD_GROUP}.rayStartParams", {}), 'say num-cpus: "0"',
    ),
    "small head": (
        changed(RAYJOB, f"{HEAD_GROUP}.{CONTAINER}.resources.limits.memory", "8Gi"), "wants 32Gi",
    ),
    "head on spot": (
        changed(RAYJOB, f"{HEAD_GROUP}.template.spec.nodeSelector",
                {"cloud.google.com/gke-spot": "true"}),
        "must not be on a spot node",
    ),
    "head bears spot": (
        changed(RAYJOB, f"{HEAD_GROUP}.template.spec.tolerations",
                [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]),
        "must not be on a spot node",
    ),
    "GPUs": (changed(RAYJOB, f"{WORKER}.rayStartParams.num-gpus", "2"), "num-gpus is 2"),
    "CPUs": (changed(RAYJOB, f"{WORKER}.rayStartParams.num-cpus", "8"), "num-cpus is 8"),
    "always there": (changed(RAYJOB, f"{WORKER}.minReplicas", 1), "minReplicas 0"),
    "more than the most": (changed(RAYJOB, f"{WORKER}.replicas", 64), "minReplicas 0"),
    "on demand": (
        changed(RAYJOB, f"{WORKER}.template.spec.nodeSelector",
                {"cloud.google.com/gke-accelerator": "nvidia-l4"}),
        "no spot node",
    ),
    "turned away": (changed(RAYJOB, f"{WORKER}.template.spec.tolerations", []), "nvidia.com/gpu"),
    "turned away by spot": (
        changed(RAYJOB, f"{WORKER}.template.spec.tolerations.0", DELETE), "do not tolerate cloud",
    ),
    "no room for ingesting": (
        changed(RAYJOB, f"{CPU_WORKER}.rayStartParams.resources", DELETE),
        "cpu-spot: nodes without GPUs want the resource raymem_cpu",
    ),
    "unreadable resources": (
        changed(RAYJOB, f"{CPU_WORKER}.rayStartParams.resources", '{"raymem_cpu": 1}'),
        "cpu-spot: nodes without GPUs want the resource raymem_cpu",
    ),
    "nodes for ingesting nobody knows of": (
        changed(RAYJOB, f"{HEAD_GROUP}.rayStartParams.resources", DELETE),
        "head: `raymem ingest` would start GPU",
    ),
    "no nodes for ingesting": (changed(RAYJOB, CPU_WORKER, DELETE), "would wait for ever"),
    "requests": (
        changed(RAYJOB, f"{WORKER}.{CONTAINER}.resources.requests.cpu", "2"), "make them equal",
    ),
    "restarts": (changed(RAYJOB, f"{WORKER}.template.spec.restartPolicy", "Always"), "say Never"),
    "no volume": (changed(RAYJOB, f"{WORKER}.template.spec.volumes", []), "no volume scratch"),
    "cache elsewhere": (
        changed(RAYJOB, f"{WORKER}.{CONTAINER}.env.0.value", "/home/ray/cache"), "RAYMEM_CACHE_DIR",
    ),
}  # fmt: skip


def test_nothing_is_wrong_with_the_job_that_ships():
    assert check_rayjob.problems(RAYJOB) == []
    assert len(shared.fill_ins(RAYJOB)) == 1


@pytest.mark.parametrize("name", JOB_MUTATIONS)
def test_what_is_wrong_with_a_job_is_found(name):
    config, expected = JOB_MUTATIONS[name]
    found = check_rayjob.problems(config)
    assert any(expected in line for line in found), found


def test_ingesting_asks_for_the_resource_of_the_files():
    assert cluster.CPU_NODE == shared.CPU_NODE


def test_the_image_is_built_from_the_tested_versions():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    base = re.search(r"^FROM (\S+)$", text, re.MULTILINE)[1]
    assert list(shared.image_problems(base, "Dockerfile")) == []
    group = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert f"-t {group['template']['spec']['containers'][0]['image']} ." in text
    for source in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


FAKES = """
sudo() { echo "$@"; }
sleep() { :; }
lsblk() { printf '%s\\n' "$LSBLK"; }
ls() { [ -n "$LOCAL_SSD" ] && echo "$LOCAL_SSD"; }
mountpoint() { case " $MOUNTED " in *" $2 "*) return 0;; *) return 1;; esac; }
"""
ROOT_DISK = "/dev/nvme0n1 Amazon Elastic Block Store"
LOCAL = "/dev/nvme1n1 Amazon EC2 NVMe Instance Storage"
FOLDERS = "install -d -m 1777 /mnt/nvme /mnt/nvme/ray /mnt/nvme/cache"


@pytest.mark.parametrize(
    ("config", "disks", "mounted", "done"),
    [
        (AWS, f"{ROOT_DISK}\n{LOCAL}", "", [
            "mkfs.ext4 -q -F /dev/nvme1n1", "mount -o noatime /dev/nvme1n1 /mnt/nvme",
        ]),
        (AWS, f"{ROOT_DISK}\n{LOCAL}", "/opt/dlami/nvme", [
            "mount --bind /opt/dlami/nvme /mnt/nvme",
        ]),
        (AWS, f"{ROOT_DISK}\n{LOCAL}", "/mnt/nvme", []),
        (AWS, ROOT_DISK, "", []),
        (GCP, "/dev/disk/by-id/google-local-nvme-ssd-0", "", [
            "mkfs.ext4 -q -F /dev/disk/by-id/google-local-nvme-ssd-0",
            "mount -o noatime /dev/disk/by-id/google-local-nvme-ssd-0 /mnt/nvme",
        ]),
        (GCP, "", "", []),
    ],
    ids=["aws", "mounted by the image", "again", "no local disk", "google", "no google disk"],
)  # fmt: skip
def test_the_local_disk_becomes_the_cache(config, disks, mounted, done):
    """The script of the cluster files, with commands that only say what they would do."""
    script = config["initialization_commands"][0]
    ran = subprocess.run(
        ["bash", "-c", FAKES + script],
        env={"PATH": "/usr/bin:/bin", "LSBLK": disks, "LOCAL_SSD": disks, "MOUNTED": mounted},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.splitlines() == ["install -d -m 1777 /mnt/nvme", *done, FOLDERS]
    assert ran.stderr == ""


@pytest.fixture
def checkout(tmp_path):
    """The project as it lies on a user's disk, with what gathers there."""
    folder = tmp_path / "checkout"
    caches = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("raymem", "jobs", "docs", "tests", "benchmarks", "deploy"):
        shutil.copytree(ROOT / name, folder / name, ignore=caches)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":  # a file in worktrees
            shutil.copy(path, folder)
    heavy = [
        ".git/objects/pack/pack-1.pack", ".venv/lib/torch.so", "runs/mine/trials/0.parquet",
        "data/MNIST/raw/images", "docs/large.png", "build/lib/raymem/a.py", "dist/a.whl",
        "tests/golden/large.npz", ".mypy_cache/3.11/a.json", "raymem/__pycache__/a.pyc",
        "raymem.egg-info/PKG-INFO", "set.npz", "val-000.tar", "scores.parquet", "key.pem", ".env",
    ]  # fmt: skip
    for name in heavy:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(500_000))
    return folder


def packaged(folder, target, *, gitignore):
    """What `ray job submit --working-dir folder` uploads, by Ray's own functions."""
    from ray._private.runtime_env.packaging import create_package
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    quiet = logging.getLogger("raymem-test-packaging")
    quiet.setLevel(logging.CRITICAL)

    def upload(working_dir, excludes, is_file=False):
        create_package(
            working_dir, target, include_gitignore=gitignore, excludes=excludes, logger=quiet
        )

    environment = {"working_dir": str(folder)}
    upload_working_dir_if_needed(environment, gitignore, logger=quiet, upload_fn=upload)
    assert environment["working_dir"].startswith("gcs://_ray_pkg_")
    return set(zipfile.ZipFile(target).namelist())


@pytest.mark.parametrize("gitignore", [True, False])
def test_a_job_uploads_code_and_nothing_else(checkout, tmp_path, monkeypatch, gitignore):
    walked = set()
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: walked.add(path) or listed(path))
    target = tmp_path / "package.zip"
    names = packaged(checkout, target, gitignore=gitignore)
    code = {str(p.relative_to(ROOT)) for f in ("raymem", "jobs") for p in (ROOT / f).rglob("*.py")}
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = about["tool"]["setuptools"]["package-data"]["raymem"]
    page = {str(p.relative_to(ROOT)) for of in wanted for p in (ROOT / "raymem").glob(of)}
    assert "raymem/show/page.css" in page
    assert {name for name in names if "/" in name} == {*code, *page}
    assert {"pyproject.toml", "constraints.txt"} <= names
    assert not {"set.npz", "key.pem", ".env", "cluster.yaml"} & names
    assert target.stat().st_size < 4_000_000
    # A data folder of a million files must not be gone through, only to leave each of them out.
    left_out = (".git", ".venv", "runs", "data", "docs", "tests", "build")
    assert not walked & {checkout / name for name in left_out}


def test_without_rayignore_it_would_be_heavy(checkout, tmp_path):
    (checkout / ".rayignore").unlink()
    target = tmp_path / "package.zip"
    assert "set.npz" in packaged(checkout, target, gitignore=True)
    assert target.stat().st_size > 1_000_000


def shell_commands(page):
    """The commands in a page's console blocks, as lists of words."""
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            if line.startswith("$ "):
                yield shlex.split(line[2:], comments=True)


def test_ray_has_the_commands_and_options_of_the_page():
    from ray.scripts.scripts import cli

    seen = 0
    for words in shell_commands((ROOT / "docs" / "cluster.md").read_text()):
        words = [word for word in words if not re.fullmatch(r"\w+=\S*", word)]
        if not words or words[0] != "ray":
            continue
        command, rest = cli, words[1:]
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        rest = rest[: rest.index("--")] if "--" in rest else rest
        known = {name for parameter in command.params for name in parameter.opts}
        for word in rest:
            if word.startswith("-"):
                assert word.split("=")[0] in known, words
        seen += 1
    assert seen >= 10
