"""Training under torchrun: restarts, stop signals, two hosts."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
from conftest import ROOT, TESTS
from ranks import SMALL, free_port, run_ranks, weights_of

import train
from distributed import Distributed
from run_utils import LAUNCH_FILE, StopRequest, StopSignals, find_launched_run

pytestmark = [
    pytest.mark.usefixtures("in_an_empty_folder", "small_network", "no_figures"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here"),
]


PROGRAM = """
import os, sys
sys.path[:0] = {folders!r}
import torch, train
from shortcuts import SmallResNet

finish = train.Run.finish_epoch


def note(run):
    if run.epoch == 1:
        path = f"epoch 1 of {{os.environ['RANK']}}.pth"
        torch.save(run.model.state_dict(), "unfinished " + path)
        os.replace("unfinished " + path, path)  # whole, for who waits for it
    finish(run)


train.MODELS["resnet18"] = SmallResNet
train.Run.finish_epoch = note
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def program() -> Path:
    """Write a train.py with a small network that saves the weights of each rank after epoch 1."""
    path = Path("program.py").absolute()
    path.write_text(PROGRAM.format(folders=[str(ROOT), str(TESTS)]))
    return path


def torchrun(
    program: Path,
    flags: list[str],
    when: Callable[[str, subprocess.Popen], None] = lambda line, process: None,
    *options: str,
) -> tuple[int, str]:
    """Run a program in two torchrun ranks, call `when` for each line, and return the exit status and the output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port())]
    command += [*options, str(program), *flags]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout:
                lines.append(line)
                when(line, process)
        except BaseException:  # a test timeout, for example: leaving the block would wait for the process
            process.kill()
            raise
    return process.returncode, "".join(lines)


def children_of(pid: int, program: str) -> list[int]:
    """Return the running child processes of `pid` that have `program` in their command line."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = []
    for child in children.read_text().split() if children.exists() else []:
        with contextlib.suppress(OSError):  # the process has just ended
            if program in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="only Linux tells which processes torchrun has started"
)
def test_restarts_after_kills_and_a_stop_are_bit_identical(sample, program):
    """Kill a rank once, or as often as the environment variable KILLS says."""
    kills = int(os.environ.get("KILLS", "1"))
    flags = ["--data-path", str(sample), *SMALL, "--epochs", str(kills + 6), "--batch-size", "4"]
    ends = []

    def interrupt(line: str, process: subprocess.Popen) -> None:
        if line.startswith("[epoch "):
            ends.append(line)
            if len(ends) <= kills:
                ranks = children_of(process.pid, program.name)
                assert len(ranks) == 2
                os.kill(ranks[len(ends) % len(ranks)], signal.SIGKILL)
            elif len(ends) == kills + 1:
                process.send_signal(signal.SIGTERM)

    status, said = torchrun(program, [*flags, "--name", "interrupted"], interrupt, f"--max-restarts={2 * kills}")
    assert status != 0
    assert said.count("runs/interrupted, resumed at epoch") == kills, said
    assert said.count("train.py: stopped at epoch") == 1, said
    assert said.count("2 processes") == kills + 1
    assert "Exception raised from" not in said, said  # by C++, which prints its stack
    assert run_ranks(2, lambda: train.main(["--resume", "interrupted"])) == [0, 0]
    assert [path.name for path in Path("runs").iterdir() if path.is_dir()] == ["interrupted"]

    assert run_ranks(2, lambda: train.main([*flags, "--name", "undisturbed"])) == [0, 0]
    undisturbed = weights_of(Path("runs/undisturbed"))
    assert all(value.equal(undisturbed[key]) for key, value in weights_of(Path("runs/interrupted")).items())


@pytest.fixture
def two_hosts():
    """Create two linked network namespaces and return the name, interface and address of each."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2, and root")
    hosts = [(f"ranks{os.getpid()}{name}", f"veth{name}", f"10.213.7.{number}") for number, name in enumerate("ab", 1)]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {shlex.join(words)}: {done.stderr.strip()}")

    (first, cable, _), (second, other_cable, _) = hosts
    try:
        ip("netns", "add", first)
        ip("netns", "add", second)
        ip("-n", first, "link", "add", cable, "type", "veth", "peer", "name", other_cable, "netns", second)
        for name, end, address in hosts:
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for name, *_ in hosts:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_train_together_and_exit_when_the_link_fails(sample, two_hosts, program, monkeypatch):
    flags = ["--data-path", str(sample), *SMALL, "--batch-size", "16", "--epochs", "1000", "--timeout", "5"]
    endpoint = f"{two_hosts[0][2]}:29500"

    def start(host: tuple[str, str, str], option: str) -> subprocess.Popen:
        name, cable, address = host
        Path(address).mkdir(exist_ok=True)
        command = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}", "OMP_NUM_THREADS=1"]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--local-addr={address}"]
        command += [option, str(program), *flags]
        return subprocess.Popen(
            command, cwd=address, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    # Set is_host explicitly: torchrun recognises only addresses to which the host name resolves.
    processes = [start(host, f"--rdzv-conf=is_host={int(host is two_hosts[0])}") for host in two_hosts]
    try:
        notes = [[Path(address, f"epoch 1 of {rank}.pth") for rank in (0, 1)] for *_, address in two_hosts]
        wait_for(lambda: all(any(path.exists() for path in paths) for paths in notes), 120)
        states = [torch.load(path) for paths in notes for path in paths if path.exists()]
        assert all(value.equal(states[1][key]) for key, value in states[0].items() if "running" not in key)

        subprocess.run(["ip", "-n", two_hosts[0][0], "link", "set", two_hosts[0][1], "down"], check=True)
        cut = time.monotonic()
        wait_for(lambda: not any(children_of(process.pid, program.name) for process in processes), 60)
        assert time.monotonic() - cut < 30
    finally:
        for process in processes:
            for child in [*children_of(process.pid, program.name), process.pid]:
                with contextlib.suppress(ProcessLookupError):  # the process has just ended
                    os.kill(child, signal.SIGKILL)
    for number, process in enumerate(processes):
        assert "has lost the connection to the other ranks" in process.stdout.read(), number
    monkeypatch.chdir(two_hosts[0][2])
    assert list(Path("runs").rglob("*.tmp*")) == []
    assert run_ranks(2, lambda: train.main(["--resume", "--patience", "1"])) == [0, 0]


def test_run_of_matches_the_launch_id_of_any_host():
    """Rank 0 may be on another host after a restart."""
    for name, launch_ids in {"a": "id one 1 5\nid two 1 7", "b": "id three 1 8", "c": "id four 1 9"}.items():
        Path("runs", name, "weights").mkdir(parents=True)
        Path("runs", name, LAUNCH_FILE).write_text(launch_ids)
        if name != "c":
            Path("runs", name, "weights", "last.pth").touch()
    assert find_launched_run({"id two 1 7", "id five 1 3"}) == str(Path("runs", "a"))
    assert find_launched_run({"id five 1 3"}) is find_launched_run({"id four 1 9"}) is find_launched_run(set()) is None


def test_a_second_signal_under_torchrun_does_not_abort():
    """Torchrun sends one, and whatever started torchrun sends another."""

    def get_two_signals() -> int:
        with StopSignals(Distributed()) as stop:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(StopRequest) as raised:
                stop.check()
            return raised.value.number

    assert run_ranks(1, get_two_signals) == [signal.SIGTERM]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.2)
