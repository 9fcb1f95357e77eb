"""A real SLURM on this machine: a controller and three nodes on loopback, from Debian's packages.

Nothing of the system's own SLURM or munge is touched: every file is below one directory, and every
port is one that was free. The nodes claim more CPUs than there are; SLURM believes them.

It ends with the process that started it, however that ends. A keeper (this file, run as a script)
reads from a pipe whose other end only that process has; when it is closed the keeper kills what
belongs to this SLURM: daemons, steps, and the ranks of jobs. Those know each other by `SLURM_CONF`
in their environment, which names a file below the one directory.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2", "n3")
STAND_IN = Path(__file__).with_name("container_options.c")

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
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=64 RealMemory=16000
PartitionName=batch Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=aside Nodes=n3 MaxTime=INFINITE
"""  # noqa: E501


def missing() -> str | None:
    """Why no SLURM can be started here; None where it can."""
    absent = [name for name in DAEMONS if _program(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed; `make slurm` installs Debian's packages"
    return None if os.getuid() == 0 else "SLURM's daemons are started as root, and we are not"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def no_container_options() -> str | None:
    """Why srun cannot be taught Pyxis' options here; None where it can."""
    if shutil.which("gcc") is None or not Path("/usr/include/slurm/spank.h").exists():
        return "gcc or libslurm-dev is not installed; `make slurm` installs Debian's packages"
    return None


@dataclass(frozen=True)
class MiniSlurm:
    """One that runs."""

    root: Path
    keeper: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        # Of an allocation that the tests run in, nothing.
        own = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return kept | {"SLURM_CONF": str(self.root / "etc/slurm.conf")}

    def run(self, *words: str) -> str:
        """One of SLURM's commands; its output."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """`PENDING`, `RUNNING`, `COMPLETED`, ..."""
        return self._shown(job)["JobState"]

    def exit_code(self, job: str) -> int:
        """Of its script."""
        return int(self._shown(job)["ExitCode"].split(":")[0])

    def _shown(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def start(root: Path) -> MiniSlurm:
    """Start it, and wait until its nodes are idle."""
    for name in ("run", "log", "state", "etc", *(f"spool/{node}" for node in NODES)):
        (root / name).mkdir(parents=True)
    key = root / "etc/munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf = _CONF.format(root=root, host=socket.gethostname(), ports=_free_ports(1 + len(NODES)))
    (root / "etc/slurm.conf").write_text(conf)
    (root / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (root / "etc/plugstack.conf").write_text(_plugins(root))
    slurm = MiniSlurm(root, _keeper(root / "etc/slurm.conf"))
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


def _plugins(root: Path) -> str:
    """The content of plugstack.conf."""
    if no_container_options():
        return ""
    built = root / "etc/container_options.so"
    words = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, STAND_IN]
    subprocess.run(words, timeout=60, check=True)
    return f"required {built}\n"


def _keeper(conf: Path) -> subprocess.Popen[bytes]:
    # In a session of its own: what interrupts the tests does not reach it.
    words = [sys.executable, __file__, str(conf)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)


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
    """End it, with all that runs in it."""
    slurm.keeper.communicate(timeout=60)
    assert slurm.keeper.returncode == 0, "something did not end"


def belonging(conf: Path) -> list[int]:
    """The processes of the SLURM with this configuration. A zombie, which nobody reaps in a
    container, has no environment left."""
    pids = [int(directory.name) for directory in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if f"SLURM_CONF={conf}" in environment(pid)]


def environment(pid: int) -> set[str]:
    """What a process was started with: `NAME=VALUE`. Nothing where there is none such."""
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return set()
    return set(text.split("\0"))


def _keep(conf: Path) -> None:
    sys.stdin.buffer.read()  # until the other end is closed
    for _ in range(2):  # what was just being started shows the second time
        wait_for(lambda: not _killed(conf), 20)


def _killed(conf: Path) -> list[int]:
    found = belonging(conf)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    """Wait until it holds.

    Raises:
        AssertionError: it does not in time.
    """
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.3)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
