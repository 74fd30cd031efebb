"""The page at `/` of the server, in a real browser."""

import re
import time
import urllib.request

import pytest
from playwright.sync_api import expect

from support.generate import generate
from support.pretrained import chat_prompt, load
from support.serve import Server, create_app

pytestmark = pytest.mark.browser
QUESTION = "Who lives <b>here</b>?"


@pytest.fixture(scope="module")
def story():
    return load("story")


@pytest.fixture(scope="module")
def server(story):
    server = Server(create_app(*story, "story", api_key="secret")).start()
    yield server
    server.stop()


def metric(server, name) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        return float(re.search(rf"^{name} (.*)$", answer.read().decode(), re.MULTILINE)[1])


def written(story, prompt, n) -> str:
    model, tokenizer = story
    ids = tokenizer.encode(prompt, "all")
    new = generate(model, [ids], n, temperature=0)[0][len(ids) :]
    return tokenizer.decode(new)


def test_the_page_streams_an_answer_stops_and_tells_errors(story, server, browser):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    asked, noise = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: noise.append(str(error)))
    try:
        page.goto(server.url)
        box, talk = page.get_by_label("Your text"), page.locator("#talk p")
        box.fill(QUESTION)
        box.press("Enter")
        expect(talk.last).to_contain_text("Wrong API key")

        page.get_by_label("API key").fill("secret")
        page.get_by_label("temperature").fill("0")
        page.get_by_label("most tokens").fill("12")
        box.fill(QUESTION)
        page.get_by_role("button", name="Send").click()
        want = written(story, chat_prompt([{"role": "user", "content": QUESTION}]), 12)
        expect(talk.last).to_have_text(want, use_inner_text=True)
        expect(talk.nth(-2)).to_have_text(QUESTION)  # as text: no tag of it was obeyed
        expect(page.get_by_role("heading")).to_have_text("Chat with story")

        page.get_by_label("mode").select_option("text")
        box.fill("Once upon a time")
        box.press("Enter")
        want = "Once upon a time" + written(story, "Once upon a time", 12)
        expect(talk.last).to_have_text(want, use_inner_text=True)

        page.get_by_label("temperature").fill("2")
        page.get_by_label("most tokens").fill("350")
        box.fill("Once")
        box.press("Enter")
        expect(talk.last).to_have_text(re.compile("Once.+"))
        page.get_by_role("button", name="Stop").click()
        expect(talk.last).to_contain_text("(stopped)")
        end = time.monotonic() + 10
        while metric(server, "llm_rows_running") and time.monotonic() < end:
            time.sleep(0.02)
        assert metric(server, "llm_rows_running") == 0
    finally:
        page.close()
    assert not noise
    assert {url.startswith(server.url + "/") for url in asked} == {True}
