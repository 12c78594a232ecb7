"""The status page in a real browser: live, honest when nobody answers, and nothing but text."""

from __future__ import annotations

import os
import re
import shutil
import signal

import pytest

from tests.servers import unavailable
from tests.supervised import Supervised, group

playwright = pytest.importorskip("playwright.sync_api")
playwright.expect.set_options(timeout=20_000)
expect = playwright.expect

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SIZES = ((390, 844), (1280, 900))
EVIL = "<img src=x onerror=document.title='owned'>"
WORKER = f"""
def run(worker):
    worker.ready()
    if worker.id == "bad-1":
        worker.accepting.wait(0.3)
        raise ValueError("{EVIL}")
    with worker.job("one") as job, worker.pools["main"].acquire(job.ctx):
        worker.accepting.wait()
"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        unavailable("no chromium here (Debian: chromium-headless-shell)")
    with playwright.sync_playwright() as driver:
        # Its sandbox does not run as root, and nothing foreign is opened.
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    config = (
        f'[pools.main]\nurl = "sqlite:///{folder}/db"\nmax_open = 4\nbudget = 20\n'
        + group("web", "app:run", count=2, backoff="10ms")
        + group("bad", "app:run", max_restarts=0)
    )
    supervised = Supervised(
        folder, config, supervisor='listen = "127.0.0.1:0"', modules={"app": WORKER}
    )
    with supervised:
        supervised.event("group.failed", group="bad")
        yield supervised


@pytest.fixture
def page(browser, supervised):
    """The page with what the browser complained about: nothing, at the end."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.clock.install()  # it goes on by itself, and can be put forward
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(supervised.event("supervisor.listening")["url"])
    page.get_by_text("2 of 2 ready").wait_for()
    yield page
    context.close()
    assert [c for c in complaints if "ERR_CONNECTION_REFUSED" not in c] == []


def test_the_page_shows_the_fleet_and_what_happens_to_it(page, supervised):
    """Groups, workers, pools, budgets and events are there, and a restart shows without a reload."""
    web = page.locator("#groups section").first
    expect(web.locator("tbody tr")).to_have_count(2)
    expect(web.locator("tbody tr").first).to_contain_text("1 used, 1 open, 4 allowed")
    expect(page.locator("#budgets").get_by_role("img")).to_have_attribute(
        "aria-label", re.compile("^main: 2 open")
    )
    web.locator("summary").click()
    expect(web.locator("tbody tr")).to_have_count(0)
    web.locator("summary").click()

    os.kill(supervised.worker_pids()["web-1"], signal.SIGKILL)
    page.locator("td", has_text="web-3").wait_for()
    expect(page.locator("td", has_text="web-1")).to_have_count(0)
    page.locator("#events").get_by_text(
        "in place of one that had been killed from outside"
    ).wait_for()
    sums = page.locator("#sums")
    expect(sums).to_have_text(re.compile(r"workers ready\s*2/3"))
    expect(sums).to_have_text(re.compile(r"restarts\s*1(?!\d)"))


def test_what_comes_from_outside_is_text(page):
    """An exception's message is shown as it is, and is no part of the document."""
    page.locator("#events").get_by_text(EVIL).first.wait_for()
    expect(page.locator("img, main script")).to_have_count(0)
    assert "owned" not in page.title()


def test_it_is_readable_on_a_phone_and_in_the_dark(page):
    """Nothing is wider than the screen, and text stands out from its ground as WCAG's AA asks."""
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(CONTRAST) == []


def test_it_says_so_when_nobody_answers_any_more(page, supervised):
    """Old figures are not passed off as live when the supervisor has gone."""
    supervised.signal(signal.SIGQUIT)
    supervised.wait()
    page.clock.fast_forward(10_000)
    page.locator("#live.stale").wait_for()
    expect(page.locator("#live")).to_contain_text("no answer for")
    expect(page.locator("tbody tr")).to_have_count(2)


# Texts whose contrast is below 4.5 to 1, each with its colours.
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const c = rgb(getComputedStyle(node).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !node.getClientRects().length) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${node.textContent}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""
