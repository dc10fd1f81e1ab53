"""The page in a real browser: what is drawn, what can be stepped through, and that nothing leaves this machine."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import line_of, made_run, windows_by_hand

from msfusion.experiment.page.serving import PageServer
from msfusion.experiment.page.write import write_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="apt-get install chromium chromium-driver"),
]

OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all tests here; it starts in a second."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light") -> float:
    """Open a page without what was noted of others; the seconds until it was drawn."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    start = time.monotonic()
    browser.get(address)
    return time.monotonic() - start


def texts(browser: Any, selector: str) -> list[str]:
    found = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)", selector
    )
    return [str(each) for each in found]


def count(browser: Any, selector: str) -> int:
    return len(texts(browser, selector))


def asked(browser: Any) -> list[str]:
    """All addresses that the browser has asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [str(each["request"]["url"]) for each in sent]


def said(browser: Any) -> list[str]:
    """Errors and warnings: none, where all is well."""
    return [entry["message"] for entry in browser.get_log("browser")]


def soon(true: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


EVIL = "</script><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ten participants and a hundred rounds, two seeds beside the small model, with a name of strangers."""
    folder = tmp_path_factory.mktemp("report")
    machine = {"download_megabits": 1.0, "upload_megabits": 1.0, "latency_seconds": 0.01, "gigaflops": 1.0}
    about = {
        "windows": windows_by_hand(100, 10, 512, name=EVIL),
        "labels": {"names": [EVIL, "b"], "counts": [[1, 2]] * 10},
        "machines": [machine] * 10,
    }
    for seed in (0, 1):
        lines = [
            line_of(
                each,
                10,
                accuracy=1 - (0.8 + seed / 20) / each,
                simulated_seconds=1.0,
                simulated_seconds_each={str(who): 0.05 * who + 0.1 for who in range(10)},
            )
            for each in range(1, 101)
        ]
        made_run(folder / f"run-seed{seed}", participants=10, rounds=100, seed=seed, lines=lines, about=about)
    made_run(folder / "small-seed0", participants=10, rounds=100, method="small")
    return write_report([folder], folder / "page.html")


@pytest.mark.one_in_ci
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_is_drawn_whole_and_asks_for_nothing(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    seconds = opened(browser, report.as_uri(), width, scheme)
    assert said(browser) == []
    assert asked(browser) == [report.as_uri()]
    assert texts(browser, "p.problem") == []
    charts = count(browser, "figure.chart")
    assert charts >= 12
    assert count(browser, "figure.chart svg.plot") >= charts
    for mark in ("area", "line", "bar", "cell", "dot"):
        assert count(browser, f"figure.chart svg g[aria-label={mark}] > *") > 0
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= innerWidth"
    )  # nothing is cut off
    text, back = browser.execute_script(
        "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor].map((each) => "
        "each.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 3)"
    )
    assert (text > 180 > 60 > back) if scheme == "dark" else (back > 180 > 60 > text)
    assert seconds < 5  # one, where nothing else is done on the machine


def test_names_of_strangers_are_shown_and_not_run(browser: Any, report: Path) -> None:
    opened(browser, report.as_uri())
    assert browser.title.startswith("msfusion: report")
    assert count(browser, "img") == 0
    assert any(EVIL[:60] in text for text in texts(browser, "p.axis"))


def test_windows_are_stepped_through_by_slider_and_keys(browser: Any, report: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, report.as_uri())

    def first_held() -> float:
        """Where the first participant's unit is drawn, from left to right."""
        return float(
            browser.execute_script("return document.querySelector('.windows .held rect').x.baseVal.value")
        )

    slider, places = browser.find_element("css selector", ".stepper input"), [first_held()]
    assert texts(browser, ".stepper output") == ["1 of 100"]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT):
        slider.send_keys(key)
        places.append(first_held())
    assert texts(browser, ".stepper output") == ["2 of 100"]
    assert places[0] < places[1] < places[2]
    assert places[3] == places[1]
    browser.execute_script("arguments[0].value = 100; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert texts(browser, ".stepper output") == ["100 of 100"]
    assert first_held() > places[2]
    browser.find_element("css selector", ".stepper button").click()
    assert texts(browser, ".stepper output") == ["99 of 100"]


def test_one_method_at_a_time_is_chosen(browser: Any, report: Path) -> None:
    from selenium.webdriver.support.select import Select

    opened(browser, report.as_uri())
    assert count(browser, "#windows") == 1
    Select(browser.find_element("css selector", ".chooser select")).select_by_index(1)
    assert count(browser, "#windows") == 0
    assert said(browser) == []


def test_a_live_page_gains_rounds_by_itself(browser: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with PageServer(run, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            opened(browser, f"http://127.0.0.1:{server.port}/")
            assert "There is no run yet" in texts(browser, "p.problem")[0]
            made_run(run, finished=False, rounds=1, planned=3, about={"windows": windows_by_hand(3, 3, 8)})
            soon(lambda: texts(browser, "#overview td:nth-child(3)") == ["1 of 3"])
            browser.find_element("css selector", ".stepper input").send_keys("\ue014")  # arrow right
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line_of(2, 3)) + "\n")
            soon(lambda: texts(browser, "#overview td:nth-child(3)") == ["2 of 3"])
            assert texts(browser, ".stepper output") == ["2 of 3"]  # where it was
            made_run(run, rounds=3, about={"windows": windows_by_hand(3, 3, 8)})
            soon(lambda: texts(browser, "p.live") == ["The run has ended."])
            own = f"http://127.0.0.1:{server.port}/"
            assert all(address.startswith(own) or address == "data:," for address in asked(browser))
            assert said(browser) == []
        finally:
            server.shutdown()
            thread.join()
    soon(lambda: "msfusion watch has ended" in texts(browser, "p.live")[0])
