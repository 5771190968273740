"""A Slurm of one node for tests: its daemons run in a folder of their own, on ports of their own.

Nothing is installed and no other Slurm or munge of this machine is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import ENV, free_port

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# cred_expire: a requeued job waits for its old credentials to expire, 120 s by default. KillWait: from SIGTERM to
# SIGKILL. The scheduler looks for jobs every second. munge has a key and a socket of its own.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=600
PropagateResourceLimits=NONE
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} RealMemory=1000
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no Slurm can be started here; empty if it can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


class Cluster:
    def __init__(self, folder: Path, cpus: int) -> None:
        self.folder, self.daemons = folder, []
        self.env = {**ENV, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        host = os.uname().nodename.split(".")[0]
        text = CONF.format(host=host, folder=folder, cpus=cpus, control_port=free_port(), node_port=free_port())
        (folder / "slurm.conf").write_text(text)
        for name in ("state", "spool"):
            (folder / name).mkdir()

    def start(self) -> None:
        at = self.folder
        self.run("mungekey", "--create", f"--keyfile={at}/munge.key")
        self.daemon("munged", "--foreground", "--force", f"--key-file={at}/munge.key",
                    f"--socket={at}/munge.socket", f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log",
                    f"--seed-file={at}/munged.seed")  # fmt: skip
        self.wait_for(lambda: (at / "munge.socket").exists(), "munged's socket")
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D")
        self.wait_for(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T", check=False), "an idle node")

    def daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.console", "w") as console:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=console, stderr=console))

    def stop(self) -> None:
        self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: object, check: bool = True, **kwargs) -> str:
        done = subprocess.run([*map(str, command)], env=self.env, capture_output=True, text=True, timeout=240, **kwargs)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        """The number of a batch job with this script."""
        return self.run("sbatch", "--parsable", *options, input=f"#!/bin/bash\n{script}\n").strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, TimeLimit ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition, what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds:g} s\n{self.logs()}"
            assert all(d.poll() is None for d in self.daemons), f"a daemon ended\n{self.logs()}"
            time.sleep(0.1)

    def wait_for_end(self, job: str) -> str:
        """The state a job ends in."""
        going = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
        self.wait_for(lambda: self.job(job)["JobState"] not in going, f"end of job {job}")
        return self.job(job)["JobState"]

    def logs(self) -> str:
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.console")])
        return "\n".join(f"== {f.name}\n{f.read_text()[-2000:]}" for f in files)


@contextmanager
def cluster(cpus: int = 2) -> Iterator[Cluster]:
    """A running Slurm; its node has `cpus` processors, whether the machine has or not."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: the path of a socket has 107 characters at most
    running = Cluster(folder, cpus)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)
