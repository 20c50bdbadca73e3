"""cluster.yaml against a simulated AWS: what `ray up` does there until machines would answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "203.0.113.7/32"
# Ray's own steps of `ray up`: prepare, bootstrap, start a head and a GPU worker.
PROGRAM = """
import json, sys
import boto3, yaml
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler._private.aws.config import bootstrap_aws

ec2 = boto3.resource("ec2", region_name="us-west-2")
image = next(iter(ec2.images.all())).id
text = open("cluster.yaml").read().replace("ami-FILL-IN", image)
config = prepare_config(yaml.safe_load(text))
validate_config(config)
config = bootstrap_aws(config)
provider = _get_node_provider(config["provider"], config["cluster_name"])
seen = {}
for name in ("head", "gpu_spot"):
    node = config["available_node_types"][name]["node_config"]
    provider.create_node(dict(node), {"ray-node-kind": name}, 1)
for instance in ec2.instances.all():
    tags = {tag["Key"]: tag["Value"] for tag in instance.tags}
    seen[tags["ray-node-kind"]] = {
        "type": instance.instance_type,
        "spot": instance.instance_lifecycle,
        "profile": instance.iam_instance_profile["Arn"].rpartition("/")[2],
        "groups": [group["GroupName"] for group in instance.security_groups],
        "image": instance.image_id == image,
    }
(group,) = ec2.security_groups.filter(Filters=[{"Name": "group-name", "Values": ["raymem"]}])
seen["rules"] = [
    [rule["IpProtocol"], [r["CidrIp"] for r in rule["IpRanges"]], len(rule["UserIdGroupPairs"])]
    for rule in group.ip_permissions
]
zones = {s.id: s.availability_zone for s in ec2.subnets.all()}
node = config["available_node_types"]["gpu_spot"]["node_config"]
seen["zones"] = [zones[subnet] for subnet in node["SubnetIds"]]
print(json.dumps(seen))
"""


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """The environment of a process whose AWS is a simulation on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    ours = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    yield {
        **ours,
        "HOME": str(tmp_path),  # Ray writes the cluster's ssh key there
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.stop()


@pytest.mark.skipif(shutil.which("aws") is None, reason="needs the aws command")
@pytest.mark.slow
def test_the_set_up_account_starts_the_clusters_machines(simulated):
    setup = ["bash", "deploy/aws_setup.sh", "a-bucket", "us-west-2", ADDRESS]
    subprocess.run(setup, cwd=ROOT, env=simulated, check=True, capture_output=True)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=simulated, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["head"] == {
        "type": "m6i.2xlarge", "spot": None, "profile": "raymem-head", "groups": ["raymem"],
        "image": True,
    }  # fmt: skip
    assert seen["gpu_spot"]["type"] == "g5.2xlarge"
    assert seen["gpu_spot"]["spot"] == "spot"
    assert seen["gpu_spot"]["profile"] == "raymem-worker"
    # The nodes among themselves, ssh from one address: Ray has added nothing.
    assert sorted(seen["rules"]) == [["-1", [], 1], ["tcp", [ADDRESS], 0]]
    assert seen["zones"] == [f"us-west-2{letter}" for letter in "abcd"]
