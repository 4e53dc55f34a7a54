"""The report in a real browser: every row there, sorting, no error, nothing fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmkern.report import PipelineReport, write_report

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None, reason="no chromium with chromedriver on PATH"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, sample: PipelineReport, tmp_path: Path) -> Iterator[Any]:
    """The sample's page, opened; afterwards, whatever was done to it: no error, nothing fetched."""
    browser.get_log("browser"), browser.get_log("performance")
    path, *_ = write_report(sample, tmp_path)
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert requests(browser) == {path.as_uri()}


def requests(browser: Any) -> set[str]:
    """Addresses that the page asked for, itself among them; data in the page is no request."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    return {url for url in urls if not url.startswith("data:")}


def names(page: Any) -> list[str]:
    return [
        row.get_attribute("data-name") for row in page.find_elements("css selector", "tbody tr")
    ]


def head(page: Any, key: str) -> Any:
    return page.find_element("css selector", f'#stages th[data-key="{key}"] button')


def test_every_row_and_plot_is_shown(page: Any, sample: PipelineReport) -> None:
    assert page.title == sample.title
    assert names(page) == [record.name for record in sample.stages]
    rows = page.find_elements("css selector", "tbody tr")
    assert all(row.is_displayed() and row.size["height"] > 20 for row in rows)
    for row, record in zip(rows, sample.stages, strict=True):
        assert record.label in row.text
    drawings = page.find_elements("css selector", "figure svg")
    assert len(drawings) == 4
    assert all(svg.size["width"] > 300 and svg.size["height"] > 150 for svg in drawings)
    # The page is not wider than the window.
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_texts_with_markup_are_texts(page: Any, sample: PipelineReport, evil: str) -> None:
    assert evil in page.find_element("css selector", "header .model").text
    assert page.execute_script("return document.scripts.length") == 1
    assert page.find_element("id", "command").text == sample.command


def test_clicking_sorts_by_number_and_back(page: Any, sample: PipelineReport) -> None:
    by_seconds = ["1-prune", "3-distill", "2-quantize"]  # 9.3, 42, 118: as texts 118 would be first
    head(page, "seconds").click()
    assert names(page) == [*by_seconds, "original"]  # not measured: last
    cell = page.find_element("css selector", 'th[data-key="seconds"]')
    assert cell.get_attribute("aria-sort") == "ascending"
    head(page, "seconds").click()
    assert names(page) == [*reversed(by_seconds), "original"]
    assert cell.get_attribute("aria-sort") == "descending"
    for column in ("disk", "perplexity", "kl", "decode"):
        head(page, column).click()
        values = [
            cell.get_attribute("data-value")
            for cell in page.find_elements(
                "css selector", f"tbody td:nth-child({1 + list_of(page).index(column) + 1})"
            )
        ]
        numbers = [float(value) for value in values if value]
        assert len(numbers) >= 3
        assert numbers == sorted(numbers)
        assert all(values[: len(numbers)])
    assert len(page.find_elements("css selector", "th[aria-sort]")) == 1
    page.find_element("css selector", "#stages thead th button").click()
    assert names(page) == [record.name for record in sample.stages]


def list_of(page: Any) -> list[str]:
    heads = page.find_elements("css selector", "#stages th[data-key]")
    return [cell.get_attribute("data-key") for cell in heads]


def test_headings_work_with_the_keyboard(page: Any) -> None:
    page.execute_script("arguments[0].focus()", head(page, "decode"))
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert names(page) == ["original", "1-prune", "2-quantize", "3-distill"]
    page.switch_to.active_element.send_keys(Keys.SPACE)
    assert names(page) == ["3-distill", "2-quantize", "1-prune", "original"]
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.text.startswith("Time")
    assert names(page)[0] == "1-prune"


def test_continuation_of_each_model_can_be_chosen(page: Any, sample: PipelineReport) -> None:
    def shown() -> list[str]:
        texts = page.find_elements("css selector", ".pair > div:last-child pre")
        return [text.text.strip() for text in texts if text.is_displayed()]

    assert shown() == [sample.stages[-1].generations[0].strip()]
    Select(page.find_element("css selector", ".pair select")).select_by_index(1)
    assert shown() == [sample.stages[2].generations[0].strip()]
    mark = page.find_elements("css selector", ".pair > div:last-child pre mark")[1]
    assert mark.text.strip() == "2"  # "return 1" against "return 2"


def test_light_and_dark(page: Any) -> None:
    def lightness() -> tuple[int, int]:
        colours = page.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        return tuple(sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) for c in colours)

    seen = []
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        seen.append(lightness())
    assert seen[0][0] > seen[0][1]  # dark on light
    assert seen[1][0] < seen[1][1]
    page.find_element("id", "theme").click()
    assert lightness() == seen[0]
    page.find_element("id", "theme").click()
    assert lightness() == seen[1]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
