"""The report in a real browser: headless Chromium, driven by selenium. `make test-browser` runs these.

Without Chromium they fail instead of being skipped.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from fusion.reporting.records import unpack
from tests.reporting.conftest import Write, write  # noqa: F401
from tests.reporting.test_page import EVIL, contents, example_runs, inspection, write_attention, write_history, written

pytestmark = pytest.mark.browser
WIDTHS = (400, 1600)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chrome]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    assert browser and driver, "no Chromium with its driver: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    started.set_page_load_timeout(60)
    started.set_script_timeout(30)
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture
def page(tmp_path: Path, write: Write) -> Path:  # noqa: F811
    """A report of four targets, with a name that contains markup and a script."""
    example_runs(write)
    example_runs(write, "cb")
    write_attention(write("rte", sources=[EVIL, "b"], wrong=1, score=0.95), EVIL)
    write("rte", wrong=5, score=0.75)
    for rate, wrong in ((0.1, 2), (0.2, 4)):  # settings with a long name, in every caption
        changes = {"adapter__a_rather_long_name_of_a_setting": rate, "adapter__another_name_of_a_setting": rate}
        folder = write("wnli", score=1 - wrong / 20, wrong=wrong, sources=["a", "b"], **changes)
        write_attention(folder)
        write_history(folder, f"wnli-{rate}", range(0, 40, 10))
    written(contents(tmp_path, inspection()), tmp_path)
    return tmp_path / "report.html"


def show(chromium: Chrome, page: Path, width: int = 1600, dark: bool = False) -> Chrome:
    chromium.get_log("browser")  # clear the log
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    wanted = [{"name": name, "value": value} for name, value in features.items()]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
    chromium.get(page.as_uri())
    return chromium


def first(chromium: Chrome, selector: str) -> WebElement:
    return chromium.find_element(By.CSS_SELECTOR, selector)


def every(chromium: Chrome, selector: str) -> list[WebElement]:
    return chromium.find_elements(By.CSS_SELECTOR, selector)


def style_of(element: WebElement, name: str) -> str:
    """A custom property of the element's own style."""
    value = element.parent.execute_script("return arguments[0].style.getPropertyValue(arguments[1])", element, name)
    return str(value).strip()


def style_of_source(token: WebElement) -> str:
    """The weight in the markup, readable without scripts."""
    found = re.search(r"--w:\s*(\d+)%", token.get_attribute("style") or "")
    assert found is not None
    return found[1]


def move(slider: WebElement, steps: int) -> None:
    slider.send_keys(*[Keys.ARROW_RIGHT] * steps)


def weights() -> Any:
    return unpack(inspection()["words"][0]["weights"], (3, 4, 2))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_page_loads_without_errors_and_fits(chromium: Chrome, page: Path, width: int, dark: bool) -> None:
    show(chromium, page, width, dark)
    assert chromium.get_log("browser") == []
    inner, document = chromium.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width and document <= width, "the page itself does not scroll sideways"
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert chromium.find_element(By.TAG_NAME, "h1").is_displayed()
    for section in every(chromium, "main > section"):
        assert section.size["height"] > 40, section.get_attribute("id")
    small = chromium.execute_script(
        "return [...document.querySelectorAll('p, td, th, li, .token')].filter(e => e.offsetParent && "
        "parseFloat(getComputedStyle(e).fontSize) < 10).length"
    )
    assert small == 0
    texts = chromium.execute_script(
        "return [...document.querySelectorAll('svg.figure text')].map(e => e.getBoundingClientRect().height)"
    )
    assert texts and min(texts) > 6, "the text of the figures can be read"


def test_scores_and_figures_fit_a_phone(chromium: Chrome, page: Path) -> None:
    show(chromium, page, 400)
    outside = chromium.execute_script(
        "return [...document.querySelectorAll('.scores *, svg.figure, .stack td, .heat td')].filter(e => "
        "e.offsetParent !== null || e.tagName === 'svg').filter(e => { const box = e.getBoundingClientRect(); "
        "return box.left < 0 || box.right > 400; }).length"
    )
    assert outside == 0


def test_wide_windows_are_used(chromium: Chrome, page: Path) -> None:
    show(chromium, page, 1600)
    right = chromium.execute_script(
        "return Math.max(...[...document.querySelectorAll('.scores, .card')].map(e => e.getBoundingClientRect().right))"
    )
    assert right > 1500


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(chromium: Chrome, page: Path, dark: bool) -> None:
    """A contrast of 4.5 to 1 (WCAG AA), for the text, the verdicts and the darkest cell of a heatmap."""
    show(chromium, page, dark=dark)

    def colors(selector: str, ground: str) -> tuple[list[float], list[float]]:
        script = """
            const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const read = (c) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
                                  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
            const [one, ground] = arguments;
            return [read(getComputedStyle(document.querySelector(one)).color),
                    read(getComputedStyle(document.querySelector(ground)).backgroundColor)];
        """
        return tuple(chromium.execute_script(script, selector, ground))

    def luminance(color: list[float]) -> float:
        parts = [c / 255 for c in color]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    pairs = [("p", "body"), ("small", "body"), ("td.better small", "body"), ("nav a", "body"), ("thead th", "body")]
    pairs.append(("#by-target td[style*='100%']", "#by-target td[style*='100%']"))
    for one, ground in pairs:
        light, deep = sorted((luminance(color) for color in colors(one, ground)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, (one, dark)
    assert (luminance(colors("p", "body")[1]) < 0.1) is dark


def test_layer_slider(chromium: Chrome, page: Path) -> None:
    show(chromium, page)
    slider, tokens = first(chromium, ".words input"), every(chromium, ".words .token")
    assert len(tokens) == 4 and first(chromium, ".words output").text == "all layers (mean)"
    colors = [style_of(token, "--c") for token in every(chromium, ".words .legend button[style]")]
    for layer in range(4):
        if layer:
            move(slider, 1)
        expected = weights().mean(0) if layer == 0 else weights()[layer - 1]
        for place, token in enumerate(tokens):
            assert style_of(token, "--c") == colors[expected[place].argmax()]
            shown = float(style_of(token, "--w").rstrip("%"))
            assert shown == pytest.approx(100 * expected[place].max(), abs=0.51)
    assert first(chromium, ".words output").text == "layer 2"
    assert chromium.get_log("browser") == []


def test_selected_source(chromium: Chrome, page: Path) -> None:
    show(chromium, page)
    strongest, a, b = every(chromium, ".words .legend button")
    assert [one.get_attribute("aria-pressed") for one in (strongest, a, b)] == ["true", "false", "false"]
    b.click()
    assert [one.get_attribute("aria-pressed") for one in (strongest, a, b)] == ["false", "false", "true"]
    for place, token in enumerate(every(chromium, ".words .token")):
        assert style_of(token, "--c") == style_of(b, "--c")
        shown = float(style_of(token, "--w").rstrip("%"))
        assert shown == pytest.approx(100 * weights().mean(0)[place, 1], abs=0.51)


@pytest.mark.parametrize("width", WIDTHS)
def test_tooltip_of_a_token(chromium: Chrome, page: Path, width: int) -> None:
    show(chromium, page, width)
    tip, tokens = first(chromium, "#tip"), every(chromium, ".words .token")
    assert not tip.is_displayed()
    move(first(chromium, ".words input"), 2)
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[3])
    ActionChains(chromium).move_to_element(tokens[3]).perform()
    assert tip.is_displayed()
    assert first(chromium, "#tip b").text == "ish · layer 1"
    shown = {row.text.split()[0]: float(row.text.split()[1]) for row in every(chromium, "#tip tr")}
    assert shown == {name: pytest.approx(weights()[1, 3, n], abs=0.006) for n, name in enumerate("ab")}
    assert list(shown.values()) == sorted(shown.values(), reverse=True)
    box = tip.rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    ActionChains(chromium).move_to_element(first(chromium, "#words h2")).perform()
    assert not tip.is_displayed()


def test_tooltip_by_keyboard(chromium: Chrome, page: Path) -> None:
    show(chromium, page)
    every(chromium, ".words .legend button")[-1].send_keys(Keys.TAB)
    assert chromium.switch_to.active_element.text == "[CLS]"
    assert first(chromium, "#tip").is_displayed()
    chromium.switch_to.active_element.send_keys(Keys.TAB)
    assert first(chromium, "#tip b").text.startswith("a ·")


def test_sources_by_targets_by_layer(chromium: Chrome, page: Path) -> None:
    show(chromium, page)
    data = json.loads(first(chromium, "#data").get_attribute("textContent") or "")["byTarget"]
    rows = every(chromium, "#by-target tbody tr")
    titles = [row.find_element(By.TAG_NAME, "th").text.splitlines()[0] for row in rows]
    assert titles == ["cb", "rte", "tweets", "wnli"]
    move(first(chromium, "#target-layer"), 2)
    assert first(chromium, "#listened output").text == "layer 1"
    for row, values in zip(rows, data["data"][2], strict=True):
        cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        assert cells == ["–" if value is None else f"{value:.2f}" for value in values]
    assert EVIL in [head.text for head in every(chromium, "#by-target thead th")]


def test_method_links_to_its_runs(chromium: Chrome, page: Path) -> None:
    show(chromium, page)
    link = every(chromium, ".scores th a")[-1]
    anchor = (link.get_attribute("href") or "").partition("#")[2]
    folded = chromium.find_element(By.ID, anchor)
    assert folded.get_attribute("open") is None
    link.click()
    assert folded.get_attribute("open") is not None
    runs = folded.find_elements(By.CSS_SELECTOR, "li a")
    assert runs
    for run in runs:
        path = re.sub("^file://", "", run.get_attribute("href") or "")
        assert Path(path).is_dir()


def test_print(chromium: Chrome, page: Path) -> None:
    """Details are open on paper, colors are light, and the page is unchanged afterwards."""
    show(chromium, page, dark=True)
    chromium.execute_script(
        "window.seen = []; addEventListener('beforeprint', () => { seen.push(document.querySelectorAll("
        "'details:not([open])').length, getComputedStyle(document.body).backgroundColor); })"
    )
    pdf = base64.b64decode(chromium.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    assert chromium.execute_script("return seen[0]") == 0
    assert every(chromium, "details[open]") == []
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert chromium.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not first(chromium, "nav").is_displayed()
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_without_scripts(chromium: Chrome, page: Path) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(chromium, page)
        assert "±" in chromium.find_element(By.ID, "helped").text
        widths = [float(style_of_source(token)) for token in every(chromium, ".token")]
        assert widths == [pytest.approx(100 * share, abs=0.51) for share in weights().mean(0).max(-1)]
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
