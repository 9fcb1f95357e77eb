"""The whole road: Megatron trains a base, its loader reads the grown view at another layout,
training goes on.

Two bases, one for each key form and each saved at a layout of its own, are grown into many layouts.
After each load every rank compares every parameter it holds, bit for bit, with the definition. One
torchrun runs it all.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_growth import GrowthConfig, cli
from megatron_growth.checkpoint.directory import iteration_directory
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.training.forward import compared
from tests.megatron.driver import Job, Result, run_jobs
from tests.megatron.probes import real_tokens
from tests.megatron.test_cpu_backend import EP2, EP4, ETP1, ETP2, MODEL, NO_DROPOUT, PP2, TP2

VPP2 = "--num-layers-per-virtual-pipeline-stage 2"
INTERPOSED = [0, 0, 1, 1, 2, 2, 3, 3]
DEPTH: dict[str, Any] = {"method": "interposition", "factor": 2}
WIDTH: dict[str, Any] = {"factor": 2, "order": "interleave"}
EXACT_WIDTH: dict[str, Any] = {**WIDTH, "noise": {"experts": 0, "router": 0}}

PARKED: dict[str, Any] = {**WIDTH, "top_k": "keep", "clones": "parked"}

# What a run that loads must give itself: layout, batch and data; the rest is the base's.
RUN = [
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "4",
    "--mock-data",
    "--num-workers",
    "0",
    "--eval-iters",
    "0",
    "--eval-interval",
    "1000",
    "--train-iters",
    "9",
    "--log-interval",
    "1",
    "--use-distributed-optimizer",
    "--dist-ckpt-optim-fully-reshardable",
    "--check-weight-hash-across-dp-replicas-interval",
    "1",
    "--lr",
    "1e-3",
    "--lr-decay-style",
    "constant",
    "--vocab-size",
    "127",
    "--tokenizer-type",
    "NullTokenizer",
]

# A first dense layer, an MTP module: keys by layer, and experts that depth growth must not touch.
MIXED = "--moe-layer-freq ([0]+[1]*3) --mtp-num-layers 1"
BASES = {"stacked": f"{PP2} {EP2}", "mixed": f"{TP2} {EP2} {ETP1} {MIXED}"}

# name -> base, layout, growth.
LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "TP2 EP2 ETP1": ("stacked", f"{TP2} {EP2} {ETP1}", {"depth": DEPTH, "width": WIDTH}),
    "TP2 ETP2": ("stacked", f"{TP2} {ETP2}", {"depth": DEPTH, "width": WIDTH}),
    "PP2 VPP2": ("stacked", f"{PP2} {VPP2}", {"depth": DEPTH, "width": WIDTH}),
    "PP2 EP2": ("stacked", f"{PP2} {EP2}", {"depth": DEPTH, "width": WIDTH}),
    "EP4": ("stacked", EP4, {"depth": DEPTH, "width": WIDTH}),
    "EP4, appended threefold": ("stacked", EP4, {"width": {"factor": 3, "order": "append"}}),
    "PP2 EP2, moments": (
        "stacked",
        f"{PP2} {EP2}",
        {"depth": DEPTH, "width": WIDTH, "optimizer": "rescale"},
    ),
    "TP2 ETP2, moments": (
        "stacked",
        f"{TP2} {ETP2}",
        {"depth": DEPTH, "width": WIDTH, "optimizer": "rescale"},
    ),
    "EP2, stacked to per-layer": (
        "stacked",
        f"{EP2} --moe-layer-freq [1]*8",
        {"depth": DEPTH, "width": WIDTH},
    ),
    "mixed TP2 EP2": (
        "mixed",
        f"{TP2} {EP2} {ETP1}",
        {"depth": DEPTH, "width": WIDTH, "optimizer": "rescale"},
    ),
    "mixed PP2 EP2": ("mixed", f"{PP2} {EP2}", {"depth": DEPTH, "width": WIDTH}),
    "mixed PP2 EP2, parked": (
        "mixed",
        f"{PP2} {EP2}",
        {"depth": DEPTH, "width": PARKED, "optimizer": "rescale"},
    ),
}
WRITTEN = ("copy", "link")
# Growth that keeps the function: name -> growth.
EXACT = {
    "width, no noise": {"width": EXACT_WIDTH},
    "clones parked, much noise": {
        "width": {**PARKED, "noise": {"experts": 0.5, "router": 0.5}},
    },
    "depth, zero output": {"depth": {**DEPTH, "new_layer_init": "zero_output"}},
    "both, exact": {"depth": {**DEPTH, "new_layer_init": "zero_output"}, "width": EXACT_WIDTH},
}


# Growth with the paper's noise, which keeps the function nearly: name -> growth.
NOISY = {
    "width, noise": {"width": WIDTH},
    "width, noise, and depth with zero output": {
        "depth": {**DEPTH, "new_layer_init": "zero_output"},
        "width": WIDTH,
    },
}
WRONG = ", rows of other experts"


def config_file(
    path: Path, base: Path, growth: dict[str, Any], settings: dict[str, Any] | None = None
) -> str:
    content = {
        "base": {"load": str(base)},
        "growth": {"optimizer": "reset", **growth},
        "continue": settings or {},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def options(base: Path, growth: dict[str, Any], *, stacked: bool) -> dict[str, Any]:
    """What `probes.compare` must know: the growth again, in the definition's words."""
    depth, width = growth.get("depth", {}), growth.get("width")
    noise = (width or {}).get("noise", {"experts": 0.01})
    return {
        "base": str(base),
        "layers": INTERPOSED if depth else list(range(4)),
        "factor": width["factor"] if width else 1,
        "order": width["order"] if width else "interleave",
        "alpha": noise["experts"],
        "parked": (width or {}).get("clones") == "parked",
        "zero_output": depth.get("new_layer_init") == "zero_output",
        "optimizer": growth.get("optimizer", "reset"),
        "stacked": stacked,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growth")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Result]:
    base = {name: folder / name for name in BASES}
    jobs = [
        Job(
            name,
            [
                *MODEL,
                *NO_DROPOUT,
                *layout.split(),
                "--save",
                str(base[name]),
                "--save-interval",
                "6",
            ],
        )
        for name, layout in BASES.items()
    ]
    for name, (source, layout, growth) in LAYOUTS.items():
        file = config_file(folder / f"{name}.yaml", base[source], growth)
        about = options(
            base[source], growth, stacked=source == "stacked" and "--moe-layer-freq" not in layout
        )
        jobs.append(Job(name, ["--growth-config", file, *RUN, *layout.split()],
                        after_setup="tests.megatron.probes:compare", options=about))  # fmt: skip
    plain = [*MODEL, *NO_DROPOUT, *EP2.split(), "--load", str(base["stacked"])]
    jobs.append(Job("base again", plain, after_setup="tests.megatron.probes:logits",
                    options={"logits": str(folder / "base.pt")}))  # fmt: skip
    for name, growth in EXACT.items():
        file = config_file(folder / f"{name}.yaml", base["stacked"], growth)
        about = {
            **options(base["stacked"], growth, stacked=True),
            "logits": str(folder / f"{name}.pt"),
        }
        jobs.append(
            Job(
                name,
                ["--growth-config", file, *RUN, *EP2.split()],
                after_setup="tests.megatron.probes:compare_and_logits",
                options=about,
            )
        )
    jobs += _noisy_jobs(folder, base["stacked"])
    jobs += _written(folder, base["stacked"])
    jobs += _started_twice(folder, base["stacked"])
    return run_jobs(4, jobs, timeout=1200, directory=folder / "driver")


def _noisy_jobs(folder: Path, base: Path) -> list[Job]:
    """Noise, and the same with every router row at another expert."""
    jobs = []
    for name, growth in NOISY.items():
        file = config_file(folder / f"{name}.yaml", base, growth)
        for suffix, probe in (("", "logits"), (WRONG, "logits_of_other_rows")):
            argv = ["--growth-config", file, *RUN, *EP2.split()]
            about = {"logits": str(folder / f"{name}{suffix}.pt")}
            jobs.append(
                Job(
                    name + suffix, argv, after_setup=f"tests.megatron.probes:{probe}", options=about
                )
            )
    return jobs


def _written(folder: Path, base: Path) -> list[Job]:
    """Grown on disk, then loaded by Megatron alone, as any checkpoint: nothing of ours is in it."""
    growth = {"depth": DEPTH, "width": WIDTH, "optimizer": "rescale"}
    grown = ["--num-layers", "8", "--num-experts", "8", "--moe-router-topk", "4"]
    longer = ["--train-iters", "9", "--override-opt-param-scheduler"]
    plain = [*MODEL, *NO_DROPOUT, *grown, *f"{PP2} {EP2}".split(), *longer]
    return [
        Job(
            f"written, {mode}",
            [*plain, "--load", str(folder / f"written-{mode}")],
            contexts=("tests.megatron.probes:written_first",),
            after_setup="tests.megatron.probes:compare",
            options={
                **options(base, growth, stacked=True),
                "growth": growth,
                "mode": mode,
                "written": str(folder / f"written-{mode}"),
            },
        )
        for mode in WRITTEN
    ]


def _started_twice(folder: Path, base: Path) -> list[Job]:
    """The same command line twice: it grows, trains to 8 and stops; then it must go on from 8."""
    file = config_file(folder / "twice.yaml", base, {"depth": DEPTH, "width": WIDTH})
    argv = ["--growth-config", file, *RUN, *EP2.split(), "--train-iters", "12",
            "--save", str(folder / "twice"), "--save-interval", "100"]  # fmt: skip
    again = config_file(folder / "again.yaml", folder / "twice", {"depth": {"target_layers": 10}})
    chained = [
        "--growth-config",
        again,
        *RUN,
        *EP2.split(),
        "--train-iters",
        "14",
        "--save",
        str(folder / "chained"),
        "--save-interval",
        "100",
    ]
    return [
        Job("first start", [*argv, "--exit-interval", "8"]),
        Job("second start", argv, after_setup="tests.megatron.probes:iteration"),
        Job("chained", chained, after_setup="tests.megatron.probes:iteration"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", WRITTEN)
def test_megatron_alone_loads_and_trains_what_was_written(
    mode: str, runs: dict[str, Result]
) -> None:
    run = runs[f"written, {mode}"]
    assert [rank["wrong"] for rank in run.after_setup] == [[], [], [], []]
    assert min(rank["elements"] for rank in run.after_setup) > 10_000
    assert any("exp_avg_sq" in key for key in run.after_setup[0]["held"])
    assert run.iterations == [7, 8, 9]
    assert all(map(math.isfinite, run.losses + run.grad_norms))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *EXACT])
def test_every_loaded_parameter_of_every_rank_is_the_definitions(
    name: str, runs: dict[str, Result]
) -> None:
    ranks = runs[name].after_setup
    assert [rank["wrong"] for rank in ranks] == [[], [], [], []]
    assert min(rank["elements"] for rank in ranks) > 10_000
    held = {key for rank in ranks for key in rank["held"]}
    assert {key.split(".")[-2] for key in held} >= {
        "word_embeddings",
        "router",
        "linear_fc1",
        "linear_qkv",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_with_a_finite_falling_loss(name: str, runs: dict[str, Result]) -> None:
    run = runs[name]
    assert run.iterations == [7, 8, 9]
    assert all(map(math.isfinite, run.losses + run.grad_norms))
    assert run.losses[-1] < run.losses[0]


@pytest.mark.slow
def test_layouts_train_alike(runs: dict[str, Result]) -> None:
    """Loss and gradient norm of the first step: the same model, cut in five ways."""
    names = ["TP2 EP2 ETP1", "TP2 ETP2", "PP2 VPP2", "PP2 EP2", "EP4"]
    for name in names[1:]:
        assert runs[name].losses == pytest.approx(runs[names[0]].losses, rel=1e-5)
        assert runs[name].grad_norms == pytest.approx(runs[names[0]].grad_norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_exact_growth_keeps_the_logits_of_real_text(
    name: str, runs: dict[str, Result], folder: Path
) -> None:
    assert runs[name].iterations
    before, after = torch.load(folder / "base.pt"), torch.load(folder / f"{name}.pt")
    assert before.shape == after.shape
    # fp32; a token's expert outputs are summed in another order.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6 * float(before.abs().max()))


@pytest.mark.slow
def test_depth_with_zero_output_keeps_the_logits_to_the_bit(
    runs: dict[str, Result], folder: Path
) -> None:
    assert runs["depth, zero output"].iterations
    assert torch.equal(torch.load(folder / "base.pt"), torch.load(folder / "depth, zero output.pt"))


@pytest.mark.slow
def test_a_second_start_resumes_and_does_not_grow_again(
    runs: dict[str, Result], folder: Path
) -> None:
    assert runs["first start"].iterations == [7, 8]
    assert runs["second start"].iterations == [9, 10, 11, 12]
    assert (
        runs["second start"].after_setup == [{"num_layers": 8, "load": str(folder / "twice")}] * 4
    )
    written = json.loads((folder / "twice" / "growth_manifest.json").read_text())
    assert (written["iteration"], written["plan"]["target"]["num_layers"]) == (6, 8)
    log = (folder / "driver" / "log.txt").read_text()
    assert "holds iter_0000008: resuming it as it is, nothing is grown" in log


@pytest.mark.slow
def test_a_grown_run_grows_again_and_remembers_both(runs: dict[str, Result], folder: Path) -> None:
    assert runs["chained"].iterations == [13, 14]
    assert runs["chained"].after_setup[0]["num_layers"] == 10
    written = json.loads((folder / "chained" / "growth_manifest.json").read_text())
    assert (written["base"], written["iteration"]) == (str(folder / "twice"), 12)
    ancestor = written["ancestor"]
    assert (ancestor["base"], ancestor["iteration"]) == (str(folder / "stacked"), 6)


@pytest.mark.slow
def test_a_manifest_gives_its_plan_again(
    runs: dict[str, Result], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs["first start"].iterations
    with pytest.raises(SystemExit) as done:
        cli.main(["plan", "--from-manifest", str(folder / "twice"), "--json"])
    written = json.loads((folder / "twice" / "growth_manifest.json").read_text())
    assert done.value.code in (0, None)
    assert written["plan_fingerprint"] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
def test_noise_moves_logits_within_its_bound_and_rows_of_other_experts_do_not(
    name: str, runs: dict[str, Result], folder: Path
) -> None:
    """After a few steps, when the experts hardly differ: a wrong model is never nearer."""
    assert runs[name].iterations
    growth = GrowthConfig.model_validate({"optimizer": "reset", **NOISY[name]})
    plan = plan_for(SourceCheckpoint(iteration_directory(folder / "stacked")), growth)
    tokens, before = real_tokens(33, 127), torch.load(folder / "base.pt")
    right, wrong = (
        compared(before, torch.load(folder / f"{name}{suffix}.pt"), tokens, plan, "fp32")
        for suffix in ("", WRONG)
    )
    assert right.bound == pytest.approx(0.02 * float(before.std()), rel=0.01)
    assert right.passed
    assert 0 < right.mean_difference < right.bound / 8
    assert not wrong.passed
    assert wrong.mean_difference > 2 * right.bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, promise",
    [
        ("both, exact", "exact"),
        ("clones parked, much noise", "exact"),
        ("EP4, appended threefold", "bounded"),
        ("PP2 EP2", "none"),
    ],
)
def test_verify_runs_both_models_on_the_same_text(
    name: str,
    promise: str,
    runs: dict[str, Result],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert runs[name].iterations
    config = str(folder / f"{name}.yaml")
    argv = ["verify", str(folder / "stacked"), "--config", config, "--forward", "--json"]
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code in (0, None)
    forward = json.loads(capsys.readouterr().out)["forward"]
    assert forward["expectation"].startswith(promise)
    assert forward["exact"] is (promise == "exact")
    assert forward["tokens"] == 1024
    assert (forward["max_difference"] <= forward["tolerance"]) is (promise == "exact")
    assert (forward["bound"] is not None) is (promise == "bounded")


@pytest.mark.slow
def test_the_base_is_untouched(runs: dict[str, Result], folder: Path) -> None:
    assert sorted(p.name for p in (folder / "stacked").iterdir()) == [
        "iter_0000006", "latest_checkpointed_iteration.txt"]  # fmt: skip
