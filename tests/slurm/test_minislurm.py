"""The SLURM of these tests ends with whoever started it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import minislurm
from tests.slurm.minislurm import belonging, environment, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# A job whose processes hear no TERM, one of them in a session of its own.
JOB = "trap '' TERM; export SLEEPER=1; srun bash -c 'trap \"\" TERM; setsid sleep 900 & sleep 900'"
STARTS_ONE = f"""
import sys, time
from pathlib import Path
from tests.slurm import minislurm
slurm = minislurm.start(Path(sys.argv[1]))
slurm.run("sbatch", "--output=/dev/null", "--wrap", {JOB!r})
time.sleep(900)
"""


def test_nothing_is_left_when_the_tests_are_killed(tmp_path):
    reason = minislurm.missing()
    if reason:
        pytest.skip(reason)
    root, repository = tmp_path / "slurm", Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", STARTS_ONE, root]
    conf = root / "etc/slurm.conf"
    with subprocess.Popen(words, cwd=repository) as tests:
        wait_for(lambda: _sleepers(conf) >= 4, 60)  # the two, and the shell and srun above them
        tests.kill()
    wait_for(lambda: not belonging(conf), 30)


def _sleepers(conf: Path) -> int:
    return sum("SLEEPER=1" in environment(pid) for pid in belonging(conf))
