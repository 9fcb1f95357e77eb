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


@pytest.mark.parametrize(
    ("mounts", "understood"),
    [(["/lustre:/lustre", "/home/a b:/b"], "/lustre:/lustre,/home/a b:/b"), ([], "none")],
)
def test_every_step_asks_for_the_container(slurm, chain, tmp_path, mounts, understood):
    reason = minislurm.no_container_options()
    if reason:
        pytest.skip(reason)
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
            assert said == [f"{image}|{understood}|yes"] * 2, "two ranks"
