"""What Ray's own two schedulers would start, for the clusters of the files that ship.

`demands()` reads what a connected cluster wants, as Ray's autoscalers read it; `v1` and `v2` give
that to the schedulers of Ray's first autoscaler and of its second. Nothing is started.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from processes import wait_until
from ray._raylet import GcsClient
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.load_metrics import LoadMetrics
from ray.autoscaler._private.monitor import parse_resource_demands
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_NODE_KIND,
    TAG_RAY_USER_NODE_TYPE,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler as SecondScheduler
from ray.autoscaler.v2.scheduler import SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.autoscaler_pb2 import ClusterResourceState, NodeState, NodeStatus
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind
from ray.experimental.internal_kv import _internal_kv_get

ROOT = Path(__file__).parents[2]
FILES = {"aws": "cluster.yaml", "gcp": "cluster-gcp.yaml", "kuberay": "deploy/rayjob.yaml"}
# Without autoscalerOptions.version, KubeRay takes the second autoscaler from this Ray on.
KUBERAY_TAKES_V2 = (2, 47)
REQUESTS = "AUTOSCALER_RESOURCE_REQUEST_CHANNEL"


def configuration(name: str) -> dict[str, Any]:
    """A cluster file as Ray's autoscaler gets it."""
    file = yaml.safe_load((ROOT / FILES[name]).read_text())
    if name != "kuberay":
        return prepare_config(file)
    cluster = file["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    meta = {"name": file["metadata"]["name"], "namespace": "default"}
    return prepare_config(
        _derive_autoscaling_config_from_ray_cr({"metadata": meta, "spec": cluster})
    )


def chosen_by_kuberay() -> str:
    """The autoscaler that KubeRay starts for deploy/rayjob.yaml."""
    cluster = yaml.safe_load((ROOT / FILES["kuberay"]).read_text())["spec"]["rayClusterSpec"]
    version = tuple(int(part) for part in cluster["rayVersion"].split(".")[:2])
    default = "v2" if version >= KUBERAY_TAKES_V2 else "v1"
    return str(cluster.get("autoscalerOptions", {}).get("version", default))


@dataclass(frozen=True)
class Node:
    """A node that is there."""

    kind: str
    """Its type in the cluster file."""
    used: dict[str, float] = field(default_factory=dict)
    """What is taken of it."""
    id: str = ""
    """56 hexadecimal digits."""


@dataclass(frozen=True)
class Demands:
    """What a cluster wants."""

    state: ClusterResourceState
    """As the second autoscaler reads it."""
    shapes: Any
    groups: list[Any]
    request: list[dict[str, float]]
    """These three as the first autoscaler reads them: waiting tasks, groups, and what
    `request_resources` asked for."""


def demands() -> Demands:
    """What the connected cluster wants now."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    state = get_cluster_resource_state(client)

    def as_first() -> Any:
        usage = client.get_all_resource_usage(timeout=60).resource_usage_data
        groups = usage.placement_group_load.placement_group_data
        return len(groups) == len(state.pending_gang_resource_requests) and usage

    # The first autoscaler's view is a second or so behind.
    usage = wait_until(as_first, 20)
    return Demands(
        state=state,
        shapes=usage.resource_load_by_shape,
        groups=list(usage.placement_group_load.placement_group_data),
        request=json.loads(_internal_kv_get(REQUESTS) or "[]"),
    )


def tasks(bundle: dict[str, float], n: int) -> Demands:
    """`n` waiting tasks of `bundle`."""
    state = ClusterResourceState()
    wanted = state.pending_resource_requests.add()
    wanted.count = n
    wanted.request.resources_bundle.update(bundle)
    usage = ray.core.generated.gcs_pb2.ResourceUsageBatchData()
    shape = usage.resource_load_by_shape.resource_demands.add()
    shape.shape.update(bundle)
    shape.num_infeasible_requests_queued = n
    return Demands(state=state, shapes=usage.resource_load_by_shape, groups=[], request=[])


def _head(config: dict[str, Any]) -> Node:
    return Node(kind=config["head_node_type"], id="f" * 56)


class _Provider:
    """A cloud that has these nodes."""

    def __init__(self, nodes: list[Node], head: str) -> None:
        self._kinds = {node.id: node.kind for node in nodes}
        self._head = head

    def node_tags(self, node_id: str) -> dict[str, str]:
        kind = self._kinds[node_id]
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD if kind == self._head else NODE_KIND_WORKER,
            TAG_RAY_USER_NODE_TYPE: kind,
        }

    def internal_ip(self, node_id: str) -> str:
        return node_id


def v1(config: dict[str, Any], wanted: Demands, nodes: list[Node]) -> Counter[str]:
    """The nodes that Ray's first autoscaler would start, by type."""
    config = copy.deepcopy(config)
    types, head = config["available_node_types"], config["head_node_type"]
    everything = [_head(config), *nodes]
    scheduler = ResourceDemandScheduler(
        _Provider(everything, head), types, config["max_workers"], head,
        config.get("upscaling_speed", 1.0),
    )  # fmt: skip
    metrics = LoadMetrics()
    waiting, infeasible = parse_resource_demands(wanted.shapes)
    for node in everything:
        total = dict(types[node.kind]["resources"])
        free = {name: n - node.used.get(name, 0) for name, n in total.items()}
        metrics.update(
            node.id, bytes.fromhex(node.id), total, free, 0.0, waiting, infeasible, wanted.groups
        )
    metrics.set_resource_requests(wanted.request)
    started, _ = scheduler.get_nodes_to_launch(
        [node.id for node in everything],
        {},
        metrics.get_resource_demand_vector(),
        metrics.get_resource_utilization(),
        metrics.get_pending_placement_groups(),
        metrics.get_static_node_resources_by_ip(),
        ensure_min_cluster_size=metrics.get_resource_requests(),
        node_availability_summary=NodeAvailabilitySummary({}),
    )
    return Counter(started)


def v2(config: dict[str, Any], wanted: Demands, nodes: list[Node]) -> Counter[str]:
    """The nodes that Ray's second autoscaler would start, by type."""
    known = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    reply = SecondScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=known.get_node_type_configs(),
            max_num_nodes=known.get_max_num_nodes(),
            resource_requests=list(wanted.state.pending_resource_requests),
            gang_resource_requests=list(wanted.state.pending_gang_resource_requests),
            cluster_resource_constraints=list(wanted.state.cluster_resource_constraints),
            current_instances=[_instance(config, node) for node in (_head(config), *nodes)],
            idle_timeout_s=known.get_idle_timeout_s(),
        )
    )
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch})


def _instance(config: dict[str, Any], node: Node) -> AutoscalerInstance:
    total = dict(config["available_node_types"][node.kind]["resources"])
    kind = NodeKind.HEAD if node.kind == config["head_node_type"] else NodeKind.WORKER
    return AutoscalerInstance(
        cloud_instance_id=node.id,
        ray_node=NodeState(
            node_id=bytes.fromhex(node.id),
            ray_node_type_name=node.kind,
            total_resources=total,
            available_resources={n: v - node.used.get(n, 0) for n, v in total.items()},
            labels={"ray.io/node-id": node.id},
            status=NodeStatus.RUNNING,
        ),
        im_instance=Instance(
            instance_id=node.id, status=Instance.RAY_RUNNING, node_id=node.id,
            instance_type=node.kind, cloud_instance_id=node.id, node_kind=kind,
        ),
    )  # fmt: skip


SCHEDULERS = {"v1": v1, "v2": v2}
