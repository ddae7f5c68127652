"""Make the pictures in screenshots/ from the README's first command.

python tests/make_screenshots.py                  # trains first; takes a few minutes
python tests/make_screenshots.py --runs runs      # uses the runs that are there

It opens TensorBoard in headless Chromium, and needs Chromium, its chromedriver and selenium.
"""

import argparse
import contextlib
import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
README, SCREENSHOTS = ROOT / "README.md", ROOT / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SECONDS = 60  # to wait for a page to be complete

# For each picture of a page: the tab, and the size of the window in CSS pixels.
PAGES = {
    "tensorboard": ("custom_scalars", 1450, 640),
    "graphs": ("graphs", 1160, 900),
    "histograms": ("histograms", 1160, 760),
    "projector": ("projector", 1160, 900),
}
# For each figure of the IMAGES tab: its tag.
FIGURES = {
    "predictions": "predictions vs. actuals",
    "confusion_matrix": "confusion matrix",
    "worst_mistakes": "worst mistakes",
    "training_batch": "training batch",
}
# TensorBoard nests its pages in shadow roots, which document.querySelectorAll does not search.
FIND = """
const find = (root, selector) => [...root.querySelectorAll('*')].flatMap(node => [
    ...(node.matches(selector) ? [node] : []), ...(node.shadowRoot ? find(node.shadowRoot, selector) : [])]);
"""


def main() -> None:
    """Train, predict, and photograph each tab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="use the runs in this folder instead of training")
    parser.add_argument("--only", nargs="+", choices=PAGES, help="make only these pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = args.runs.resolve() if args.runs else Path(folder, "runs")
        if not args.runs:
            subprocess.run([sys.executable, *first_command()], cwd=folder, check=True)
        if not args.only:
            predict(runs)
            draw_figures(runs)
        with tensorboard(runs) as address, browser() as driver:
            for name in args.only or PAGES:
                photograph(driver, address, name)
                print(f"screenshots/{name}.png", flush=True)


def first_command() -> list[str]:
    """Return the README's first training command, with the absolute path of train.py."""
    command = re.search(r"\.venv/bin/python (train\.py [^\n]+)", README.read_text(encoding="utf-8"))[1]
    program, *flags = shlex.split(command)
    return [str(ROOT / program), *flags]


def predict(runs: Path) -> None:
    """Run the README's prediction with Grad-CAM."""
    words = re.search(r"python (predict\.py .*--save-plot \S+)", README.read_text(encoding="utf-8"))[1].split()
    weights = next(runs.glob("*/weights/best.pth"))
    with tempfile.TemporaryDirectory() as folder:  # predict.py does not overwrite pictures that it has not drawn
        words[-1] = str(Path(folder, words[-1]))
        subprocess.run([sys.executable, *words, "--weights", str(weights)], cwd=ROOT, check=True)
        save(Image.open(words[-1]), "prediction")


def draw_figures(runs: Path) -> None:
    """Save the last figures of the IMAGES tab."""
    events = EventAccumulator(str(next(runs.glob("*/events.out.tfevents.*"))), size_guidance={"images": 1})
    events.Reload()
    for name, tag in FIGURES.items():
        save(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)), name)


@contextlib.contextmanager
def tensorboard(runs: Path) -> Iterator[str]:
    """Serve `runs`, and yield TensorBoard's address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs.name, "--port", str(port)]
    command += ["--load_fast=false"]
    server = subprocess.Popen(command, cwd=runs.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                break
            time.sleep(0.2)
        time.sleep(5)  # it reads the event files
        yield f"http://localhost:{port}/"
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Start Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars")
    for flag in (*flags, "--force-device-scale-factor=1.5", "--enable-unsafe-swiftshader"):  # for WebGL
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def photograph(driver: webdriver.Chrome, address: str, name: str) -> None:
    """Open a page, wait until it stops changing, and save its picture."""
    tab, width, height = PAGES[name]
    driver.set_window_rect(0, 0, width, height)
    driver.get("about:blank")
    driver.get(f"{address}#{tab}")
    image = wait_until_still(driver)
    if tab == "graphs":  # open the network, then click beside it to deselect it
        node = driver.execute_script(f"{FIND} return find(document, 'g.node[data-name=ResNet]')[0];")
        ActionChains(driver).double_click(node).perform()
        wait_until_still(driver)
        builder = ActionBuilder(driver)
        builder.pointer_action.move_to_location(450, 400).click()
        builder.perform()
        image = wait_until_still(driver)
    save(image, name)


def wait_until_still(driver: webdriver.Chrome) -> Image.Image:
    """Return a screenshot that has not changed for three seconds."""
    end, before, still = time.monotonic() + SECONDS, b"", 0
    while still < 3 and time.monotonic() < end:
        time.sleep(1)
        shot = driver.get_screenshot_as_png()
        still = still + 1 if shot == before else 0
        before = shot
    return Image.open(io.BytesIO(before))


def save(image: Image.Image, name: str) -> None:
    """Save a picture in 256 colours on an opaque background, as GitHub may show it on black."""
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    opaque.quantize(256, dither=Image.Dither.NONE).save(SCREENSHOTS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
