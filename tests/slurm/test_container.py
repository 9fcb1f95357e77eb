"""The container options of a job, parsed by a real srun. No container is made."""

import pytest

from tests.launcher.rendering import stub
from tests.slurm import minislurm
from tests.slurm.minislurm import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# Says what srun understood, and counts as trained.
PYTHON = """echo "$STAND_IN_IMAGE|${STAND_IN_MOUNTS-none}|$STAND_IN_NO_HOME"
[[ $* == *preflight* ]] && exit
save=$(grep -oP -- "--save \\K\\S+" <<<"$*")
mkdir -p "$save"
echo 1000 >"$save"/latest_checkpointed_iteration.txt
"""


def test_every_step_asks_for_the_container(slurm, chain, corpus, tmp_path):
    reason = minislurm.no_container_options()
    if reason:
        pytest.skip(reason)
    mounts = [f"{tmp_path}:{tmp_path}", f"{corpus}:{corpus}:ro", "/home/a b:/b"]
    image = "user@registry.example.com#team/image:1.0"
    run = chain(**{
        "cluster.python": str(stub(tmp_path, "python", PYTHON)),
        "cluster.container": {"image": image, "mounts": mounts},
    })  # fmt: skip
    run.launch()
    wait_for(lambda: slurm.state(run.job("grown")) == "COMPLETED", 60)
    for stage in ("base", "grown"):
        for kind in ("preflight", "train"):
            said = run.said(stage, 0, kind).splitlines()
            assert said == [f"{image}|{','.join(mounts)}|yes"] * 2, "two ranks"
