"""Headless Chromium on a local page, for tests/test_page.py and benchmarks/page.py."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
QUIET = (  # no first-run pages, updates or accounts, for which Chromium makes requests
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)


def missing() -> str:
    """Why no browser can be used, or an empty string."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    if not CHROMIUM or not DRIVER:
        return "chromium and chromedriver are not installed"
    return ""


class Page:
    """The page as a user operates it."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get("about:blank")  # a new history entry, without the form's saved values
        self.driver.get(path.as_uri())
        self.wait("!document.getElementById('write').disabled")

    def js(self, expression: str, *arguments):
        return self.driver.execute_script(f"return {expression}", *arguments)

    def wait(self, condition: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < end, (
                f"waited {seconds} s for {condition}; {self.driver.get_log('browser')}"
            )
            time.sleep(0.01)

    def element(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.element(selector).get_property("textContent")

    def fill(self, selector: str, value: object) -> None:
        """Set a field as if typed or pasted, including characters that a driver cannot type."""
        self.driver.execute_script(
            "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            selector,
            str(value),
        )

    def click(self, selector: str) -> None:
        self.element(selector).click()

    def write(self, prompt: str, **settings) -> str:
        """Generate from a prompt and return the text that the page shows."""
        self.fill("#prompt", prompt)
        for name, value in settings.items():
            self.fill(f"#{name}", value)
        self.click("#write")
        self.wait("text.ended")
        # code points, since JavaScript strings join surrogate pairs that Python keeps apart
        return "".join(map(chr, self.js("text.characters.map((c) => c.codePointAt(0))")))

    def requests(self) -> list[str]:
        """URLs requested since the last call."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def problems(self) -> list[str]:
        """Messages in the browser console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def browser(profile: Path, width: int = 1280, height: int = 1000) -> Iterator[Page]:
    """A browser with a fresh profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *QUIET.split(),
        f"--user-data-dir={profile}",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get("about:blank")  # otherwise the start page would still be loading
        yield Page(driver)
    finally:
        driver.quit()
