#!/usr/bin/env python3
"""A Slurm site of one node on this machine, from Debian's packages: real munged, slurmctld and slurmd.

    cluster.py start FOLDER     starts it, waits until the node is idle and prints what to export
    cluster.py stop FOLDER      ends its jobs and its daemons

Everything lies in FOLDER (its own key, socket, spool and logs) and listens on free ports of the loopback: an installed
Slurm is left alone. No accounting, no cgroups, no systemd. The seconds below are small so that tests do not wait.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("slurmd", "slurmctld", "munged")  # in the order in which they end
NEEDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CPUS = 2

# CpuSpecList and the like are left out: what this machine really has may be less, and slurmd is told not to look
# (config_overrides). cred_expire is how long a requeued job waits before it may start again (120 s if not set).
CONF = """\
ClusterName=archipel
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoAddrCache
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
InactiveLimit=0
KillWait=5
OverTimeLimit=0
MinJobAge=30
SlurmctldTimeout=60
SlurmdTimeout=60
PropagateResourceLimits=NONE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=0 State=UP
PartitionName=urgent Nodes={host} MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
"""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def write_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    controller, daemon = free_ports(2)
    conf = CONF.format(
        folder=folder,
        host=socket.gethostname().split(".")[0],
        user=pwd.getpwuid(os.getuid()).pw_name,
        controller=controller,
        daemon=daemon,
        cpus=CPUS,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
    )
    (folder / "slurm.conf").write_text(conf)


def wait_for(what: str, done: Callable[[], bool], folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            words = "".join(f"\n--- {log}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
            stop(folder)
            sys.exit(f"waited {seconds:.0f} s for {what}{words}")
        time.sleep(0.1)


def start(folder: Path) -> None:
    missing = [name for name in NEEDS if shutil.which(name, path=path()) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (Debian: slurmctld, slurmd, slurm-client, munge)")
    write_files(folder)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path()}

    def run(*command: str) -> None:
        made = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if made.returncode != 0:
            stop(folder)
            sys.exit(f"{command[0]} did not start: {made.stderr.strip() or made.stdout.strip()}")

    # --force: munged is strict about who may write to the folders above its files; tests live in /tmp.
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
    files |= {"seed-file": "munge.seed", "log-file": "munged.log"}
    run("munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items()))
    wait_for("munge's socket", (folder / "munge.socket").exists, folder)
    run("slurmctld", "-f", env["SLURM_CONF"])
    wait_for("the controller", lambda: answers(["scontrol", "ping"], "is UP", env), folder)
    run("slurmd", "-f", env["SLURM_CONF"])
    wait_for("the node", lambda: answers(["sinfo", "-h", "-o", "%T"], "idle", env), folder)


def answers(command: list[str], words: str, env: dict[str, str]) -> bool:
    said = subprocess.run(command, env=env, capture_output=True, text=True)
    return said.returncode == 0 and words in said.stdout


def path() -> str:
    """Daemons are in sbin, which a user's PATH often leaves out."""
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def pid_of(folder: Path, daemon: str) -> int | None:
    """The daemon's process, if the number in its file is still its own."""
    try:
        pid = int((folder / f"{daemon}.pid").read_text())
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return pid if name == daemon else None


def stop(folder: Path) -> None:
    """End the jobs, then the daemons; one that does not go is killed."""
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path()}
    if pid_of(folder, "slurmctld"):
        user = pwd.getpwuid(os.getuid()).pw_name
        try:
            subprocess.run(["scancel", "-f", "--signal=KILL", "-u", user], env=env, timeout=10, capture_output=True)
            subprocess.run(["scancel", "-u", user], env=env, timeout=10, capture_output=True)
            end = time.monotonic() + 15
            while not answers(["squeue", "-h", "-o", "left %i"], "", env) or left(env):
                if time.monotonic() > end:
                    break
                time.sleep(0.2)
        except (OSError, subprocess.TimeoutExpired):
            pass
    for daemon in DAEMONS:
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + 10
            while (pid := pid_of(folder, daemon)) and time.monotonic() < end:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    break
                time.sleep(0.2)


def left(env: dict[str, str]) -> bool:
    said = subprocess.run(["squeue", "-h", "-o", "%i"], env=env, capture_output=True, text=True, timeout=10)
    return bool(said.stdout.strip())


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit(__doc__)
    folder = Path(sys.argv[2]).resolve()
    if sys.argv[1] == "stop":
        stop(folder)
        return
    start(folder)
    print(f"export SLURM_CONF={folder / 'slurm.conf'}")


if __name__ == "__main__":
    main()
