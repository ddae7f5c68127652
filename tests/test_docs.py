"""README.md and docs/: links and anchors resolve, flags exist and are documented, commands parse and run."""

import io
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import check_data
import config
import predict

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
READMES = [ROOT / "README.md", ROOT / "docs" / "README.zh-CN.md"]
PARSERS = {"train.py": config.parse_args, "predict.py": predict.parse_args, "check_data.py": check_data.parse_args}
DOCUMENTED_IN = {"train.py": "training.md", "predict.py": "predict.md", "check_data.py": "data.md"}
# Programs of tests/, whose flags occur in prose and tables.
TOOLS = [ROOT / "tests" / "bench.py", ROOT / "tests" / "faults.py", ROOT / "sample_flowers.py"]
OTHER_PROGRAMS = {"--logdir", "--max-restarts", "--shm-size"}  # flags of tensorboard, torchrun and docker
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*[a-z]")


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


def test_readme_commands_run(tmp_path, monkeypatch, capsys):
    """Train in an empty copy of the project, with tiny images, and run the README's other commands on the result."""
    for module in ROOT.glob("*.py"):
        shutil.copy(module, tmp_path)
    shutil.copytree(ROOT / "plot_img", tmp_path / "plot_img")
    for name, colour in (("cat", "orange"), ("dog", "gray")):
        folder = tmp_path / "my_photos" / name
        folder.mkdir(parents=True)
        for index in range(5):
            pixels = np.random.default_rng([index, len(colour)]).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.blend(Image.fromarray(pixels), Image.new("RGB", (48, 48), colour), 0.5).save(folder / f"{index}.jpg")
    shutil.copy(tmp_path / "my_photos" / "cat" / "0.jpg", tmp_path / "photo.jpg")
    calls = program_calls(ROOT / "README.md")

    own = ["--data-path", "my_photos"]
    assert ("train.py", own) in calls
    small = ["--model", "resnet18", "--img-size", "32", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    command = [sys.executable, "train.py", *own, *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "flower_experiment" / "weights" / "best.pth").exists()

    monkeypatch.chdir(tmp_path)
    programs = {"check_data.py": check_data.main, "predict.py": predict.main}
    others = [(program, words) for program, words in calls if program in programs]
    assert {program for program, _ in others} == set(programs)
    for program, words in others:
        assert programs[program](words) == 0, f"{program} {shlex.join(words)}: {capsys.readouterr().err}"
    assert Path("prediction.png").exists()
    assert Path("data_health.png").exists()
