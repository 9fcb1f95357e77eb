"""Megatron's own loop on CPU: one checkpoint, many layouts, one learning curve.

A small MoE model is trained for six iterations and saved after three. Every other layout loads that
checkpoint with its optimizer and must go on exactly as the first run went on: same losses and same
gradient norms. The gradient norm is the sharper of the two; sequence parallelism with unmarked
norms moves the loss in the sixth digit only.
"""

import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_growth.training.substitutions import Substitutions
from tests.megatron.driver import REPOSITORY, Job, JobFailed, Probe, Result, run_jobs

# Shared experts, an expert bias and query-key norms, because each has parameters of its own kind.
# Vocabulary 127 plus end-of-document is 128, a multiple of 32 * TP, so no layout pads it further.
MODEL = shlex.split("""
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64
    --moe-shared-expert-intermediate-size 64 --moe-token-dispatcher-type alltoall
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --normalization RMSNorm --qk-layernorm --swiglu --position-embedding-type rope
    --disable-bias-linear --untie-embeddings-and-output-weights
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 32
    --mock-data --num-workers 0 --eval-iters 0 --eval-interval 1000
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 20 --lr-warmup-iters 2
    --train-iters 6 --log-interval 1 --ckpt-format torch_dist
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
    --check-weight-hash-across-dp-replicas-interval 1
""")

NO_DROPOUT = ["--hidden-dropout", "0", "--attention-dropout", "0"]
SAVE_INTERVAL = 3

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = "--num-layers-per-virtual-pipeline-stage 1"
EP2 = "--expert-model-parallel-size 2"
EP4 = "--expert-model-parallel-size 4"
ETP1 = "--expert-tensor-parallel-size 1"
ETP2 = "--expert-tensor-parallel-size 2"

# With four ranks, name -> base and layout. Upstream cannot move optimizer state between EP = 1 and
# EP > 1 (core/optimizer/optimizer.py 1580), so there is a base for each.
LAYOUTS = {
    "EP2 again": ("EP2", EP2),
    "EP4": ("EP2", EP4),
    "PP2 EP2": ("EP2", f"{PP2} {EP2}"),
    "PP2 VPP2 EP2": ("EP2", f"{PP2} {VPP2} {EP2}"),
    "TP2 EP2 ETP1": ("EP2", f"{TP2} {EP2} {ETP1}"),
    "TP2 EP2 ETP2": ("EP2", f"{TP2} {EP2} {ETP2}"),
    "PP2 VPP2": ("EP1", f"{PP2} {VPP2}"),
    "TP2 ETP2": ("EP1", f"{TP2} {ETP2}"),
    "TP2 PP2 VPP2 ETP2": ("EP1", f"{TP2} {PP2} {VPP2} {ETP2}"),
}

Runs = dict[str, Result]


def expert_norms(probe: Probe) -> list[float]:
    """Norms of the first layer's experts on this rank, as they were initialised."""
    return [
        float(parameter.norm())
        for chunk in probe.model
        for name, parameter in chunk.named_parameters()
        if "layers.0.mlp.experts" in name and "fc1" in name
    ]


def _base(name: str, layout: str, folder: Path, dropout: list[str]) -> Job:
    save = ["--save", str(folder / name), "--save-interval", str(SAVE_INTERVAL)]
    argv = [*MODEL, *dropout, *layout.split(), *save]
    return Job(name, argv, after_setup="tests.megatron.test_cpu_backend:expert_norms")


def _continued(name: str, base: str, layout: str, folder: Path, dropout: list[str]) -> Job:
    load = ["--load", str(folder / base), "--ckpt-step", str(SAVE_INTERVAL)]
    return Job(name, [*MODEL, *dropout, *layout.split(), *load])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("layouts")
    with_dropout = f"{TP2} {EP2} {ETP1}"
    jobs = [
        _base("EP2", EP2, folder, NO_DROPOUT),
        _base("EP1", "", folder, NO_DROPOUT),
        _base("dropout", with_dropout, folder, []),
        _continued("dropout again", "dropout", with_dropout, folder, []),
    ]
    for name, (base, layout) in LAYOUTS.items():
        jobs.append(_continued(name, base, layout, folder, NO_DROPOUT))
    return run_jobs(4, jobs, timeout=600, directory=folder / "driver")


def _assert_continues(run: Result, base: Result) -> None:
    assert base.iterations == [1, 2, 3, 4, 5, 6]
    assert run.iterations == [4, 5, 6]
    assert run.learning_rates == base.learning_rates[SAVE_INTERVAL:]
    # Sums in another order; the seven and four digits that Megatron prints agree.
    assert run.losses == pytest.approx(base.losses[SAVE_INTERVAL:], rel=1e-6)
    assert run.grad_norms == pytest.approx(base.grad_norms[SAVE_INTERVAL:], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_continues_as_the_run_that_was_not_laid_out_anew(
    name: str, runs: Runs
) -> None:
    base, _ = LAYOUTS[name]
    _assert_continues(runs[name], runs[base])


@pytest.mark.slow
def test_a_resumed_run_draws_the_dropout_it_would_have_drawn(runs: Runs) -> None:
    _assert_continues(runs["dropout again"], runs["dropout"])
    assert runs["dropout again"].losses == runs["dropout"].losses[SAVE_INTERVAL:]


@pytest.mark.slow
def test_the_model_learns(runs: Runs) -> None:
    for base in ("EP1", "EP2", "dropout"):
        assert runs[base].losses[-1] < runs[base].losses[0] - 0.1


@pytest.mark.slow
def test_every_expert_starts_with_weights_of_its_own(runs: Runs) -> None:
    first, second, *_ = runs["EP2"].after_setup
    # Ranks 0 and 1 hold experts 0, 1 and 2, 3; with --use-cpu-initialization they would be twins.
    assert len({*first, *second}) == 4


@contextmanager
def fail_on_rank_1(options: dict[str, object]) -> Iterator[None]:
    """A context for the job below: one rank strays while the other waits for it."""
    from tests.megatron.driver import _rank

    if _rank() == 1:
        raise RuntimeError(f"strayed with {options['word']!r}")
    yield


@pytest.mark.slow
def test_one_failing_rank_ends_the_job_with_its_own_traceback(tmp_path: Path) -> None:
    job = Job(
        "strays",
        [*MODEL, *NO_DROPOUT],
        contexts=("tests.megatron.test_cpu_backend:fail_on_rank_1",),
        options={"word": "intent"},
    )
    with pytest.raises(JobFailed, match=r"(?s)'strays' failed on rank 1.*strayed with 'intent'"):
        run_jobs(2, [job], timeout=300, directory=tmp_path)


def test_with_a_gpu_nothing_is_replaced_and_nothing_is_imported() -> None:
    program = """
        import sys, torch
        torch.cuda.is_available = lambda: True
        from megatron_growth.training import cpu_backend
        before = dict(vars(torch.cuda)), torch.compile, dict(vars(torch.distributed))
        assert not cpu_backend.needed()
        cpu_backend.install()
        assert cpu_backend.arguments([]) == []
        after = dict(vars(torch.cuda)), torch.compile, dict(vars(torch.distributed))
        assert before == after
        assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, check=True)


def test_installing_after_megatron_is_refused_and_leaves_nothing_behind() -> None:
    program = """
        import torch
        torch.cuda.is_available = lambda: False
        import megatron.core.jit
        from megatron_growth.errors import ConfigError
        from megatron_growth.training import cpu_backend
        compile = torch.compile
        try:
            cpu_backend.install()
        except ConfigError as error:
            assert "before the first megatron import" in str(error)
        else:
            raise AssertionError("not refused")
        assert torch.compile is compile
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, check=True)


def test_what_the_user_gives_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_growth.training.cpu_backend import flags

    monkeypatch.setattr(flags, "needed", lambda: True)
    added = flags.arguments(["--distributed-backend=nccl", "--no-rope-fusion"])
    assert "--distributed-backend" not in added
    assert "--no-rope-fusion" not in added
    assert added[:2] == ["--transformer-impl", "local"]


def test_substitutions_are_undone_together_when_one_of_them_fails() -> None:
    class Parent:
        inherited = "inherited"

    class Owner(Parent):
        own = "own"

    seen = []

    def substitute_three() -> None:
        with Substitutions() as substitutions:
            substitutions.replace_all(Owner, {"own": 1, "inherited": 2})
            seen.append((Owner.own, Owner.inherited))
            substitutions.replace(Owner, "renamed", 3)

    with pytest.raises(AttributeError, match="no 'renamed'"):
        substitute_three()
    assert seen == [(1, 2)]
    assert vars(Owner)["own"] == "own"
    assert "inherited" not in vars(Owner)


def test_substitutions_stay_when_all_of_them_succeed() -> None:
    owner = SimpleNamespace(name="before")
    with Substitutions() as substitutions:
        substitutions.replace(owner, "name", "after")
    assert owner.name == "after"
