"""What preflight finds: nodes that differ, cannot write, or are slow."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_growth.launcher.preflight import Finding, compared, slow

WELL = Finding("n1", "H100", {"torch": "2.14", "deep-ep": None}, 100.0, None)


def test_nodes_that_are_alike_are_well():
    assert compared([WELL, replace(WELL, host="n2", clock=101.0)]) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": "A100"}, "n2: has A100, n1 H100"),
        ({"versions": {"torch": "2.13", "deep-ep": None}}, "n2: torch 2.13, n1 has 2.14"),
        ({"versions": {"torch": "2.14", "deep-ep": "1.0"}}, "n2: deep-ep 1.0, n1 has None"),
        ({"disk": "'/x' has 3 bytes left"}, "n2: '/x' has 3 bytes left"),
        ({"clock": 90.0}, "n2: its clock is 10 s late"),
    ],
)
def test_a_node_that_differs_is_named_once(change, says):
    other = replace(WELL, host="n2", **change)
    assert compared([WELL, other, other]) == [says]


def test_a_node_below_the_median_of_the_job_is_named():
    speeds = [{"all-to-all": speed} for speed in (100.0, 98.0, 101.0, 60.0)]
    found = slow(speeds, ["n1", "n2", "n3", "n4"])
    assert found == ["n4: all-to-all at 61% of the median; --exclude the node"]


@pytest.mark.slow
@pytest.mark.parametrize(("needed", "code"), [(1, 0), (10**18, 1)])
def test_it_runs_on_every_rank_and_leaves_a_report(tmp_path, needed, code):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["megatron_growth.launcher.preflight", "--checkpoints", str(tmp_path / "checkpoints")]
    words += ["--bytes", str(needed), "--report", str(tmp_path / "report.json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [rank["versions"]["megatron-core"][:4] for rank in report["ranks"]] == ["0.19", "0.19"]
    assert all(rank["speeds"]["all-reduce in the node"] > 0 for rank in report["ranks"])
    assert bool(report["problems"]) == bool(code)
    assert not list((tmp_path / "checkpoints").iterdir())
