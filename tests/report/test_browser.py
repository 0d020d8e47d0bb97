"""The page in headless Chromium: nothing from outside, nothing too wide, every chart with words."""

import itertools
import shutil

import pytest

from sheepfold.report import page
from sheepfold.report.facts import read_run
from tests.report.conftest import journal, renamed
from tests.report.test_live import append, served

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install your system's chromium package to run the page tests")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Open a page at a width; what it asked for, wrote to its console and popped up is noted on it."""
    pages = []

    def go(address, width=1280, **options):
        view = chromium.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(view)
        view.noted = {"errors": [], "asked": [], "dialogs": []}
        view.on("console", lambda m: view.noted["errors"].append(m.text) if m.type in ("error", "warning") else None)
        view.on("pageerror", lambda error: view.noted["errors"].append(str(error)))
        view.on("request", lambda request: view.noted["asked"].append(request.url))
        view.on("dialog", lambda dialog: (view.noted["dialogs"].append(dialog.message), dialog.dismiss()))
        view.goto(address)
        view.wait_for_selector(".chart .main-svg")
        return view

    yield go
    for view in pages:
        view.close()


@pytest.fixture
def file(copied, tmp_path):
    """A report of a run whose clients have hostile names, at a file's address."""
    folder = copied("hostile")
    renamed(folder)
    target = tmp_path / "report.html"
    target.write_text(page.whole("hostile", page.content([read_run(folder)])), encoding="utf-8")
    return target.as_uri()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_quiet_and_no_wider_than_the_screen(file, opened, width):
    view = opened(file, width)
    for summary in view.query_selector_all("summary"):
        summary.click()
    assert view.noted == {"errors": [], "asked": [file], "dialogs": []}
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
    assert view.evaluate("[...document.querySelectorAll('.chart .main-svg')].every(s => s.clientWidth <= innerWidth)")


def test_headings_landmarks_tables_and_charts_can_be_read_aloud(file, opened):
    view = opened(file)
    levels = view.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for landmark in ("main", "header", "nav[aria-label]", "footer"):
        assert view.query_selector(landmark), landmark
    charts = view.query_selector_all(".chart")
    assert len(charts) >= 5
    for chart in charts:
        assert len(chart.get_attribute("aria-label")) > 20
        assert chart.evaluate("c => c.closest('figure').querySelector('details table caption') !== null")
    assert view.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th[scope]'))"
    )
    ids = view.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert view.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_a_hostile_name_is_drawn_as_it_is(file, opened):
    view = opened(file)
    assert "<script>alert(1)" not in view.evaluate("[...document.scripts].map(s => s.id + s.type).join()")
    ticks = view.evaluate("[...document.querySelectorAll('.chart .ytick text')].map(t => t.textContent)")
    assert "%{y} & <b>c</b>" in ticks
    assert 'a"b' in ticks


def test_dark_and_paper_have_colours_of_their_own(file, opened):
    view = opened(file, color_scheme="dark")

    def ink():
        return view.evaluate("getComputedStyle(document.querySelector('.chart .xtick text')).fill")

    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 25, 24)"
    assert ink() == "rgb(232, 238, 235)"
    view.emulate_media(media="print", color_scheme="dark")
    view.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert ink() == "rgb(0, 0, 0)"
    assert view.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert view.evaluate("Math.max(...[...document.querySelectorAll('.main-svg')].map(s => s.clientWidth))") <= 680
    view.emulate_media(media="screen", color_scheme="dark")
    view.evaluate("dispatchEvent(new Event('afterprint'))")
    assert ink() == "rgb(232, 238, 235)"
    assert view.evaluate("document.querySelectorAll('details[open]').length") == 0


def test_a_served_page_takes_over_a_new_round_where_the_reader_is(ran, copied, opened):
    folder = copied(keep=2)
    last = journal(ran)[2]
    with served(folder) as address:
        view = opened(address)
        assert view.text_content("main .status").startswith("Round 1 of 2, running")
        view.click("#data-loss summary")
        view.evaluate("document.querySelector('#cost').scrollIntoView()")
        place = "document.querySelector('#cost').getBoundingClientRect().top"
        before = view.evaluate(place)
        append(folder, last)
        (folder / "closing.json").touch()
        view.wait_for_selector("main .status:has-text('Finished')", timeout=20_000)
        assert abs(view.evaluate(place) - before) < 2
        assert view.evaluate("document.querySelector('#data-loss').open")
        assert f"{last['train_loss']:.3f}" in view.text_content("#data-loss")
        assert view.evaluate("[...document.querySelectorAll('.chart')].every(c => c.querySelector('.main-svg'))")
        assert all(url.startswith(address) for url in view.noted["asked"])
        assert view.noted["errors"] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_three_methods_and_their_teacher_fit_the_screen(three, tmp_path, opened, width):
    target = tmp_path / "methods.html"
    target.write_text(page.whole("methods", page.content([read_run(folder) for folder in three])), encoding="utf-8")
    view = opened(target.as_uri(), width)
    assert view.noted["errors"] == []
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    charts = view.query_selector_all("#curves .chart")
    assert len(charts) == 3
    for chart in charts:
        names = chart.evaluate("c => [...c.querySelectorAll('.legendtext')].map(t => t.textContent)")
        assert names == ["fedavg with method full", "fedavg with method lora", "fedkd", "fedkd: teacher"]
        inside = chart.evaluate(
            "c => [...c.querySelectorAll('.legendtext')].every(t => {"
            "const at = t.getBoundingClientRect(), box = c.getBoundingClientRect();"
            "return at.left >= box.left && at.right <= box.right && at.top >= box.top})"
        )
        assert inside, "a name beside its line is cut off"
