"""What preflight finds: nodes that differ, are ill, cannot write, or are slow; a base not sound."""
# ruff: noqa: E501 (tables have one line for each)

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_growth.launcher.node import disk_problems, gpu_problems, module_problems
from megatron_growth.launcher.parent import parent_problem
from megatron_growth.launcher.preflight import Finding, compared, slow
from tests.checkpoint import bases
from tests.launcher.rendering import stub

WELL = Finding("n1", "H100", {"torch": "2.14", "deep-ep": None}, 100.0)
IMAGE = "; give all nodes one image or environment"


def test_nodes_that_are_alike_are_well():
    assert compared([WELL, replace(WELL, host="n2", clock=101.0)]) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"device": "A100"},
            "n2: has A100, n1 H100; --exclude the node, or ask for one kind by a --constraint in slurm.options",
        ),
        ({"versions": {"torch": "2.13", "deep-ep": None}}, f"n2: torch 2.13, n1 has 2.14{IMAGE}"),
        ({"versions": {"torch": "2.14", "deep-ep": "1.0"}}, f"n2: deep-ep 1.0, n1 has None{IMAGE}"),
        (
            {"problems": ("'/x' has 3 bytes left; make room",)},
            "n2: '/x' has 3 bytes left; make room",
        ),
        ({"clock": 90.0}, "n2: its clock is 10 s late; set it"),
    ],
)
def test_a_node_that_differs_is_named_once(change, says):
    other = replace(WELL, host="n2", **change)
    assert compared([WELL, other, other]) == [says]


def test_a_node_below_the_median_of_the_job_is_named():
    speeds = [{"all-to-all": speed} for speed in (100.0, 98.0, 101.0, 60.0)]
    found = slow(speeds, ["n1", "n2", "n3", "n4"])
    assert found == ["n4: all-to-all at 61% of the median; --exclude the node"]


# nvidia-smi of a node with two GPUs: well, but for what the first answers to the question on $FIELD.
SMI = """case "$1" in *$FIELD*) echo "00:01.0, $ANSWER"; exit "$CODE" ;; esac
case "$1" in *recovery*) echo "00:01.0, None" ;; *) echo "00:01.0, 0"; echo "00:02.0, [N/A]" ;; esac"""


@pytest.mark.parametrize(
    ("field", "answer", "code", "says"),
    [
        ("nothing", "", 0, []),
        ("volatile", "3", 0, ["GPU 00:01.0: uncorrected ECC errors: 3; --exclude the node and reset the GPU"]),
        ("recovery", "Reset", 0, ["GPU 00:01.0: the driver asks, after an Xid, for: Reset; --exclude the node and reset the GPU"]),
        ("failure", "Yes", 0, ["GPU 00:01.0: rows of memory that could not be remapped: Yes; --exclude the node and reset the GPU"]),
        ("recovery", "Field is not valid", 2, []),
    ],
)  # fmt: skip
def test_a_gpu_that_its_driver_complains_of_is_named(
    tmp_path, monkeypatch, field, answer, code, says
):
    stub(tmp_path, "nvidia-smi", SMI)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("FIELD", field), ("ANSWER", answer), ("CODE", str(code))):
        monkeypatch.setenv(name, value)
    assert list(gpu_problems()) == says


def test_a_node_without_the_drivers_tool_is_not_asked(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert list(gpu_problems()) == []


def test_a_module_or_a_name_in_it_that_is_missing_is_named_with_the_remedy():
    assert list(module_problems(["json", "json:loads"])) == []
    (module, name) = module_problems(["no_such_module", "json:NoSuchBuffer"])
    assert module.startswith("no_such_module cannot be imported (No module named")
    assert name.startswith("json:NoSuchBuffer cannot be imported (module 'json' has no attribute")
    assert name.endswith("or take the option (dispatcher, transformer-impl) back")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    (problem,) = disk_problems(tmp_path / "file" / "checkpoints", 1)
    assert "cannot be written to" in problem
    assert "set `runs` to storage that all nodes share" in problem


# -- the base

LINE = " iteration   {0}/ 100 | elapsed time per iteration (ms): 5.0 | {1}number of nan iterations:   {2} |\n"


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (None, None),
        (LINE.format(9, "", 1) + LINE.format(10, "lm loss: 2.5E+00 | ", 0), None),
        (LINE.format(9, "lm loss: 2.5E+00 | ", 0) + LINE.format(10, "", 1), "losses that are NaN"),
        (LINE.format(10, "lm loss: INF | ", 0), "a loss of inf"),
    ],
)
def test_a_base_whose_loss_is_no_number_is_refused(tmp_path, log, says):
    growth = a_grown_stage(tmp_path)
    if log is not None:
        (tmp_path / "base/ranks").mkdir()
        (tmp_path / "base/ranks/1.0.train.0.log").write_text(log)
    problem = parent_problem(growth, tmp_path / "grown/checkpoints")
    assert (problem is None) if says is None else (f"ended with {says}, see" in problem)


def test_a_base_that_gives_no_plan_is_refused_until_the_stage_has_started(tmp_path):
    growth = a_grown_stage(tmp_path)
    (tmp_path / "base/checkpoints/latest_checkpointed_iteration.txt").write_text("9")
    own = tmp_path / "grown/checkpoints"
    assert "iter_0000009' does not exist" in parent_problem(growth, own)
    own.mkdir(parents=True)
    (own / "latest_checkpointed_iteration.txt").write_text("12")
    assert parent_problem(growth, own) is None


def a_grown_stage(root):
    """A finished base and the growth file of the stage behind it."""
    model = bases.Model(layers=2, experts=2, mtp=False)
    state = {**bases.tensors(model), **bases.objects(model)}
    bases.save(root / "base/checkpoints/iter_0000007", state)
    (root / "base/checkpoints/latest_checkpointed_iteration.txt").write_text("7")
    growth = root / "growth.yaml"
    config = {"base": {"load": str(root / "base/checkpoints")}, "growth": {"depth": {}}}
    growth.write_text(yaml.safe_dump(config))
    return growth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("needed", "module", "growth", "says"),
    [
        (1, "torch", "growth.yaml", []),
        (10**18, "deep_ep:Buffer", "nothing.yaml",
         ["bytes left, and one", "deep_ep:Buffer cannot be imported", "the base: configuration"]),
    ],
)  # fmt: skip
def test_it_runs_on_every_rank_and_leaves_a_report(tmp_path, needed, module, growth, says):
    a_grown_stage(tmp_path)
    code = 1 if says else 0
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["megatron_growth.launcher.preflight", "--checkpoints", str(tmp_path / "checkpoints")]
    words += ["--bytes", str(needed), "--report", str(tmp_path / "report.json")]
    words += ["--module", module, "--growth", str(tmp_path / growth)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [rank["versions"]["megatron-core"][:4] for rank in report["ranks"]] == ["0.19", "0.19"]
    assert all(rank["speeds"]["all-reduce in the node"] > 0 for rank in report["ranks"])
    assert len(report["problems"]) == len(says), "each once, though two ranks looked"
    for problem, part in zip(report["problems"], says, strict=True):
        assert part in problem
    assert not list((tmp_path / "checkpoints").iterdir())
