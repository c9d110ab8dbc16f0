"""The web page of annotate_types.py: what it says, and what a browser makes of a module that is full of markup."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_routing_view import browser  # noqa: F401

ROOT = Path(__file__).parent.parent
pytest.importorskip("gradio", reason="gradio is not installed; it is in spaces/python-types/requirements.txt")
sys.path.insert(0, str(ROOT / "spaces/python-types"))

import app  # noqa: E402

TABLE = {"div", "table", "thead", "tbody", "tr", "th", "td", "p"}
# the model copies what it sees, and each place where text is shown gets some of it
MARKUP = '''def f(a: "list['<img src=x onerror=alert(1)>']", b: "T${alert(2)}"): ...


def g(a, b, c="</pre></script><script>alert(3)</script><img src=x onerror=alert(4)>"):
    """{{ constructor }} ${alert(5)} <iframe srcdoc="<script>parent.alert(6)</script>"></iframe> &lt;b&gt; $$x$$"""
    return [c, "']]>--><svg onload=alert(7)>", "<extra_id_0>"]
'''


@pytest.fixture(scope="module")
def page() -> app.Page:
    return app.Page(*app.load(app.CHECKPOINT))


class Text(HTMLParser):
    """The elements of a page, and what it shows."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_modules_markup_stays_text(page):
    said, diff, types, routing, module = page.annotate(MARKUP, 16)
    assert set(Text(diff).tags) == {"pre", "span"} and set(Text(types).tags) <= TABLE
    assert Text(routing).tags == ["iframe"] and Text(said).tags == []
    for part in (said, diff, types):
        assert "${" not in part and "{{" not in part
    shown = Text(diff).text
    assert "alert(3)" in shown and "--- a/module.py" in shown
    added = [line[1:] for line in shown.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert added and all(line in module for line in added)
    assert re.fullmatch(r"5 places of \d+ tokens, read in one piece, in \d+\.\d s; one query among 16 routed", said)


def test_the_budget_is_the_routers(page):
    shares = []
    text = app.EXAMPLE * 8
    for budget in (64, 4):
        page.annotate(text, budget)
        shares.append(page.model.config.routed_query_fraction)
        assert page.model.config.routed_key_value_fraction == min(1, 2 / budget)
    assert shares == [1 / 64, 1 / 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "module.py: is empty"),
        (" \n", "module.py: is empty"),
        ("def f(:\n", "module.py, line 1: is not Python"),
        ("x = 1\n", "nothing to fill in"),
        ("def f(a): ...\n" + "#" * app.MOST_CHARACTERS, "must have at most 200,000: split the module"),
        ("if a" + ".b" * 600 + ": pass\ndef f(a): ...\n", "is nested too deeply"),
        ("def f(a): ...\n# \ud800\n", "line 2: UTF-8 has no"),
        ("def f(a): ...\0\n", "is not Python"),
    ],
)
def test_what_cannot_be_annotated_is_said(page, text, message):
    said, *rest = page.annotate(text, 16)
    assert message in Text(said).text and 'role="alert"' in said and rest == [""] * 4


def test_an_uploaded_file_is_read_in_its_encoding(page, tmp_path):
    (tmp_path / "module.py").write_bytes('# -*- coding: latin-1 -*-\ndef f(a="é"): ...\n'.encode("latin-1"))
    assert page.upload(str(tmp_path / "module.py")) == ('# -*- coding: latin-1 -*-\ndef f(a="é"): ...\n', "")
    (tmp_path / "module.py").write_bytes(b"\xff\xfe<b>")
    text, said = page.upload(str(tmp_path / "module.py"))
    assert text == "" and "module.py, line 1" in said and str(tmp_path) not in said and "<b>" not in said
    assert page.upload(None) == ("", "")


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^app.py: model is .*none', where no folder is"):
        app.main(["--model", str(tmp_path / "none")])


@pytest.fixture(scope="module")
def address(page) -> Any:
    blocks, address = app.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield address
    blocks.close()


# starts a browser
@pytest.mark.slow
def test_a_browser_shows_it(browser, address, tmp_path):  # noqa: F811
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto(address)
    box, button = page.locator("#module textarea"), page.locator("#annotate")
    box.wait_for()

    def wait_for(name: str, text: str) -> str:
        page.locator(name).get_by_text(text).first.wait_for(timeout=60_000, state="attached")
        return page.locator(name).inner_text()

    button.click()
    assert "skip_empty: bool = False" in wait_for("#diff", "+def count_lines")
    assert "one query among 16 routed" in page.locator("#said").inner_text()

    # the slider: one step to the right
    page.locator("#budget input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.locator("#budget input[type=range]").dispatch_event("pointerup")
    wait_for("#said", "one query among 20 routed")

    # markup
    box.fill(MARKUP)
    button.click()
    shown = wait_for("#diff", "alert(7)")
    assert "<svg onload=alert(7)>" in shown and "${alert(5)}" in shown
    assert page.locator("#diff img, #diff script, #types img, #types script, #diff svg").count() == 0
    page.get_by_role("tab", name="Types").click()
    assert "what it returns" in page.locator("#types").inner_text()
    page.screenshot(path=tmp_path / "types.png")
    page.get_by_role("tab", name="Where the routers looked").click()
    frame = page.frame_locator("#routing iframe")
    frame.locator("main span").first.wait_for()
    assert "<svg onload=alert(7)>" in frame.locator("main").inner_text() and frame.locator("main img").count() == 0
    frame.locator("#layer").fill("2")
    page.wait_for_timeout(300)
    assert frame.locator("#where").inner_text() == "layer 2 of 6"
    page.screenshot(path=tmp_path / "routing.png")

    # an error takes the last result away
    box.fill("def f(:\n")
    button.click()
    assert "is not Python" in wait_for("#said", "module.py, line 1")
    assert page.locator("#diff pre").count() == 0 and page.locator("#routing iframe").count() == 0

    # a file
    (tmp_path / "uploaded.py").write_text("def uploaded(path, name): ...\n")
    page.locator("#file input[type=file]").set_input_files(tmp_path / "uploaded.py")
    page.wait_for_function("document.querySelector('#module textarea').value.includes('uploaded')")
    button.click()
    page.get_by_role("tab", name="Difference").click()
    assert "def uploaded(path: " in wait_for("#diff", "+def uploaded")
    page.screenshot(path=tmp_path / "diff.png")

    assert said == []
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
