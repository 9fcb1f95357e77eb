"""A real SLURM on this machine: a controller and two nodes on loopback, from Debian's packages.

Nothing of the system's own SLURM or munge is touched: every file is below one directory, every port
is one that was free, and what was started is stopped by its pid file. The nodes claim more CPUs
than there are; SLURM believes them.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")

_CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Requeued jobs wait until credentials have expired; 2 minutes by default.
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
PlugStackConfig={root}/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=86400
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=16000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=16000
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501


def missing() -> str | None:
    """Why no SLURM can be started here; None where it can."""
    absent = [name for name in DAEMONS if _program(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed; `make slurm` installs Debian's packages"
    return None if os.getuid() == 0 else "SLURM's daemons are started as root, and we are not"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(frozen=True)
class MiniSlurm:
    """One that runs."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.root / "etc/slurm.conf")}

    def run(self, *words: str) -> str:
        """One of SLURM's commands; its output."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """`PENDING`, `RUNNING`, `COMPLETED`, ..."""
        shown = dict(
            pair.split("=", 1)
            for pair in self.run("scontrol", "show", "job", "-o", job).split()
            if "=" in pair
        )
        return shown["JobState"]


def start(root: Path) -> MiniSlurm:
    """Start it, and wait until its nodes are idle."""
    for name in ("run", "log", "state", "etc", *(f"spool/{node}" for node in NODES)):
        (root / name).mkdir(parents=True)
    key = root / "etc/munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = _CONF.format(root=root, host=socket.gethostname(), ports=_free_ports(3))
    (root / "etc/slurm.conf").write_text(conf)
    (root / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (root / "etc/plugstack.conf").touch()
    slurm = MiniSlurm(root)
    files = {
        "key-file": key,
        "socket": root / "run/munge.socket",
        "pid-file": root / "run/munged.pid",
        "log-file": root / "log/munged.log",
        "seed-file": root / "run/munge.seed",
    }
    _daemon(slurm, "munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
    _daemon(slurm, "slurmctld", "-c")
    for node in NODES:
        _daemon(slurm, "slurmd", "-N", node)
    wait_for(lambda: set(slurm.run("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, 30)
    return slurm


def _daemon(slurm: MiniSlurm, *words: str) -> None:
    program = _program(words[0])
    assert program is not None
    subprocess.run([program, *words[1:]], env=slurm.environment, timeout=30, check=True)


def _free_ports(number: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def stop(slurm: MiniSlurm) -> None:
    """Cancel what runs and end the daemons, nodes first."""
    with suppress(AssertionError, subprocess.TimeoutExpired):
        slurm.run("scancel", "--user=root")
        wait_for(lambda: not slurm.run("squeue", "-h").strip(), 30)
    for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
        path = slurm.root / f"run/{name}.pid"
        if path.exists():
            _end(int(path.read_text()))


def _end(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        with suppress(AssertionError):
            return wait_for(lambda: not _alive(pid), 10)


def _alive(pid: int) -> bool:
    """A zombie, which nobody reaps in a container, has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    """Wait until it holds.

    Raises:
        AssertionError: it does not in time.
    """
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.3)
