"""The page in a headless browser: a typed history, both modes, keyboard alone, errors, phone width, dark."""

import shutil
from contextlib import contextmanager

import pytest
from served import KEYS

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"),
]
PATIENCE = 120_000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, service):
    with opened(browser, service) as page:
        yield page


@contextmanager
def opened(browser, service):
    """The page, with a key; what the console complains of is in `page.complaints`."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.complaints, page.addresses = [], []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.addresses.append(request.url))
    page.goto(service.url)
    page.get_by_label("API key").fill(KEYS[1])
    try:
        yield page
    finally:
        page.close()


def type_history(page, *titles):
    for title in titles:
        page.get_by_label("Add an item to the history").press_sequentially(title)
        page.get_by_role("option").first.wait_for()
        page.keyboard.press("Enter")


def listed(page):
    page.locator("#items li").first.wait_for()
    return page.locator("#items button").all_inner_texts()


def test_a_typed_history_is_answered_in_both_modes(page, service):
    type_history(page, "number 3", "number 5")
    assert page.locator("#history li").count() == 2
    page.get_by_role("button", name="Recommend").click()
    chosen = [page.locator("#history li").nth(place).inner_text() for place in range(2)]
    assert all(text.startswith("Tale number") for text in chosen)
    direct = listed(page)
    ids = [f"item-{text.split()[2]}" for text in chosen]
    expected = service.recommend(history=ids, k=10).json()["items"]
    assert direct == [item["title"] for item in expected]

    drawn = page.locator("#drawing svg")
    assert all(token.strip("<|>") in drawn.text_content() for token in expected[0]["path"])
    assert drawn.locator("path.chosen").count() == len(expected[0]["path"])
    page.get_by_role("button", name=direct[1], exact=True).click()
    assert drawn.get_attribute("aria-label") == f"Path of {direct[1]}: {' '.join(expected[1]['path'])}"

    page.get_by_label("Reasoning").check()
    page.get_by_role("button", name="Recommend").click()
    page.locator("#steps li").first.wait_for()  # the chain is there before the list
    assert len(listed(page)) == 10
    assert page.locator("#rewritten").inner_text().startswith("Rewritten history:")
    assert "checkpoint sft-" in page.locator("#versions").inner_text()
    assert page.complaints == []
    assert all(address.startswith(service.url) or address.startswith("data:") for address in page.addresses)


def test_the_demos_checkpoint_recommends_after_a_typed_history(browser, demo_service):
    with opened(browser, demo_service) as page:
        type_history(page, "star wars", "return of the jedi")
        assert page.locator("#history li").all_inner_texts()[0].startswith("Star Wars (1977)")
        page.get_by_role("button", name="Recommend").click()
        found = demo_service.client.get("/v1/items", params={"title": "return of the jedi"}).json()
        history = [demo_service.client.get("/v1/items", params={"title": "star wars"}).json()[0], found[0]]
        expected = demo_service.recommend(history=[item["item_id"] for item in history], k=10).json()["items"]
        assert listed(page) == [item["title"] for item in expected]
        page.get_by_label("Reasoning").check()
        page.get_by_role("button", name="Recommend").click()
        page.locator("#steps li").first.wait_for()
        assert len(listed(page)) == 10
        assert "checkpoint train-" in page.locator("#versions").inner_text()
        page.get_by_label("User").fill("nobody")
        page.get_by_label("User").press("Tab")
        page.get_by_role("alert").wait_for()
        assert page.get_by_role("alert").inner_text() == "there is no user 'nobody'"
        # The browser itself notes the refused lookup; the page has nothing to complain of.
        assert [text for text in page.complaints if "404" not in text] == []


def test_a_user_is_asked_about_with_the_whole_history(page, service):
    page.get_by_label("User").fill("2")
    page.get_by_label("User").press("Tab")
    page.locator("#history li").first.wait_for()
    page.get_by_role("button", name="Recommend").click()
    expected = service.recommend(user_id=2, k=10).json()["items"]
    assert listed(page) == [item["title"] for item in expected]
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#history li").count() == 0
    page.get_by_role("button", name="Recommend").click()
    page.get_by_text(service.recommend(history=[], k=10).json()["items"][0]["title"]).first.wait_for()
    assert page.complaints == []


def test_the_keyboard_is_enough(page):
    page.get_by_label("API key").focus()
    page.keyboard.press("Tab")
    page.keyboard.type("1")
    page.keyboard.press("Tab")
    page.locator("#history li").first.wait_for()
    before = page.locator("#history li").count()
    page.keyboard.type("tale")
    page.get_by_role("option").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#history li").count() == before + 1
    page.get_by_label("Direct").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("Reasoning").is_checked()
    page.keyboard.press("Enter")
    assert listed(page)
    assert page.complaints == []


def test_an_error_is_shown_in_words(page):
    page.get_by_label("User").fill("nobody")
    page.get_by_label("User").press("Tab")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text() == "there is no user 'nobody'"
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Recommend").click()
    page.get_by_text("an API key is wanted").wait_for()
    page.get_by_label("API key").fill(KEYS[0])
    page.get_by_role("button", name="Recommend").click()
    assert listed(page)
    assert not alert.is_visible()


def test_what_is_running_can_be_stopped(page):
    page.get_by_label("Reasoning").check()
    page.route("**/v1/recommend", lambda route: None)  # never answered
    page.get_by_role("button", name="Recommend").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert page.get_by_role("button", name="Recommend").is_enabled()


def test_it_fits_a_phone_and_is_dark_where_that_is_wanted(page, service):
    page.set_viewport_size({"width": 360, "height": 740})
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    type_history(page, "number 3")
    page.get_by_role("button", name="Recommend").click()
    assert listed(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.goto(f"{service.url}/docs")
    page.get_by_role("heading", name="POST /v1/recommend").wait_for()
    page.get_by_role("heading", name="RecommendRequest").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.complaints == []
