"""What continues after growth: the optimizer in each format and rule, the learning rate, the data.

The test of `optimizer: rescale` is the run that was not grown. Width at alpha = 0 keeps the
function and splits every gradient evenly over the clones, so with moments rescaled as that asks,
AdamW takes the same steps: the grown run follows the un-grown one, fifty steps long, within the
error of fp32. Moments copied or dropped leave it at once.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.driver import REPOSITORY, Job, Result, run_jobs
from tests.megatron.test_cpu_backend import EP2, MODEL, NO_DROPOUT, PP2
from tests.megatron.test_growth import DEPTH, EXACT_WIDTH, WIDTH, config_file, options

STEPS = 50
BASE_STEPS = 10
SAMPLES_A_STEP = int(MODEL[MODEL.index("--global-batch-size") + 1])


def changed(arguments: list[str], **values: str | None) -> list[str]:
    """Arguments with some set anew (a value), or left out (None)."""
    words = list(arguments)
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if option in words:
            at = words.index(option)
            del words[
                at : at + (1 if at + 1 == len(words) or words[at + 1].startswith("--") else 2)
            ]
        words += [] if value is None else [option, value] if value else [option]
    return words


# A constant rate, no clipping, and an epsilon that vanishes beside any gradient: what is compared
# is Adam's arithmetic alone. At the usual 1e-8 a clone with gradient g / m feels epsilon m times as
# strongly, and the paths part by 4e-4.
RUN = changed(
    [*MODEL, *NO_DROPOUT],
    lr_decay_style="constant",
    lr_warmup_iters=None,
    lr_decay_iters=None,
    min_lr=None,
    clip_grad="0",
    adam_eps="1e-15",
    train_iters=str(BASE_STEPS),
    save_interval="1000",
)
PLAIN = changed(RUN, use_distributed_optimizer=None, dist_ckpt_optim_fully_reshardable=None)

# name -> optimizer arguments and layout of the base, layout of the grown run.
FORMATS = {
    "distributed fp32": (RUN, EP2, f"{PP2} {EP2}"),
    "distributed bf16": (changed(RUN, bf16=""), EP2, f"{PP2} {EP2}"),
    "distributed bf16, EP1 to EP2": (changed(RUN, bf16=""), "", EP2),
    "distributed fp32, EP2 to EP1": (RUN, EP2, PP2),
    "plain fp32, EP1 to EP2": (PLAIN, "", EP2),
    "plain fp32, EP2 to EP1": (PLAIN, EP2, PP2),
    "plain bf16": (changed(PLAIN, bf16=""), EP2, f"{PP2} {EP2}"),
    "plain bf16, EP1 to EP2": (changed(PLAIN, bf16=""), "", EP2),
}
NEW_RATE: dict[str, Any] = {"learning_rate": {"peak": 2e-3, "warmup_iters": 4}}
# name -> `continue:` of the configuration, and arguments of the run.
SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "kept": ({}, []),
    "rate by argument": ({}, ["--lr", "5e-4", "--lr-decay-style", "constant"]),
    "rate warmed up anew": (NEW_RATE, []),
    "rate warmed up anew, in samples": (
        NEW_RATE,
        ["--train-samples", str((BASE_STEPS + 5) * SAMPLES_A_STEP)],
    ),
    "all anew": ({**NEW_RATE, "iteration": "reset", "data": "reset"}, []),
    "iteration anew": ({"iteration": "reset"}, []),
    "data from 200": ({"data": {"offset": 200}}, []),
}


def continuing(more: int, layout: str, arguments: list[str] = RUN) -> list[str]:
    """The arguments of a run that loads: only what the base does not know."""
    kept = [
        "--micro-batch-size",
        "--global-batch-size",
        "--num-workers",
        "--eval-iters",
        "--eval-interval",
        "--log-interval",
    ]
    words = [word for name in kept for word in (name, arguments[arguments.index(name) + 1])]
    flags = [
        "--mock-data",
        "--use-distributed-optimizer",
        "--dist-ckpt-optim-fully-reshardable",
        "--bf16",
        "--check-weight-hash-across-dp-replicas-interval",
    ]
    words += [
        word
        for name in flags
        if name in arguments
        for word in [name, *(["1"] if "hash" in name else [])]
    ]
    return [
        *words,
        *layout.split(),
        "--train-iters",
        str(BASE_STEPS + more),
        "--save-interval",
        "1000",
    ]


def _base(name: str, arguments: list[str], layout: str, save: Path) -> Job:
    return Job(
        name,
        [*arguments, *layout.split(), "--save", str(save)],
        contexts=("tests.megatron.probes:samples",),
        options={"samples": f"{save}.samples"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("continuation")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Result]:
    base = folder / "base"
    jobs = [_base("base", RUN, EP2, base)]
    plain = [*changed(RUN, train_iters=str(BASE_STEPS + STEPS)), *EP2.split(), "--load", str(base)]
    jobs.append(Job("not grown", [*plain, "--override-opt-param-scheduler"]))
    for rule in ("rescale", "copy", "reset"):
        file = config_file(folder / f"{rule}.yaml", base, {"width": EXACT_WIDTH, "optimizer": rule})
        jobs.append(Job(rule, ["--growth-config", file, *continuing(STEPS, f"{PP2} {EP2}")]))
    jobs += _as_is_jobs(folder, base)
    jobs += _format_jobs(folder)
    jobs += _settings_jobs(folder, base)
    jobs += _restarted_jobs(folder, base)
    default = changed(RUN, dist_ckpt_optim_fully_reshardable=None)
    jobs.append(_base("default format", default, EP2, folder / "default format"))
    return run_jobs(4, jobs, timeout=1200, directory=folder / "driver")


def _as_is_jobs(folder: Path, base: Path) -> list[Job]:
    """Nothing grows: another layout, and then another rate as well."""
    growth = {"as_is": True, "optimizer": "rescale"}
    jobs = []
    for name, settings in (("as is", {}), ("as is, rate warmed up anew", NEW_RATE)):
        file = config_file(folder / f"{name}.yaml", base, growth, settings)
        steps = 5 if settings else STEPS
        jobs.append(Job(name, ["--growth-config", file, *continuing(steps, f"{PP2} {EP2}")]))
    return jobs


def _format_jobs(folder: Path) -> list[Job]:
    jobs = []
    growth = {"depth": DEPTH, "width": WIDTH, "optimizer": "rescale"}
    for name, (arguments, layout, new_layout) in FORMATS.items():
        save = folder / f"base of {name}"
        file = config_file(folder / f"{name}.yaml", save, growth)
        jobs.append(_base(f"base of {name}", arguments, layout, save))
        jobs.append(
            Job(
                name,
                ["--growth-config", file, *continuing(2, new_layout, arguments)],
                after_setup="tests.megatron.probes:optimizer_steps",
                options=options(save, growth, stacked=True),
            )
        )
    return jobs


def _settings_jobs(folder: Path, base: Path) -> list[Job]:
    jobs = []
    for name, (settings, arguments) in SETTINGS.items():
        file = config_file(
            folder / f"{name}.yaml", base, {"width": EXACT_WIDTH, "optimizer": "rescale"}, settings
        )
        argv = ["--growth-config", file, *continuing(5, EP2), *arguments]
        if settings.get("iteration") == "reset":
            argv = changed(argv, train_iters="5")
        if "--train-samples" in arguments:
            argv = changed(argv, train_iters=None)
        jobs.append(
            Job(
                name,
                argv,
                contexts=("tests.megatron.probes:samples",),
                options={"samples": str(folder / f"{name}.samples")},
            )
        )
    return jobs


def _restarted_jobs(folder: Path, base: Path) -> list[Job]:
    """Grown with a schedule of its own, stopped in the warm-up, and started again."""
    growth = {"width": EXACT_WIDTH, "optimizer": "rescale"}
    file = config_file(folder / "restarted.yaml", base, growth, NEW_RATE)
    argv = ["--growth-config", file, *continuing(5, EP2), "--save", str(folder / "restarted")]
    return [Job("stopped", [*argv, "--exit-interval", "12"]), Job("started again", argv)]


def _distance(run: Result, other: Result) -> float:
    assert run.iterations == other.iterations == list(range(BASE_STEPS + 1, BASE_STEPS + STEPS + 1))
    return max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=True))


@pytest.mark.slow
def test_rescaled_moments_follow_the_run_that_was_not_grown(runs: dict[str, Result]) -> None:
    distance = {
        rule: _distance(runs[rule], runs["not grown"]) for rule in ("rescale", "copy", "reset")
    }
    print(distance)
    assert distance["rescale"] < 5e-6
    assert distance["copy"] > 100 * distance["rescale"]
    assert distance["reset"] > 100 * distance["rescale"]


@pytest.mark.slow
def test_a_base_trains_on_as_it_is_at_another_layout_and_rate(runs: dict[str, Result]) -> None:
    assert _distance(runs["as is"], runs["not grown"]) < 5e-6
    anew = runs["as is, rate warmed up anew"]
    assert anew.learning_rates == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])
    assert anew.losses[0] == pytest.approx(runs["not grown"].losses[0], abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_optimizer_format_loads_to_the_bit(name: str, runs: dict[str, Result]) -> None:
    assert [rank["wrong"] for rank in runs[name].after_setup] == [[]] * 4
    held = {
        key.split(".")[2]
        for rank in runs[name].after_setup
        for key in rank["held"]
        if key.startswith("optim")
    }
    masters = (
        {"param"} if name.startswith("distributed") else {"fp32_param"} if "bf16" in name else set()
    )
    assert held == {"exp_avg", "exp_avg_sq", *masters}
    assert {step for rank in runs[name].after_setup for step in rank["steps"]} == {BASE_STEPS}


@pytest.mark.slow
def test_the_learning_rate_takes_effect(runs: dict[str, Result]) -> None:
    rates = {name: runs[name].learning_rates for name in SETTINGS}
    assert rates["kept"] == [1e-3] * 5
    assert rates["rate by argument"] == [5e-4] * 5
    assert rates["rate warmed up anew"] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])
    assert rates["all anew"] == rates["rate warmed up anew"]
    assert rates["rate warmed up anew, in samples"] == rates["rate warmed up anew"]
    assert runs["rate warmed up anew, in samples"].iterations == [11, 12, 13, 14, 15]


@pytest.mark.slow
def test_a_run_that_resumes_goes_on_with_the_schedule_that_it_was_started_with(
    runs: dict[str, Result], folder: Path
) -> None:
    assert runs["stopped"].learning_rates == pytest.approx([5e-4, 1e-3])
    assert runs["started again"].iterations == [13, 14, 15]
    assert runs["started again"].learning_rates == pytest.approx([1.5e-3, 2e-3, 2e-3])
    written = json.loads((folder / "restarted" / "growth_manifest.json").read_text())
    assert written["continue"]["learning_rate"]["peak"] == 2e-3


@pytest.mark.slow
def test_a_restart_of_another_length_is_refused_on_one_line(
    runs: dict[str, Result], folder: Path
) -> None:
    assert runs["started again"].iterations
    argv = ["--growth-config", str(folder / "restarted.yaml"), *continuing(20, EP2)]
    refused = _torchrun(2, "megatron_growth.pretrain", [*argv, "--save", str(folder / "restarted")])
    assert refused.returncode != 0
    (line,) = [
        line for line in refused.stderr.splitlines() if line.startswith("megatron_growth: error")
    ]
    assert "the run's total number of iterations, in samples, is 60 but now 120; give" in line


@pytest.mark.slow
def test_the_iteration_is_kept_or_starts_anew(runs: dict[str, Result]) -> None:
    assert runs["kept"].iterations == [11, 12, 13, 14, 15]
    assert runs["iteration anew"].iterations == [1, 2, 3, 4, 5]


def _samples(stem: Path) -> set[int]:
    files = stem.parent.glob(f"{stem.name}.[0-9]")
    return {int(line) for file in files for line in file.read_text().split()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, first",
    [
        ("kept", BASE_STEPS * SAMPLES_A_STEP),
        ("iteration anew", BASE_STEPS * SAMPLES_A_STEP),
        ("all anew", 0),
        ("data from 200", 200),
    ],
)
def test_data_goes_on_where_it_should(
    name: str, first: int, runs: dict[str, Result], folder: Path
) -> None:
    assert _samples(folder / "base.samples") == set(range(BASE_STEPS * SAMPLES_A_STEP))
    assert runs[name].iterations
    assert _samples(folder / f"{name}.samples") == set(range(first, first + 5 * SAMPLES_A_STEP))


@pytest.mark.slow
def test_the_default_format_is_refused_resharded_and_then_grown(
    runs: dict[str, Result], folder: Path
) -> None:
    base, new = folder / "default format", folder / "resharded"
    assert runs["default format"].iterations
    file = config_file(folder / "default.yaml", base, {"width": WIDTH, "optimizer": "rescale"})
    argv = ["--growth-config", file, *continuing(2, EP2)]
    refused = _torchrun(1, "megatron_growth.pretrain", argv)
    assert refused.returncode != 0
    (line,) = [
        line for line in refused.stderr.splitlines() if line.startswith("megatron_growth: error")
    ]
    assert "dp_reshardable" in line
    assert "megatron_growth.reshard" in line
    assert "optimizer: reset" in line

    done = _torchrun(4, "megatron_growth.reshard", ["--load", str(base), "--save", str(new)])
    assert done.returncode == 0, done.stderr[-3000:]
    grown = _torchrun(
        4, "megatron_growth.pretrain", [*argv, "--load", str(new), "--save", str(folder / "last")]
    )
    assert grown.returncode == 0, grown.stderr[-3000:]
    assert "base loaded" in grown.stdout


def _torchrun(ranks: int, module: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    return subprocess.run(
        [*command, "-m", module, *argv], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
