"""The cluster profile: what is true of a machine and of no model. A file of its own.

processes_per_node: 8
device: h100
container: {image: /images/nemo-26.02.sqsh, mounts: [/lustre:/lustre]}
environment: {NCCL_IB_HCA: mlx5, NCCL_SOCKET_IFNAME: eth0}
slurm: {account: llm, partition: batch, minutes: 240}
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_growth.sections import Count, Positive, Strict, Written

Variable = Annotated[
    str, Written("[A-Za-z_][A-Za-z0-9_]*", "the name of a variable, as in NCCL_IB_HCA")
]
# What stands in an #SBATCH line as it is.
Word = Annotated[
    str, Written(r"[^\s\"'\\#]+", "one word without quotes, blanks, \\ or #, as in batch")
]
Line = Annotated[str, Written(r"--?[^\n]+", "an option of sbatch on one line, as in --qos=high")]
# One of Pyxis' mounts, or several: /data:/lustre/data:ro,/scratch
_PAIR = r"[^:,\n]+(:/[^:,\n]*(:[^:,\n]+)?)?"
Mount = Annotated[
    str, Written(f"{_PAIR}(,{_PAIR})*", "outside:inside, as in /lustre:/lustre or /data:/data:ro")
]
Absolute = Annotated[str, Written(r"/[^:\n]*", "a path from the root, as in /lustre")]
# Kubernetes' labels and names.
Label = Annotated[
    str,
    Written(
        "[a-z0-9]([-a-z0-9]*[a-z0-9])?",
        "lower-case letters and digits, with dashes between them, as in team-a",
        longest=63,
    ),
]
Object = Annotated[
    str,
    Written(
        "[a-z0-9]([-.a-z0-9]*[a-z0-9])?",
        "lower-case letters and digits, with dashes and dots between them, as in torch-distributed",
        longest=253,
    ),
]
_SHM = "shm"  # a volume of every pod of ours


class Container(Strict):
    """Where the processes run. With SLURM by Pyxis and enroot."""

    image: str
    """A registry's name, or for Pyxis also the path of a squashfs file. Pyxis wants a `#` after the
    registry: `registry.example.com#team/image:1.0`."""

    mounts: list[Mount] | None = []
    """`outside:inside` pairs for Pyxis, with flags as in `/data:/data:ro`. The directory launched
    from and `runs` must be in one, at the same path on both sides; data, base and a local tokenizer
    in any. null where the site mounts its storage in every container: then nothing is checked."""


class Slurm(Strict):
    """How SLURM is asked."""

    tasks: Literal["per_process", "torchrun"] = "per_process"
    """`per_process` starts one task for each GPU, and SLURM alone ends them; `torchrun` starts one
    agent on each node."""

    minutes: Annotated[int, Field(ge=2, lt=2**31)] = 240
    """Walltime. A stage that is not done by then saves, and is queued again."""

    account: Word | None = None
    """`--account`."""

    partition: Word | None = None
    """`--partition`."""

    gpus: bool = True
    """Ask for GPUs, by `--gpus-per-node`; false where the cluster has no such resource."""

    cpu_bind: Word = "none"
    """`--cpu-bind` of srun. `none` leaves every rank the CPUs of its node; where SLURM binds tasks,
    a rank and its data loaders would share the one CPU of their task."""

    options: list[Line] = []
    """Further options of sbatch, `--qos=high`, each a line of the script, and of the alert's."""

    requeues: Count = 100
    """How often a stage may be queued again; it is only when it got further since."""

    alert: str | None = None
    """Command that a job runs when a stage fails, with EXPERIMENT, STAGE and JOB in its
    environment; none by default."""


class Claim(Strict):
    """A persistent volume."""

    name: Label
    """The PersistentVolumeClaim."""

    path: Absolute
    """Where pods mount it."""


class Kubernetes(Strict):
    """How Kubernetes is asked: a TrainJob of Kubeflow Trainer v2."""

    namespace: Label = "default"
    """Where the job lives."""

    runtime: Object = "torch-distributed"
    """ClusterTrainingRuntime that the job refers to."""

    queue: Object | None = None
    """Kueue's LocalQueue, for gang scheduling; none by default."""

    claims: list[Claim] = []
    """Volumes, at least one. The directory launched from, `runs`, data, base and a local tokenizer
    must each be on one."""

    resources: dict[str, int | str] = {}
    """What a node's pod asks for beside its GPUs: `rdma/ib: 8`, `memory: 1Ti`."""

    secret: Object | None = None
    """The Secret that holds `secrets`, a key for each."""

    @model_validator(mode="after")
    def _claims_apart(self) -> "Kubernetes":
        for what in ("name", "path"):
            said = [getattr(claim, what) for claim in self.claims]
            twice = next((one for one in said if said.count(one) > 1), None)
            if twice is not None:
                raise ValueError(f"two of the claims have the {what} {twice!r}; drop one")
        if _SHM in [claim.name for claim in self.claims]:
            raise ValueError(f"a claim is named {_SHM!r}, as every pod's shared memory; rename it")
        return self


class Cluster(Strict):
    """A cluster profile."""

    device: Literal["h100", "cpu"] = "h100"
    """What the processes compute on."""

    processes_per_node: Positive = 8
    """One for each GPU."""

    memory_gb: Annotated[float, Field(gt=0, le=1e6)] = 80
    """Memory of a device, in 10^9 bytes; `plan` compares with it."""

    python: str | None = None
    """The Python that has this package, where the processes run. By default `python` there, and
    with `--target torchrun` the one that launches."""

    container: Container | None = None
    """None runs on the nodes themselves."""

    environment: dict[Variable, str | int] = {}
    """Set for every process: fabric settings above all (NCCL_IB_HCA, NCCL_SOCKET_IFNAME). Text or
    whole numbers, exported as written. They win over what the launcher derives."""

    secrets: list[Variable] = []
    """Environment variables that the processes need and no file may hold (WANDB_API_KEY). By name:
    their values are those of the shell that submits."""

    save_seconds: Positive = 300
    """Time that saving a checkpoint may take. Walltime, signals and kills leave room for it."""

    start_minutes: Count = 5
    """Time from the start of a job to its first step: containers, preflight, loading. Training ends
    by itself this much, and `save_seconds`, before the walltime."""

    preflight: bool = True
    """Check devices, versions, disk and collectives on all nodes before each start."""

    slurm: Slurm = Slurm()
    """For `--target slurm`."""

    kubernetes: Kubernetes = Kubernetes()
    """For `--target k8s`."""
