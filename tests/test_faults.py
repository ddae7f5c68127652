"""Short versions of the campaigns of faults.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    command = [sys.executable, FAULTS, "all", "--short", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("faults"), capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the campaigns look into /proc")
@pytest.mark.parametrize("campaign", ["kill", "signals", "disk", "files", "hostile", "concurrent"])
def test_campaign_finds_no_faults(campaign, printed):
    table = re.search(rf"^{campaign}\n((?:  .* \d+ times, \d+ wrong\n)+)", printed, re.M)
    assert table, printed
    rows = re.findall(r" (\d+) times, (\d+) wrong$", table[1], re.M)
    assert len(rows) >= 2
    assert all(int(times) > 0 and wrong == "0" for times, wrong in rows), printed
