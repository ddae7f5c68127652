"""Command-line parsing, error messages, workers, file replacement, devices and machine resources."""

import contextlib
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import cli_utils
from cli_utils import (
    DataError,
    FlagParser,
    UsageError,
    available_cores,
    available_memory,
    map_files,
    parse_bool,
    printable,
    run_program,
    select_device,
    select_precision,
    worker_init,
)
from distributed import OtherRankFailed
from file_utils import atomic_file


def test_atomic_file_keeps_links_and_pipes(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    with atomic_file(link) as unfinished:
        unfinished.write_text("all of it")
    assert link.is_symlink()
    assert target.read_text() == "all of it"
    os.mkfifo(pipe)
    with atomic_file(pipe) as path:
        assert path == pipe
    assert pipe.is_fifo()


def test_sigterm_ends_a_worker_that_was_not_forked():
    loader = DataLoader(
        range(9),
        num_workers=1,
        worker_init_fn=worker_init,
        multiprocessing_context="forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn",
    )
    batches = iter(loader)
    next(batches)
    worker = multiprocessing.active_children()[0]
    try:
        worker.terminate()
        worker.join(10)
        assert not worker.is_alive()
    finally:
        worker.kill()  # pytest would wait for it at exit


def parser() -> FlagParser:
    flags = FlagParser(prog="p")
    flags.add_argument("--num-classes", type=int)
    flags.add_argument("--data-path")
    flags.add_argument("--freeze-layers", nargs="?", const=True, default=False, type=parse_bool)
    return flags


@pytest.mark.parametrize("argv", [["--num_classes", "3"], ["--num-classes=3"], ["--num_classes=3"]])
def test_flags_accept_dashes_and_underscores(argv):
    assert parser().parse_args(argv).num_classes == 3


def test_flag_values_keep_underscores():
    assert parser().parse_args(["--data_path=a_b/--c_d"]).data_path == "a_b/--c_d"
    assert parser().parse_args(["--data-path", "a_b"]).data_path == "a_b"


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--freeze-layers"], True),
        (["--freeze-layers", "True"], True),
        (["--freeze_layers", "false"], False),
    ],
)
def test_boolean_flag_values(argv, value):
    assert parser().parse_args(argv).freeze_layers is value


@pytest.mark.parametrize("argv", [["--freeze-layers", "maybe"], ["--num-classes", "x"], ["--unknown"], ["--num", "3"]])
def test_invalid_flag_is_a_one_line_error(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("p: error: ")
    assert len(stderr.splitlines()) == 1


def run(error: BaseException | None, status: int = 0) -> int:
    def program() -> int:
        if error is not None:
            raise error
        return status

    return run_program("p", program, memory_advice="free some", worker_advice="try --workers 0", error_status=2)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("--x: give a\nnumber"), 2, "p: error: --x: give a\\nnumber\n"),
        (DataError("no images"), 2, "p: error: no images\n"),
        (FileNotFoundError("a.png: no such file"), 2, "p: error: a.png: no such file\n"),
        (FloatingPointError("the loss is nan"), 2, "p: error: the loss is nan\n"),
        (MemoryError(), 2, "p: error: out of memory: free some\n"),
        (OtherRankFailed(), 2, ""),
        (BrokenPipeError(), 2, ""),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
        (None, 0, ""),
    ],
)
def test_expected_errors_are_one_line(capsys, error, status, line):
    assert run(error) == status
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("dead", ["DataLoader worker (pid(s) 7)", "Pin memory thread"])
def test_dead_worker_is_reported(capsys, dead):
    assert run(RuntimeError(f"{dead} exited unexpectedly")) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("p: error: a DataLoader worker died: ")
    assert "try --workers 0" in stderr


def test_lost_connection_is_reported_under_torchrun(capsys, monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore")
    with pytest.raises(RuntimeError):
        run(error)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(error) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("p: error: rank 1 has lost the connection to the other ranks")
    assert stderr.endswith("Connection closed by peer\n")
    assert run(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""  # rank 0 reports it


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_unexpected_errors_are_raised(error):
    with pytest.raises(type(error)):
        run(error)


@pytest.mark.parametrize("workers", [0, 2, None])
def test_map_files_keeps_order_and_random_state(monkeypatch, workers):
    monkeypatch.setattr(cli_utils, "MANY_FILES", 10)
    state = torch.get_rng_state()
    paths = [f"{number}.png" for number in range(20)]
    assert list(map_files(os.path.abspath, paths, workers, "reading")) == list(map(os.path.abspath, paths))
    assert list(map_files(os.path.abspath, [])) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_printable_escapes_control_characters():
    assert printable("daisy 向日葵 🌷") == "daisy 向日葵 🌷"
    assert printable("a\nb\x1b[31m\udcff") == "a\\nb\\x1b[31m\\udcff"


def test_select_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("cpu") == torch.device("cpu")
    assert capsys.readouterr().err == ""
    for name in ("cuda", "cuda:1", "0", "mps"):
        assert select_device(name) == torch.device("cpu")
        assert "using the CPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cuda") == select_device("0") == torch.device("cuda:0")
    assert select_device("cuda:1") == select_device("1") == torch.device("cuda:1")
    for name in ("cuda:2", "2", "gpu", "0,1", "", "cuda:-1"):
        with pytest.raises(UsageError, match="--device"):
            select_device(name)


def test_available_cores():
    assert 1 <= available_cores() <= os.cpu_count()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_available_memory():
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("capabilities", "amp", "dtype", "why"),
    [
        ({"avx512_bf16": True}, "auto", torch.bfloat16, "native on this CPU"),
        ({"amx_bf16": True}, "auto", torch.bfloat16, "native on this CPU"),
        ({"avx2": True}, "auto", None, "no native bfloat16"),
        ({"avx2": True}, "on", torch.bfloat16, "emulated"),
        ({"avx512_bf16": True}, "off", None, "--amp off"),
    ],
)
def test_select_precision_on_the_cpu(monkeypatch, capabilities, amp, dtype, why):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    chosen, words = select_precision(amp, torch.device("cpu"))
    assert chosen == dtype
    assert why in words


@pytest.mark.parametrize("has_it", [False, True])
def test_select_precision_with_older_torch(monkeypatch, has_it):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert select_precision("auto", torch.device("cpu"))[0] == (torch.bfloat16 if has_it else None)


@pytest.mark.parametrize(
    ("capability", "amp", "dtype", "name"),
    [
        ((9, 0), "auto", torch.bfloat16, "bfloat16 "),
        ((8, 0), "auto", torch.bfloat16, "bfloat16 "),
        ((7, 5), "auto", torch.float16, "float16 "),
        ((6, 1), "auto", None, "float32 ("),
        ((6, 1), "on", torch.float16, "float16 "),
        ((9, 0), "off", None, "float32 (--amp off; convolutions in TF32)"),
        ((7, 5), "off", None, "float32 (--amp off)"),
    ],
)
def test_select_precision_on_the_gpu(monkeypatch, capability, amp, dtype, name):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # some tests switch it off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    chosen, words = select_precision(amp, torch.device("cuda", 0))
    assert chosen == dtype
    assert words.startswith(name)
