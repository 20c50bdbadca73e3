"""A head without CPUs whose autoscaler brings fake nodes of one CPU each, as processes here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

RAY = Path(sys.executable).parent / "ray"
HEAD_ID = "f" * 51 + "00000"
MOST_NODES = 3


def configuration(address: str) -> dict:
    empty = {
        name: []
        for name in (
            "initialization_commands", "setup_commands", "head_setup_commands",
            "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
            "cluster_synced_files", "rsync_exclude", "rsync_filter",
        )
    }  # fmt: skip
    return {
        **empty,
        "cluster_name": "fake",
        "max_workers": MOST_NODES,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 100.0,
        "provider": {
            "type": "fake_multinode",
            "head_node_id": HEAD_ID,
            "gcs_address": address,
            "disable_node_updaters": True,
            # Nodes are told apart by their address, and these share one.
            "use_node_id_as_ip": True,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": MOST_NODES},
        },
        "auth": {}, "docker": {}, "file_mounts": {}, "head_node": {}, "worker_nodes": {},
        "file_mounts_sync_continuously": False,
    }  # fmt: skip


@contextlib.contextmanager
def autoscaling_head(port: int, version: str = "v1") -> Iterator[dict[str, str]]:
    """Yields the environment of drivers; ends all processes it started.

    `version` of Ray's autoscaler is v1 or v2.
    """
    folder = tempfile.mkdtemp(prefix="ray")
    address = f"127.0.0.1:{port}"
    config = Path(folder) / "autoscaling.json"
    config.write_text(json.dumps(configuration(address)))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": folder,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    of_head = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    with open(Path(folder) / "log", "w") as log:
        head = subprocess.Popen(
            [
                RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0",
                "--node-ip-address=127.0.0.1", "--include-dashboard=false",
                f"--ray-client-server-port={port + 1}", f"--autoscaling-config={config}",
                "--disable-usage-stats",
            ],
            env={**environment, **(of_head if version == "v2" else {})},
            stdout=log, stderr=log,
        )  # fmt: skip
        family: set[psutil.Process] = set()
        try:
            yield {**environment, "RAY_ADDRESS": address}
        finally:
            with contextlib.suppress(psutil.Error):
                family.update(psutil.Process(head.pid).children(recursive=True))
            # Nodes that the autoscaler started are nobody's children: they know the folder.
            family.update(p for p in psutil.process_iter() if folder in _command(p))
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(timeout=20)
            head.kill()
            head.wait()
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(list(family), timeout=10)
            shutil.rmtree(folder, ignore_errors=True)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
