"""README.md and docs/: links and anchors resolve, flags exist and are documented, commands parse and run."""

import functools
import hashlib
import importlib
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import urllib.request
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

import check_data
import config
import cross_validate
import evaluate
import export
import predict
from model import MODELS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
READMES = [ROOT / "README.md", ROOT / "docs" / "README.zh-CN.md"]
PARSERS = {
    "train.py": config.parse_args,
    "predict.py": predict.parse_args,
    "evaluate.py": evaluate.parse_args,
    "check_data.py": check_data.parse_args,
    "cross_validate.py": cross_validate.parse_args,
    "export.py": export.parse_args,
}
DOCUMENTED_IN = {
    "train.py": "training.md",
    "predict.py": "predict.md",
    "evaluate.py": "evaluate.md",
    "check_data.py": "data.md",
    "cross_validate.py": "cross-validation.md",
    "export.py": "deploy.md",
}
# Programs of tests/, whose flags occur in prose and tables.
TOOLS = [ROOT / "tests" / "bench.py", ROOT / "tests" / "faults.py", ROOT / "sample_flowers.py"]
OTHER_PROGRAMS = {"--logdir", "--max-restarts", "--shm-size"}  # flags of tensorboard, torchrun and docker
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")


# --- Markdown -----------------------------------------------------------------------------------------------------


def code_blocks(page: Path, language: str = r"\w*") -> str:
    """Return the lines of the fenced code blocks of a page."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))


def prose(page: Path) -> str:
    """Return a page without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.+?) *$", prose(page), re.M):
        text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", title).strip().lower()  # links are replaced by their text
        kept = [c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN" or unicodedata.category(c) == "Mn"]
        anchor = "".join(kept).replace(" ", "-")
        number = next(n for n in range(len(found) + 1) if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def commands(page: Path) -> list[list[str]]:
    """Return the command lines of a page's shell blocks as words, split at `&&`, without redirections."""
    lines = []
    for line in code_blocks(page, "sh").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            lines.append(command[: command.index(">")] if ">" in command else command)
    return lines


def program_calls(page: Path) -> list[tuple[str, list[str]]]:
    """Return the program and the arguments of each command of a page that runs one of PARSERS."""
    calls = []
    for words in commands(page):
        program = next((word for word in words if word in PARSERS), None)
        if program is not None:
            calls.append((program, words[words.index(program) + 1 :]))
    return calls


def help_flags(program: str) -> set[str]:
    """Return the flags in a program's --help."""
    with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
        PARSERS[program](["--help"])
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", output.getvalue(), re.M)) - {"--help"}


# --- tests --------------------------------------------------------------------------------------------------------


def test_readme_fits_on_a_screen_or_two():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}, which has no such heading"


def test_every_page_of_docs_is_linked_from_the_readmes():
    for readme in READMES:
        targets = {(readme.parent / target.partition("#")[0]).resolve() for target in linked_files(readme)}
        others = {page for page in PAGES if page not in READMES}
        assert others <= targets, f"{readme.name} does not link to {[page.name for page in others - targets]}"


def linked_files(page: Path) -> list[str]:
    """Return the targets of a page's links within the project."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"\w+:", target)]


def test_every_picture_is_used():
    used = {(page.parent / target).resolve() for page in PAGES for target in linked_files(page)}
    assert set((ROOT / "screenshots").glob("*")) <= used


@pytest.mark.parametrize("program", PARSERS)
def test_every_flag_is_documented(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = (ROOT / "docs" / DOCUMENTED_IN[program]).read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(--[\w-]+)` \|", text, re.M))
    flags = help_flags(program)
    if program == "cross_validate.py":  # its page refers to that of train.py for the other flags
        assert flags > help_flags("train.py")
        flags = flags - help_flags("train.py") | {"--name", "--best-metric", "--resume"}
    assert flags
    assert documented == flags, f"{DOCUMENTED_IN[program]} and --help differ in {sorted(documented ^ flags)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_mentioned_flag_exists(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    known = set().union(*map(help_flags, PARSERS))
    known |= {flag for tool in TOOLS for flag in re.findall(r'"(--[a-z-]+)"', tool.read_text(encoding="utf-8"))}
    known |= {"--help", *OTHER_PROGRAMS}
    mentioned = {flag.replace("_", "-") for flag in FLAG.findall(prose(page))}
    assert mentioned <= known, f"{page.name} mentions {sorted(mentioned - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    for program, words in program_calls(page):
        try:
            PARSERS[program](words)
        except SystemExit as error:
            pytest.fail(f"{page.name}: {program} {shlex.join(words)}: exit status {error.code}")


def test_readmes_have_the_same_first_commands():
    english, chinese = (commands(readme) for readme in READMES)
    assert english[:5] == chinese[:5]


def test_recipes_are_documented():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    names = re.search(r"^\| \| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", text, re.M).groups()
    assert set(names) == set(config.RECIPES)
    rows = re.findall(r"^\| `--([\w-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert {flag for flag, *_ in rows} >= {"epochs", "batch-size", "lr", "lrf", "warmup", "weight-decay"}
    for column, name in enumerate(names, start=1):
        defaults = vars(config.parse_args(["--recipe", name]))
        for row in rows:
            assert float(row[column]) == defaults[row[0].replace("-", "_")], f"{name}: --{row[0]}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "architecture.md"], ids=lambda page: page.name)
def test_every_module_is_listed(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    listed = {name for line in lines if re.match(r"(\| `)?\w+\.py\b", line) for name in re.findall(r"\w+\.py\b", line)}
    assert sorted({path.name for path in ROOT.glob("*.py")} - listed) == []
    assert sorted(name for name in listed if not (ROOT / name).exists() and name != "bench.py") == []


def test_python_example_runs(small_network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/flower_experiment/weights").mkdir(parents=True)
    content = {"model": "resnet18", "class_names": ["cat", "dog"], "img_size": 32}
    state = MODELS["resnet18"](num_classes=2).state_dict()
    torch.save(content | {"state_dict": state}, "runs/flower_experiment/weights/best.pth")
    Image.new("RGB", (48, 32)).save("photo.jpg")
    Path("example.py").write_text(code_blocks(ROOT / "docs" / "predict.md", "python"), encoding="utf-8")
    runpy.run_path("example.py")
    assert capsys.readouterr().out in ("cat\n", "dog\n")


# --- the commands of the READMEs ----------------------------------------------------------------------------------

PARSED_ONLY = (
    "python3 -m venv",
    ".venv/bin/pip install",
    ".venv/bin/python -m pytest",
    "torchrun ",
)  # install, or slow
SMALL = ["--model", "resnet18", "--img-size", "32", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """Copy the project to an empty folder, as the current folder, and import its modules from there."""
    folder = tmp_path / "project"
    folder.mkdir()
    for module in ROOT.glob("*.py"):
        shutil.copy(module, folder)
        monkeypatch.setitem(sys.modules, module.stem, None)  # restores or removes it afterwards
        del sys.modules[module.stem]
    shutil.copytree(ROOT / "plot_img", folder / "plot_img")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def small_project(project, server, tmp_path, monkeypatch) -> Path:
    """Shrink the network, the figures and the sample, and serve the downloads on loopback."""
    www, address = server
    model, prepare_data = importlib.import_module("model"), importlib.import_module("prepare_data")
    monkeypatch.setitem(model.MODELS, "resnet18", functools.partial(model.ResNet, model.BasicBlock, [1, 1, 1, 1]))
    logger = importlib.import_module("tensorboard_logger").TensorBoardLogger
    monkeypatch.setattr(logger, "draw", lambda *arguments: None)
    draw_sample = functools.partial(prepare_data.draw_sample, images_per_class=5, size=48)
    monkeypatch.setattr(prepare_data, "draw_sample", draw_sample)

    torch.save(model.MODELS["resnet18"](num_classes=1000).state_dict(), www / "weights.pth")
    checksum = hashlib.sha256((www / "weights.pth").read_bytes()).hexdigest()
    weights = (www / "weights.pth").rename(www / f"resnet18-{checksum[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(ResNet18_Weights.DEFAULT.value, "url", f"{address}/{weights.name}")

    for name, colour in (("cat", "orange"), ("dog", "gray")):
        folder = project / "my_photos" / name
        folder.mkdir(parents=True)
        for index in range(5):
            pixels = np.random.default_rng([index, len(colour)]).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.blend(Image.fromarray(pixels), Image.new("RGB", (48, 48), colour), 0.5).save(folder / f"{index}.jpg")
    shutil.copy(project / "my_photos" / "cat" / "0.jpg", project / "photo.jpg")
    with tarfile.open(www / "flowers.tgz", "w:gz") as tar:
        tar.add(project / "my_photos", "flower_photos")
    source = {"url": f"{address}/flowers.tgz", "md5": hashlib.md5((www / "flowers.tgz").read_bytes()).hexdigest()}
    download = functools.partial(prepare_data.download_flower_photos, **source)
    monkeypatch.setattr(prepare_data, "download_flower_photos", download)
    return project


def run_program(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a program of the current folder in this process, as `python PROGRAM WORDS`, and return its exit status."""
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(program, run_name="__main__")
    return stop.value.code


def stop_after_one_step(patch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the first step of the next training."""
    run = importlib.import_module("run_state").Run
    patch.setattr(run, "save_is_due", lambda run: signal.raise_signal(signal.SIGINT))


def runs_on_tensorboard(words: list[str]) -> list[str]:
    """Start TensorBoard, fetch the list of runs once there is one, and stop it."""
    command = [sys.executable, "-m", "tensorboard.main", *words, "--port", "0"]  # a free port
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://localhost:\d+/", line)))
            end = time.monotonic() + 30
            runs = []
            while not runs and time.monotonic() < end:
                time.sleep(0.1)
                with urllib.request.urlopen(f"{address}data/runs") as answer:
                    runs = json.load(answer)
        finally:
            server.terminate()
            server.stderr.read()
    return runs


def test_readme_commands_run(small_project, monkeypatch, capsys):
    """Run the commands of README.md, and those that only the Chinese page has, in an empty copy of the project.

    The training that precedes a plain --resume is stopped after one step.
    """
    english, chinese = (commands(readme) for readme in READMES)
    lines = english + [words for words in chinese if words not in english]
    done = set()
    for words, following in itertools.pairwise([*lines, []]):
        line, program = shlex.join(words), next((word for word in words if word in PARSERS), None)
        if line.startswith(PARSED_ONLY):
            continue
        if words[0] == "tensorboard":
            assert set(runs_on_tensorboard(words[1:])) == {
                path.name for path in Path("runs").iterdir() if path.is_dir()
            }
            done.add("tensorboard")
            continue
        assert program, f"an unknown kind of command: {line}"
        arguments, expected = words[words.index(program) + 1 :], 0
        if program in ("train.py", "cross_validate.py") and "--resume" not in arguments:
            arguments += [*SMALL, *(["--time-budget", "0.001"] if "--time-budget" in arguments else ["--epochs", "1"])]
        elif "--epochs" in arguments:
            arguments += ["--patience", "1"]
        with monkeypatch.context() as patch:
            if following[-2:] == ["train.py", "--resume"]:
                stop_after_one_step(patch)
                expected = 130
            status = run_program(program, arguments, patch)
        said = capsys.readouterr()
        assert status == expected, f"{line}: {said.err}"
        assert arguments != ["--resume"] or "resumed at epoch 0, step 1" in said.out
        done |= {program, *(word for word in words if word.startswith("--"))}
    assert done >= {"tensorboard", *PARSERS, "--recipe", "--weights", "--freeze-layers", "--resume", "--download"}
    for name in ("runs/flower_experiment/weights/best.pth", "prediction.png", "data_health.png", "predictions.csv"):
        assert Path(name).exists(), name
    for name in ("data/sample_flowers/daisy", "flower_photos/cat", "my_photos/cat"):
        assert Path(name).is_dir(), name
