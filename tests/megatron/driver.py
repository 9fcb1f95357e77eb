"""Many Megatron runs in one ``torchrun``, because starting a rank costs more than a tiny run.

A test describes its runs as jobs and gets back what each of them measured::

    results = run_jobs(4, [
        Job("base", [*MODEL, "--train-iters", "3", "--save", str(base)]),
        Job("again", [*MODEL, "--train-iters", "6", "--load", str(base)],
            contexts=("tests.megatron.hooks:grow",),       # with grow(options): the whole job
            after_setup="tests.megatron.probes:weights",   # weights(probe), loaded, not yet trained
            at_end="tests.megatron.probes:logits",         # logits(probe), trained and saved
            options={"plan": str(plan)}),
    ])
    results["again"].losses, results["again"].after_setup[rank]

Each job is a whole, unmodified ``pretrain()`` with arguments and a layout of its own; between jobs
Megatron's global state is destroyed and the world's process group is kept. Jobs run in the order
given, so a later one may load what an earlier one saved. Losses and gradient norms are taken from
the arguments of ``training_log``, at full precision: the second loss that Megatron *prints* after
any start is the mean of the first two.

Callbacks are named ``"module:function"``, run on every rank, and return something JSON can hold.
The first failure on any rank ends all of them, and its traceback is in the error. Nothing can hang:
when the time is up every rank prints where it stands and exits.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One run of Megatron's ``pretrain()``."""

    name: str
    argv: Sequence[str]
    contexts: Sequence[str] = ()
    """Context managers around the whole job, outermost first, each called with the options."""
    after_setup: str | None = None
    """Called with a Probe once model and optimizer are built and loaded."""
    at_end: str | None = None
    """Called with a Probe after training and the last save."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Handed to the contexts and the callbacks; must survive JSON."""


@dataclass(frozen=True)
class Probe:
    """What a callback may look at."""

    model: list[Any]
    """The model chunks of this rank, one per virtual pipeline stage, wrapped for data parallel."""
    optimizer: Any
    scheduler: Any
    options: Mapping[str, Any]
    rank: int
    world_size: int


@dataclass(frozen=True)
class Result:
    """What one job measured; the lists run over its iterations, the last two over ranks."""

    name: str
    iterations: list[int]
    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    validation_losses: list[float]
    seconds: float
    after_setup: list[Any]
    at_end: list[Any]


class JobFailed(Exception):
    """A job ended with an exception, or not at all; the message holds the first traceback."""


def run_jobs(
    nproc: int, jobs: Sequence[Job], *, timeout: float = 300, directory: Path | None = None
) -> dict[str, Result]:
    """Run the jobs one after the other on ``nproc`` ranks; results by job name.

    ``directory`` keeps the ranks' output (``log.txt``) and results; a temporary one by default.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        # A point in time and not a span, which every rank would count from the end of its imports.
        todo = {"deadline": time.time() + timeout, "jobs": [asdict(job) for job in jobs]}
        (directory / "jobs.json").write_text(json.dumps(todo), encoding="utf-8")
        code = _torchrun(nproc, directory, timeout)
        if code != 0:
            raise JobFailed(_first_failure(directory, code, timeout))
        return {job.name: _merge(directory, job.name, nproc) for job in jobs}


def _torchrun(nproc: int, directory: Path, timeout: float) -> int | None:
    """The exit status of torchrun; None when it had to be stopped."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc)]
    command += ["-m", "tests.megatron.driver", str(directory / "jobs.json")]
    with (directory / "log.txt").open("w", encoding="utf-8") as log:
        # stdin closed, so that nothing below can wait for a terminal.
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            # The ranks end themselves at the timeout; this one is for torchrun itself.
            return process.wait(timeout + 60)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on to its ranks.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()


def _first_failure(directory: Path, code: int | None, timeout: float) -> str:
    reports = sorted(directory.glob("failure.*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        return reports[0].read_text(encoding="utf-8")
    log = (directory / "log.txt").read_text(encoding="utf-8", errors="replace")
    _, found, stacks = log.partition("Timeout (")  # How faulthandler begins.
    if found:
        return f"not done after {timeout} s; where the ranks stood:\n{stacks[:8000]}"
    return f"torchrun ended with {code} and no rank said why; the end of its output:\n{log[-8000:]}"


def _merge(directory: Path, name: str, nproc: int) -> Result:
    ranks = [
        json.loads((directory / f"{name}.{rank}.json").read_text(encoding="utf-8"))
        for rank in range(nproc)
    ]
    # The last rank is on the last pipeline stage, where the loss is.
    measured = ranks[-1]["measured"]
    return Result(
        name=name,
        **measured,
        seconds=max(rank["seconds"] for rank in ranks),
        after_setup=[rank["after_setup"] for rank in ranks],
        at_end=[rank["at_end"] for rank in ranks],
    )


# What follows runs in the ranks.


def main(path: Path) -> None:
    """Run every job of the file on this rank; exit at once, non-zero, at the first failure."""
    todo = json.loads(path.read_text(encoding="utf-8"))
    # A rank that waits for one that died or strayed would wait for the whole NCCL or gloo timeout.
    faulthandler.dump_traceback_later(max(1, todo["deadline"] - time.time()), exit=True)
    name = "import"
    try:
        from megatron_growth.training import cpu_backend

        cpu_backend.install()
        for fields in todo["jobs"]:
            name = fields["name"]
            _run(Job(**fields), path.parent)
    except BaseException:
        report = f"job {name!r} failed on rank {_rank()}:\n{traceback.format_exc()}"
        (path.parent / f"failure.{_rank()}.txt").write_text(report, encoding="utf-8")
        print(report, file=sys.stderr, flush=True)
        # Not sys.exit(): threads and process groups of the job may wait for other ranks.
        os._exit(1)
    faulthandler.cancel_dump_traceback_later()
    import torch.distributed

    torch.distributed.destroy_process_group()


def _rank() -> int:
    return int(os.environ["RANK"])


def _run(job: Job, directory: Path) -> None:
    from megatron_growth.training import cpu_backend, entry, gpt

    print(f"job {job.name}", flush=True)
    started, recorder = time.monotonic(), _Recorder(job)
    with contextlib.ExitStack() as stack:
        for name in job.contexts:
            stack.enter_context(_function(name)(job.options))
        stack.enter_context(recorder.listening())
        with _normal_exit_is_the_end():
            if "--growth-config" in job.argv:
                entry.train(job.argv, gpt.run)
            else:
                gpt.run([*job.argv, *cpu_backend.arguments(job.argv)])
        report = recorder.report(time.monotonic() - started)
    (directory / f"{job.name}.{_rank()}.json").write_text(json.dumps(report), encoding="utf-8")
    recorder.take_apart()
    _destroy_global_state()


@contextlib.contextmanager
def _normal_exit_is_the_end() -> Iterator[None]:
    """``--exit-interval`` and its like leave through ``sys.exit()``."""
    try:
        yield
    except SystemExit as ending:
        if ending.code not in (None, 0):
            raise


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class _Recorder:
    """Listens to one job: what it logs, and the model and optimizer it builds."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._probe: Probe | None = None
        self._after_setup: Any = None
        self._rows: list[tuple[int, float | None, float, float | None]] = []
        self._validation: list[float] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Wrap three functions of ``megatron/training/training.py``, and unwrap them at the end."""
        from megatron.training import training

        wrappers = {
            "setup_model_and_optimizer": self._setup,  # line 2017
            "training_log": self._log,  # line 2568
            "evaluate": self._evaluate,  # line 4160
        }
        originals = {name: getattr(training, name) for name in wrappers}
        for name, wrapper in wrappers.items():
            setattr(training, name, wrapper(originals[name]))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(training, name, original)

    def report(self, seconds: float) -> dict[str, Any]:
        columns = [list(column) for column in zip(*self._rows, strict=True)]
        iterations, losses, norms, rates = columns or [[]] * 4
        return {
            "measured": {
                "iterations": iterations,
                "losses": losses,
                "grad_norms": norms,
                "learning_rates": rates,
                "validation_losses": self._validation,
            },
            "seconds": seconds,
            "after_setup": self._after_setup,
            "at_end": self._call(self._job.at_end),
        }

    def take_apart(self) -> None:
        """Let go of the model: hooks in C++ keep it in cycles that the garbage collector cannot
        see.

        It holds process groups, and each gloo group has threads of its own, which would slow all
        later jobs down.
        """
        if self._probe is None:
            return
        for chunk in self._probe.model:
            for module in list(chunk.modules()):
                for part in list(vars(module).values()):
                    if type(part).__name__.endswith(
                        "TokenDispatcher"
                    ):  # holds the last batch's graph
                        vars(part).clear()
                vars(module).clear()
        for part in getattr(self._probe.optimizer, "chained_optimizers", [self._probe.optimizer]):
            vars(part).clear()
        self._probe = None

    def _call(self, name: str | None) -> Any:
        return None if name is None else _function(name)(self._probe)

    def _setup(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def setup(*args: Any, **kwargs: Any) -> Any:
            model, optimizer, scheduler = original(*args, **kwargs)
            world_size = int(os.environ["WORLD_SIZE"])
            options = self._job.options
            self._probe = Probe(model, optimizer, scheduler, options, _rank(), world_size)
            self._after_setup = self._call(self._job.after_setup)
            return model, optimizer, scheduler

        return setup

    def _log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def log(loss_dict, total, rate, iteration, scale, memory, skipped, norm, *rest, **kwargs):
            loss = loss_dict.get("lm loss")
            row = (iteration, None if loss is None else float(loss), float(norm or 0), rate)
            self._rows.append(row)
            return original(
                loss_dict, total, rate, iteration, scale, memory, skipped, norm, *rest, **kwargs
            )

        return log

    def _evaluate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            losses, *rest = original(*args, **kwargs)
            if losses and "lm loss" in losses:
                self._validation.append(float(losses["lm loss"]))
            return (losses, *rest)

        return evaluate


def _destroy_global_state() -> None:
    """Everything that ``pretrain()`` leaves behind and the next one would trip over."""
    import torch
    from megatron.core.dist_checkpointing.strategies import cached_metadata_filesystem_reader
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training import async_utils, checkpointing, training

    training.destroy_global_state()
    checkpointing._CHECKPOINT_VERSION = None
    checkpointing._LOADED_ITERATION = None
    async_utils._async_calls_queue = None
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
    # Keyed by path alone: a checkpoint written again to the same place would be read stale.
    cached_metadata_filesystem_reader.CachedMetadataFileSystemReader.clear_metadata_cache()
    gc.collect()
    torch.distributed.barrier()
    # Megatron forgets its groups without destroying them, and each gloo group keeps threads of its
    # own.
    world = torch.distributed.group.WORLD
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not world:
            torch.distributed.destroy_process_group(group)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
