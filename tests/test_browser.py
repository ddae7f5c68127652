"""TensorBoard in headless Chromium: each test opens one tab of a fresh run.

Set SCREENSHOTS=FOLDER to keep a screenshot of each tab.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its chromedriver")

NAMES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
SECONDS = 25  # timeout for content to appear
# TensorBoard nests its pages in shadow roots, which document.querySelectorAll does not search.
FIND = """
const below = (root, selector) => [...root.querySelectorAll('*'), ...(root.shadowRoot ? [root.shadowRoot] : [])]
    .flatMap(node => [
        ...(node.matches?.(selector) ? [node] : []),
        ...(node.shadowRoot || node instanceof ShadowRoot ? below(node.shadowRoot ?? node, selector) : []),
    ]);
const found = below(document, arguments[0]);
const text = node => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (['STYLE', 'SCRIPT', 'TEMPLATE', 'DOM-MODULE'].includes(node.tagName)) return '';
    return [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes].map(child =>
        child.nodeType === Node.DOCUMENT_FRAGMENT_NODE ? [...child.childNodes].map(text).join(' ') : text(child)
    ).join(' ');
};
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory, sample) -> Iterator[str]:
    """Serve a run of two epochs on the drawn sample with TensorBoard, and yield its address."""
    folder = tmp_path_factory.mktemp("browser")
    flags = ["--data-path", str(sample), "--model", "resnet18", "--img-size", "32", "--workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*flags, "--epochs", "2", "--device", "cpu", "--name", "seen"]) == 0
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", str(port), "--load_fast=false"]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                break
            time.sleep(0.2)
        yield f"http://localhost:{port}/"
    finally:
        server.terminate()
        server.wait()


class Browser:
    """A Chromium window."""

    def __init__(self, address: str) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
            options.add_argument(flag)
        options.add_argument("--enable-unsafe-swiftshader")  # the projector draws with WebGL
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        self.address = address

    def open(self, tab: str) -> None:
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}#{tab}")

    def find(self, selector: str) -> list:
        return self.driver.execute_script(f"{FIND} return found;", selector)

    def text(self, selector: str) -> str:
        """Return the text of the matching elements, hidden parts included."""
        return self.driver.execute_script(f"{FIND} return found.map(text).join(' ').replace(/\\s+/g, ' ');", selector)

    def curves(self, selector: str) -> bool:
        """Return whether each matching element contains a curve with several points."""
        script = f"""{FIND}
            const isIcon = path => path.getRootNode().host?.matches('iron-icon');
            const isCurve = path => /^M[^N]*L[^N]*$/.test(path.getAttribute('d')) && !isIcon(path);
            return found.length > 0 && found.every(element => below(element, 'path').some(isCurve));
        """
        return self.driver.execute_script(script, selector)

    def until(self, look: Callable[[], object]) -> object:
        """Poll `look` until it returns a true value, and return that value."""
        end = time.monotonic() + SECONDS
        while not (seen := look()):
            assert time.monotonic() < end, "nothing to be seen"
            time.sleep(0.2)
        return seen

    def look(self, tab: str) -> None:
        if os.environ.get("SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(os.environ["SCREENSHOTS"], f"{tab}.png")))

    def errors(self) -> list[str]:
        """Return the console's errors, except those of TensorBoard's requests to the internet."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE" and "localhost" in entry["message"]]


@pytest.fixture(scope="module")
def browser(address) -> Iterator[Browser]:
    pytest.importorskip("selenium")
    browser = Browser(address)
    yield browser
    browser.driver.quit()


@pytest.fixture(autouse=True)
def no_console_errors(browser) -> Iterator[None]:
    yield
    assert browser.errors() == []


def test_scalars(browser):
    browser.open("scalars")
    tags = ["accuracy", "best_accuracy", "learning_rate", "macro_f1", "train_accuracy", "train_loss", "val_loss"]
    groups = [*tags, "recall", "speed", "memory", "step"]
    browser.until(lambda: set(groups) <= set(browser.text("tf-category-paginated-view").split()))
    browser.until(lambda: browser.curves("vz-line-chart2"))
    browser.look("scalars")


def test_custom_scalars(browser):
    browser.open("custom_scalars")
    card = "tf-custom-scalar-multi-line-chart-card"
    browser.until(lambda: len(browser.find(card)) == 3)
    browser.until(lambda: {"Matches (2)", "Matches (5)"} <= set(re.findall(r"Matches \(\d\)", browser.text(card))))
    assert "recall per class" in browser.text(card)
    browser.until(lambda: browser.curves(card))
    browser.look("custom_scalars")


def test_images(browser):
    browser.open("images")
    tags = ["confusion matrix", "predictions vs. actuals", "reliability", "training batch", "worst mistakes"]
    browser.until(lambda: all(tag in browser.text("tf-category-paginated-view") for tag in tags))
    script = f"{FIND} return found.map(image => [image.naturalWidth, image.naturalHeight]);"

    def all_loaded() -> bool:
        # In every poll, as a click on a heading that TensorBoard is about to open closes it.
        for closed in browser.find("button.heading:not([open-button])"):
            browser.driver.execute_script("arguments[0].click()", closed)
        sizes = browser.driver.execute_script(script, "img")
        return len(sizes) == len(tags) and all(width > 400 and height > 200 for width, height in sizes)

    browser.until(all_loaded)
    browser.look("images")


def test_graphs(browser):
    from selenium.webdriver import ActionChains

    browser.open("graphs")
    node = browser.until(lambda: [g for g in browser.find("g.node") if g.get_attribute("data-name") == "ResNet"])[0]
    time.sleep(1)  # wait for the layout animation
    ActionChains(browser.driver).double_click(node).perform()
    browser.until(lambda: {"conv1", "layer4"} <= set(re.findall(r"\w+", browser.text("g.node"))))
    browser.look("graphs")


@pytest.mark.parametrize(
    ("tab", "chart"), [("histograms", "vz-histogram-timeseries"), ("distributions", "vz-distribution-chart")]
)
def test_histograms_and_distributions(browser, tab, chart):
    browser.open(tab)
    browser.until(lambda: {"conv1", "layer1"} <= set(browser.text("tf-category-paginated-view").split()))
    browser.until(lambda: browser.curves(chart))
    browser.look(tab)


def test_text(browser):
    browser.open("text")
    browser.until(lambda: "python train.py" in browser.text("tf-text-loader"))
    words = set(browser.text("tf-text-loader").split())
    assert {"daisy", "training", "batch_size", "torch", "resnet18"} <= words
    browser.look("text")


def test_pr_curves(browser):
    browser.open("pr_curves")
    browser.until(lambda: len(browser.find("tf-pr-curve-card")) == 5)
    assert all(f"class/{name}" in browser.text("tf-pr-curve-card") for name in NAMES)
    browser.until(lambda: browser.curves("tf-pr-curve-card"))
    browser.look("pr_curves")


def test_projector(browser):
    browser.open("projector")
    for _ in range(2):  # two nested iframes
        browser.driver.switch_to.frame(browser.until(lambda: browser.find("iframe"))[0])
    browser.until(lambda: re.search(r"Points: *20", browser.text("vz-projector")))
    browser.until(lambda: browser.find("canvas"))
    browser.driver.switch_to.default_content()
    time.sleep(1)
    browser.look("projector")


def test_hparams(browser):
    browser.open("hparams")
    words = ("batch_size", "epochs", "lr", "model", "accuracy", "macro_f1", "seen")
    browser.until(lambda: set(words) <= set(browser.text("tf-hparams-main").split()))
    browser.look("hparams")
