"""A short form of each campaign of faults.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")


@pytest.mark.skipif(sys.platform != "linux", reason="the campaigns look into /proc")
@pytest.mark.parametrize(
    ("campaign", "rounds"),
    [("kill", 5), ("signals", 3), ("disk", 3), ("files", 300), ("hostile", 1), ("concurrent", 4)],
)
def test_nothing_goes_wrong(campaign, rounds, tmp_path):
    command = [sys.executable, FAULTS, campaign, "--rounds", str(rounds), "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^  .* (\d+) times, (\d+) wrong$", done.stdout, re.M)
    assert len(table) >= 2
    assert all(int(times) > 0 and wrong == "0" for times, wrong in table)
