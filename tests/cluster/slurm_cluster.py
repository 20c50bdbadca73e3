"""A Slurm cluster on this machine: a controller, and two nodes of one CPU each."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=10
MinJobAge=3600
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17821-17822] CPUs=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that this machine lacks, of Debian's slurm-wlm."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment of Slurm's commands; ends all daemons it started."""
    (folder / "state").mkdir(parents=True)
    # munged refuses a key that others may read, and a socket that they cannot reach.
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=os.uname().nodename, folder=folder))
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}",
         f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
         f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            time.sleep(1)
        _wait_for_nodes(environment)
        yield environment
    finally:
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)


def _wait_for_nodes(environment: dict[str, str]) -> None:
    for _ in range(60):
        found = subprocess.run(
            ["sinfo", "--noheader", "--format=%T %D"],
            env=environment, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        if found == ["idle", "2"]:
            return
        time.sleep(1)
    raise RuntimeError(f"Slurm's nodes are {found}, not idle")
