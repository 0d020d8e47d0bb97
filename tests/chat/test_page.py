"""The page in headless Chromium: asked, read while it answers, stopped, and listened to for calls elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sheepfold.chat.controls import Controls
from sheepfold.chat.session import chat_prompt, instruction_prompt

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
QUESTION = "Name three animals."
NEWS = "On Monday Finn the farmer found the chisel at the tower. It was dull."
ENDLESS = ("Give a short summary of this news.", NEWS)
"""Instruction and input to which this run's base goes on and on."""
NOTES = "[...document.querySelectorAll('[id^=note-] p')]"
NEVER_ENDS = "(document.querySelector('.talk .plain')?.textContent.length ?? 0)"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def url(run, log):
    command = [sys.executable, "-m", "sheepfold.cli", "chat", str(run), "--device", "cpu", "--port", "0"]
    with log.open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=ENVIRONMENT)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[0]
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install your system's chromium package to run the page tests")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, url, log, request):
    """A fresh page; the test fails if anything was asked of another server, a script failed, or the server did."""
    width = getattr(request, "param", 1280)
    context = chromium.new_context(viewport={"width": width, "height": 900})
    opened, asked, failed, before = context.new_page(), [], [], log.stat().st_size
    opened.set_default_timeout(30_000)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(url)
    opened.get_by_label("Instruction", exact=True).wait_for()
    yield opened
    context.close()
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    assert failed == []
    assert "Traceback" not in log.read_text(encoding="utf-8")[before:]


def button(page, name):
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def answered(page):
    """Wait until an answer has begun and ended."""
    page.wait_for_function(f"{NOTES}.some(note => / s\\./.test(note.textContent))")
    page.wait_for_function(f"!{NOTES}.some(note => /…/.test(note.textContent))")


def test_an_instruction_is_answered_by_both_sides_as_the_library_answers(page, answering):
    prompt = instruction_prompt(answering, "Sum up this news.", "It rained <b>all</b> day & night.", Controls())
    page.get_by_label("Instruction", exact=True).fill("Sum up this news.")
    page.get_by_label("Input (optional)").fill("It rained <b>all</b> day & night.")
    button(page, "Answer").click()
    answered(page)
    for name in ("base", "federated"):
        expected = answering.answer([prompt], [name], Controls().generation(), seed=0)[0].text
        column = page.locator(".column:has(> .side)").filter(has=page.get_by_role("heading", name=name))
        assert column.locator(".plain").text_content() == expected
    page.get_by_text("The exact prompt").locator("visible=true").click()
    exact = page.get_by_label(f"Prompt of base and federated: {len(prompt.ids)} tokens")
    exact.wait_for()
    assert exact.text_content() == prompt.text


def test_a_conversation_streams_on_both_sides_and_each_goes_on_from_its_own(page, answering):
    page.get_by_role("tab", name="Chat").click()
    question = page.get_by_label("Question")
    question.fill(QUESTION)
    question.press("Enter")
    answered(page)
    prompt = chat_prompt(answering, (), QUESTION, Controls())
    whole = answering.answer([prompt] * 2, ["base", "federated"], Controls().generation(), seed=0)
    said = page.locator(".talk .said")
    assert [said.nth(side).text_content() for side in (0, 1)] == [answer.text for answer in whole]
    assert question.input_value() == ""
    marks = "<img src=http://example.com/x.png> ${1 + 1} {{x}}"
    question.fill(f"Again? {marks}")
    question.press("Enter")
    page.wait_for_function("document.querySelectorAll('.talk .said').length === 4")
    answered(page)
    assert page.locator(".talk .asked").nth(1).text_content() == f"Again? {marks}"
    assert page.locator(".talk img").count() == 0
    page.get_by_text("The exact prompt").locator("visible=true").click()
    assert whole[1].text in page.get_by_label("Prompt of federated").text_content()


def test_an_answer_grows_while_it_is_read_and_stop_stops_it(page):
    page.get_by_label("number input for New tokens").fill("900")
    page.get_by_label("Instruction", exact=True).fill(ENDLESS[0])
    page.get_by_label("Input (optional)").fill(ENDLESS[1])
    button(page, "Answer").click()
    page.wait_for_function(f"{NEVER_ENDS} > 5")
    early = page.evaluate(NEVER_ENDS)
    page.wait_for_function(f"{NEVER_ENDS} > {early}")
    button(page, "Stop").click()
    page.wait_for_function(f"{NOTES}.some(note => /Stopped/.test(note.textContent))")
    page.wait_for_timeout(500)
    settled = page.evaluate(NEVER_ENDS)
    page.wait_for_timeout(1000)
    assert page.evaluate(NEVER_ENDS) == settled
    assert button(page, "Answer").is_enabled()
    assert button(page, "Stop").is_disabled()


def test_a_failing_question_shows_a_message_and_the_page_goes_on(page):
    button(page, "Answer").click()
    page.get_by_text("nothing is asked: write an instruction first").wait_for()
    page.get_by_label("Instruction", exact=True).fill("word " * 3000)
    button(page, "Answer").click()
    page.get_by_text("positions; shorten the prompt").wait_for()
    assert "Traceback" not in page.content()
    page.get_by_label("Instruction", exact=True).fill(QUESTION)
    button(page, "Answer").click()
    answered(page)


def left_answers(page, name):
    page.get_by_label("Left answers").click()
    page.get_by_role("option", name=name).click()
    page.locator(".side").locator("visible=true").first.get_by_text(name, exact=True).wait_for()


def test_another_adapter_does_not_take_the_answer_of_the_one_before(page):
    page.get_by_label("Instruction", exact=True).fill(QUESTION)
    button(page, "Answer").click()
    answered(page)
    assert page.locator(".talk .plain").first.text_content()
    left_answers(page, "client-0's own")
    page.wait_for_function("document.querySelectorAll('.talk .plain').length === 1")
    assert page.locator(".side h2").locator("visible=true").all_text_contents() == ["client-0's own", "federated"]


def test_a_conversation_says_which_of_its_answers_another_adapter_gave(page):
    page.get_by_role("tab", name="Chat").click()
    question = page.get_by_label("Question")
    question.fill(QUESTION)
    question.press("Enter")
    answered(page)
    assert page.locator(".talk .by").count() == 0
    left_answers(page, "client-0's own")
    page.locator(".talk .by").wait_for()
    assert page.locator(".talk .by").all_text_contents() == ["base"]
    question.fill("And one more?")
    question.press("Enter")
    page.wait_for_function("document.querySelectorAll('.talk .said').length === 4")
    answered(page)
    assert page.locator(".talk .by").all_text_contents() == ["base"]
    assert page.locator(".side h2").locator("visible=true").all_text_contents() == ["client-0's own", "federated"]


def test_each_tab_of_the_page_stops_its_own_answer(page):
    page.get_by_label("number input for New tokens").fill("900")
    page.get_by_label("Instruction", exact=True).fill(ENDLESS[0])
    page.get_by_label("Input (optional)").fill(ENDLESS[1])
    button(page, "Answer").click()
    page.wait_for_function("/Answering/.test(document.body.textContent)")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_label("Question").press("Enter")
    page.wait_for_function("/Waiting for its turn/.test(document.body.textContent)")
    page.get_by_role("tab", name="Instruction").click()
    button(page, "Stop").click()
    button(page, "Answer").and_(page.locator(":enabled")).wait_for()
    assert "Stopped." in " ".join(page.locator("[id^=note-] p").locator("visible=true").all_text_contents())
    page.get_by_role("tab", name="Chat").click()
    button(page, "Answer").and_(page.locator(":enabled")).wait_for()
    chat = " ".join(page.locator("[id^=note-chat] p").all_text_contents())
    assert "Stopped." not in chat
    assert " s." in chat


def test_a_prompt_looked_at_before_anything_is_written_is_a_hint(page):
    page.get_by_text("The exact prompt").locator("visible=true").click()
    page.get_by_text("write a question and open this again").locator("visible=true").wait_for()
    page.wait_for_timeout(500)  # the server's part; the fixture reads its log


@pytest.mark.parametrize("typed", ["5000", ""])
def test_a_number_beyond_its_slider_comes_back_to_it_and_fails_nothing(page, typed):
    for name in ("Temperature", "Top-k", "Beams"):
        box = page.get_by_label(f"number input for {name}")
        if box.is_enabled():
            box.fill(typed)
            page.wait_for_timeout(300)  # the server is told, and the fixture reads its log
            box.press("Tab")
    page.get_by_label("number input for New tokens").fill("8")
    page.get_by_label("Instruction", exact=True).fill(QUESTION)
    button(page, "Answer").click()
    answered(page)
    assert page.get_by_role("alert").count() == 0
    assert page.get_by_label("number input for Beams").input_value() == ("4" if typed else "1")


@pytest.mark.parametrize(("typed", "said"), [("9999999999", "seed: found 9,999,999,999; expected"), ("", "is empty")])
def test_a_seed_out_of_its_range_is_one_message(page, typed, said):
    page.get_by_label("Instruction", exact=True).fill(QUESTION)
    page.get_by_label("number input for Temperature").fill("0.7")
    page.get_by_label("number input for Temperature").press("Tab")
    page.get_by_label("Seed").and_(page.locator(":enabled")).fill(typed)
    button(page, "Answer").click()
    page.get_by_role("alert").wait_for()
    assert said in page.get_by_role("alert").text_content()
    assert page.get_by_role("alert").count() == 1
    assert page.locator(".toast-body").count() == 0


def test_a_note_is_in_the_page_once(page):
    button(page, "Answer").click()
    page.get_by_role("alert").wait_for()
    assert page.locator(".note, [id^=note-]", has_text="nothing is asked").count() == 1
    assert page.locator("[role=status]", has_text="nothing is asked").count() == 1


def test_controls_without_effect_are_off(page):
    def off():
        names = ("Temperature", "Top-p", "Top-k")
        return [page.get_by_label(f"range slider for {name}").is_disabled() for name in names]

    assert off() == [False, True, True]
    page.get_by_label("number input for Temperature").fill("0.7")
    page.get_by_label("number input for Temperature").press("Tab")
    page.wait_for_function("!document.querySelector('[aria-label=\"range slider for Top-p\"]').disabled")
    page.get_by_label("number input for Beams").fill("4")
    page.get_by_label("number input for Beams").press("Tab")
    page.wait_for_function("document.querySelector('[aria-label=\"range slider for Temperature\"]').disabled")
    assert off() == [True, True, True]


@pytest.mark.parametrize("page", [390, 1280], indirect=True)
def test_nothing_is_wider_than_the_screen(page):
    wide = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(wide) <= 0
    page.locator(".examples button").first.click()
    page.get_by_text("The held-out row's own answer").wait_for()
    button(page, "Answer").click()
    answered(page)
    assert page.evaluate(wide) <= 0
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Question").fill("x" * 400)
    page.get_by_label("Question").press("Enter")
    page.wait_for_function("document.querySelectorAll('.talk .said').length === 2")
    assert page.evaluate(wide) <= 0


CONTRAST = Path(__file__).with_name("contrast.js")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(chromium, url, scheme):
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.get_by_label("Instruction", exact=True).wait_for()
    page.wait_for_timeout(500)
    assert page.evaluate(CONTRAST.read_text(encoding="utf-8")) == []
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_label("Question").press("Enter")
    page.wait_for_function("document.querySelectorAll('.talk .said').length === 2")
    assert page.evaluate(CONTRAST.read_text(encoding="utf-8")) == []
    context.close()


def test_others_need_the_password(run):
    open_to_all = [sys.executable, "-m", "sheepfold.cli", "chat", str(run), "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(open_to_all, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "token" in done.stderr
