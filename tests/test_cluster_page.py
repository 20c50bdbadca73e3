"""docs/cluster.md's section on this machine, command by command, as its reader runs it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from raymem import Store, verify

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[1]
SECTION = r"## Try it on this machine first\n(.*?)\n## "


def commands() -> list[str]:
    page = (ROOT / "docs" / "cluster.md").read_text()
    section = re.search(SECTION, page, re.DOTALL)[1]
    blocks = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def reader(tmp_path):
    """Runs a command in the reader's shell; ends the Ray that was started there, and no other."""
    # Ray's sockets live in its folder, and their paths must be short.
    temporary = tempfile.mkdtemp(prefix="ray")
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": temporary}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)

    def run(command: str) -> subprocess.CompletedProcess:
        # Files, because a Ray that was started here would keep a pipe open.
        with open(tmp_path / "said", "w+") as said:
            ran = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, env=environment, stdout=said, stderr=said,
                stdin=subprocess.DEVNULL, timeout=280,
            )  # fmt: skip
            said.seek(0)
            return subprocess.CompletedProcess(command, ran.returncode, said.read())

    yield run, environment
    ours = [p for p in psutil.process_iter() if in_folder(p, temporary)]
    for process in ours:
        process.terminate()
    for process in psutil.wait_procs(ours, timeout=20)[1]:
        process.kill()
    shutil.rmtree(temporary, ignore_errors=True)


def in_folder(process: psutil.Process, temporary: str) -> bool:
    try:
        return process.environ().get("RAY_TMPDIR") == temporary
    except psutil.Error:
        return False


@pytest.mark.slow
def test_the_section_on_this_machine_runs(reader, tmp_path):
    run, environment = reader
    port, dashboard, client, metrics, agent = free_ports(5)
    store = tmp_path / "store"
    replaced = {
        "http://127.0.0.1:8265": f"http://127.0.0.1:{dashboard}",
        "http://127.0.0.1:8080": f"http://127.0.0.1:{metrics}",
        "--metrics-export-port=8080": f"--metrics-export-port={metrics} --port={port} "
        f"--dashboard-port={dashboard} --ray-client-server-port={client} "
        f"--dashboard-agent-listen-port={agent} --num-cpus=2 --disable-usage-stats",
        "/tmp/raymem-try": str(store),
    }
    statuses = []
    for line in commands():
        command = line
        for old, new in replaced.items():
            command = command.replace(old, new)
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            environment[name] = value
        elif command.startswith("ray stop"):
            pass  # it would end the Rays of others; the fixture ends ours
        elif "logs" in command and "-f" in command:
            # A reader watches a while, sees a trial or two, and leaves.
            followed = run(f"timeout --signal=INT 45 {command.partition('#')[0]}")
            assert "trials 20/40" in followed.stdout, followed.stdout
        else:
            ran = run(command)
            assert ran.returncode == 0, f"{command}\n{ran.stdout}"
            if command.startswith("raymem status"):
                statuses.append(ran.stdout)
    assert "trials: 20 of 20 done" in statuses[0]
    assert "driver: none" in statuses[1]
    assert len(Store(store).done()) == 40
    assert verify(Store(store)) == []
