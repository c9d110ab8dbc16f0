"""The view of routing, of texts and pictures: its numbers are the model's, its page shows them, a browser runs it."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_runs import TOKENIZER
from models import tiny_config, tiny_model
from PIL import Image
from transformers import ByT5Tokenizer
from vision import tiny_vision_model

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForImageClassification,
    CoLT5ForSequenceClassification,
    CoLT5Tokenizer,
    CoLT5VisionConfig,
    CoLT5VisionModel,
    show_routing,
)
from modeling_colt5.routing_page import UNIT, as_script_text, packed, picture_page, routing_page
from modeling_colt5.routing_view import LARGEST_SIDE, PictureRoutingView, RoutingView, main

# markup of every kind, a ligature that the vocabulary takes apart, runs of white space, other scripts
TEXT = (
    '</script><script>alert("routed")</script>\n<img src=x onerror=alert(1)>  <!-- &amp; \'single\' "double" -->\n'
    "def  ﬁnd(path):\n\treturn [x for x in path if x < 3 && 'ß' > \"日本語\"]  # 🙂\u2028 ]]> ${title} $$ \\u003c\n"
) * 2


ENCODERS = [CoLT5ForConditionalGeneration, CoLT5EncoderModel, CoLT5ForSequenceClassification]


@pytest.fixture(scope="module")
def tokenizer() -> CoLT5Tokenizer:
    return CoLT5Tokenizer.from_pretrained(TOKENIZER)


def make(model_class: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    return tiny_model(model_class, vocab_size=8192, **fields)


@pytest.fixture(scope="module")
def view(tokenizer: CoLT5Tokenizer) -> RoutingView:
    return show_routing(make(CoLT5ForConditionalGeneration), tokenizer, TEXT)


@pytest.mark.parametrize("model_class", ENCODERS, ids=lambda model_class: model_class.__name__)
def test_weights_are_those_of_the_models_output(tokenizer, model_class):
    model = make(model_class).train()
    view = show_routing(model, tokenizer, TEXT)
    assert model.training
    with torch.no_grad():
        routing = model.eval().encoder(**tokenizer(TEXT, return_tensors="pt"), output_routing=True).routing
    assert list(view.weights) == ["query", "key_value", "feed_forward"]
    for name, weights in view.weights.items():
        assert weights.shape == (2, len(view.tokens))
        for layer, row in zip(routing, weights, strict=True):
            expected = {
                int(place): float(weight)
                for place, weight, used in zip(
                    layer[name].indices[0], layer[name].weights[0], layer[name].valid[0], strict=True
                )
                if used
            }
            assert {place: weight for place, weight in enumerate(row.tolist()) if weight} == expected


def test_routed_cross_attention_is_shown_with_the_encoder(tokenizer):
    model = make(CoLT5ForConditionalGeneration, routed_cross_key_values=9)
    view = show_routing(model, tokenizer, TEXT)
    assert view.weights["cross"].shape == (3, len(view.tokens)) and view.weights["query"].shape[0] == 2
    assert (view.weights["cross"] > 0).sum(1).tolist() == [9, 9, 9]
    assert '"name":"cross","layers":3' in view.html()
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id of the model's configuration is None"):
        show_routing(model, tokenizer, TEXT)


def test_a_causal_model(tokenizer):
    torch.manual_seed(0)
    causal = {"causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 8}
    config = tiny_config(**causal, causal_routed_keys=12, num_heavy_heads=4, vocab_size=8192)
    model = CoLT5ForCausalLM(config).eval()
    view = show_routing(model, tokenizer, TEXT)
    with torch.no_grad():
        routing = model(**tokenizer(TEXT, return_tensors="pt"), output_routing=True).routing
    for i, layer in enumerate(routing):
        torch.testing.assert_close(view.weights["query"][i], layer.query[0])
        torch.testing.assert_close(view.weights["feed_forward"][i], layer.feed_forward[0])
        pools = layer.key_value
        used = set(pools.indices[pools.valid].tolist())
        assert set(view.weights["key_value"][i].nonzero().flatten().tolist()) <= used
        best = max(float(w) for w, p, v in zip(*(x.flatten() for x in (pools.weights, pools.indices, pools.valid)),
                                               strict=True) if v)  # fmt: skip
        assert float(view.weights["key_value"][i].max()) == best
    plain = CoLT5ForCausalLM(tiny_config(causal_attention="full", causal_feed_forward="dense", vocab_size=8192))
    with pytest.raises(ValueError, match="CoLT5ForCausalLM whose layers route nothing"):
        show_routing(plain, tokenizer, TEXT)


@pytest.mark.parametrize("text", [TEXT, "", "  two  spaces  ", "x", "\n\n"])
def test_the_tokens_are_the_text(tokenizer, text):
    view = show_routing(make(CoLT5EncoderModel), tokenizer, text)
    shown = "".join(token for token, special in zip(view.tokens, view.special, strict=True) if not special)
    # white space at the end has no token
    assert shown == text.rstrip() or shown == text
    assert view.tokens[-1] == "</s>" and view.special[-1] and not any(view.special[:-1])


def test_what_cannot_be_shown_is_refused(tokenizer, view):
    with pytest.raises(TypeError, match="document is a list"):
        show_routing(make(CoLT5EncoderModel), tokenizer, ["x"])
    with pytest.raises(ValueError, match="model is a Linear, which routes nothing"):
        show_routing(torch.nn.Linear(2, 2), tokenizer, "x")
    with pytest.raises(ValueError, match="router is 'cross'; this model has query, key_value, feed_forward"):
        view.overlap("cross")
    # a tokenizer of Python tells no places of its tokens
    for processor in (ByT5Tokenizer(), None, CoLT5VisionConfig().image_processor()):
        message = f"processor is a {type(processor).__name__}; for a text it must be a tokenizer"
        with pytest.raises(TypeError, match=message):
            show_routing(make(CoLT5EncoderModel), processor, "x")
    with pytest.raises(ValueError, match="parts is 0"):
        view.share_by_position("query", 0)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of each script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts[-1] += data


def parse(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    return elements


def test_the_texts_markup_stays_text(view):
    elements = parse(view.html())
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 2 and "img" not in tags
    data = json.loads(elements.scripts[0])
    assert data["tokens"] == view.tokens and data["pieces"] == view.pieces
    # the same elements as for a harmless text
    plain = RoutingView(view.title, ["x"] * len(view.tokens), view.pieces, view.special, view.weights)
    assert elements.found == parse(plain.html()).found
    title = "<script>alert(1)</script>"
    assert parse(RoutingView(title, *list(vars(view).values())[1:]).html()).found == elements.found


def test_nothing_is_fetched_and_no_other_script_runs(view):
    page = view.html()
    elements = parse(page)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)
    assert "url(" not in page and "@import" not in page and "fetch(" not in page and "innerHTML" not in page
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert re.fullmatch(r"default-src 'none'; script-src 'sha256-[\w+/=]+'; style-src 'sha256-[\w+/=]+'", policy)


def test_packed_weights_come_back():
    rows = [[0.0, 1.0, 0.5, 1e-9], [1 / 3, 0.0, 2.0, 0.25]]
    whole = np.frombuffer(base64.b64decode(packed(rows)), "<u2").reshape(2, 4)
    expected = np.clip(np.array(rows), 0, 1)
    assert np.abs(whole / UNIT - expected).max() <= 1 / UNIT
    assert ((whole > 0) == (expected > 0)).all()


def test_json_in_a_script_element():
    value = {"</script>": "<!--&\u2028\ud800日"}
    text = as_script_text(value)
    assert json.loads(text) == value and text.isascii() and not set("<>&") & set(text)


def test_a_notebook_shows_the_page_in_a_frame(view):
    ((tag, attributes),) = parse(view._repr_html_()).found
    assert tag == "iframe" and attributes["srcdoc"] == view.html() and attributes["sandbox"] == "allow-scripts"


def test_shares_and_overlaps_are_those_of_the_sets(view):
    for name, weights in view.weights.items():
        sets = [set(row.nonzero().flatten().tolist()) for row in weights]
        n = len(view.tokens)
        assert view.share_by_layer()[name].tolist() == pytest.approx([len(chosen) / n for chosen in sets])
        for i, one in enumerate(sets):
            for j, other in enumerate(sets):
                assert view.overlap(name)[i, j].item() == pytest.approx(len(one & other) / len(one))
        halves = view.share_by_position(name, 2)
        middle = (n + 1) // 2
        first = [sum(place < middle for place in chosen) / middle for chosen in sets]
        assert halves[:, 0].tolist() == pytest.approx(first)
        assert view.share_by_position(name, 10**6).shape == (2, n)


def test_figures_are_drawn(view):
    from matplotlib.figure import Figure

    for draw in (view.plot_share, view.plot_overlap, view.plot_weights):
        axes = Figure().subplots()
        draw(axes)
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        axes.figure.canvas.draw()
    axes = Figure().subplots()
    view.plot_overlap(axes, "feed_forward")
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), view.overlap("feed_forward"))


def test_the_command_writes_a_page(tokenizer, tmp_path, capsys):
    model = make(CoLT5ForConditionalGeneration)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    main([str(tmp_path / "model"), str(tmp_path / "text.txt"), "--out", str(tmp_path / "page.html")])
    assert "wrote" in capsys.readouterr().out
    expected = show_routing(model, tokenizer, TEXT)
    data = json.loads(parse((tmp_path / "page.html").read_text(encoding="utf-8")).scripts[0])
    assert data == json.loads(parse(expected.html()).scripts[0])
    for wrong in ([str(tmp_path / "model"), "nowhere.txt"], [str(tmp_path), str(tmp_path / "text.txt")]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "error: " in capsys.readouterr().err.splitlines()[-1]


def draw_picture(height: int, width: int) -> np.ndarray:
    """Any colours, black and white among them, uint8 [height, width, 3]."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    return pixels


@pytest.fixture(scope="module")
def picture_view() -> PictureRoutingView:
    torch.manual_seed(0)
    model = tiny_vision_model()
    return show_routing(model, model.config.image_processor(), draw_picture(22, 31))


@pytest.mark.parametrize("model_class", [CoLT5VisionModel, CoLT5ForImageClassification])
def test_weights_of_patches_are_those_of_the_models_output(model_class):
    torch.manual_seed(0)
    model = tiny_vision_model(model_class).train()
    processor, picture = model.config.image_processor(), draw_picture(22, 31)
    view = show_routing(model, processor, Image.fromarray(picture))
    assert model.training and view.grid == (6, 8) and "6 × 8 patches" in view.title
    with torch.no_grad():
        routing = model.eval()(**processor(picture, return_tensors="pt"), output_routing=True).routing
    assert list(view.weights) == ["query", "key_value", "feed_forward"]
    for name, weights in view.weights.items():
        assert weights.shape == (2, 48)
        for layer, row in zip(routing, weights, strict=True):
            slots = zip(layer[name].indices[0], layer[name].weights[0], layer[name].valid[0], strict=True)
            expected = {int(place): float(weight) for place, weight, used in slots if used}
            assert {place: weight for place, weight in enumerate(row.tolist()) if weight} == expected


def test_the_picture_shown_is_what_the_model_reads(picture_view):
    # up to a rounding of each normalised number
    shown = picture_view.picture[:22, :31].numpy().astype(int)
    assert np.abs(shown - draw_picture(22, 31)).max() <= 1
    # the last patches are filled up with the number 0, which is between black and white
    assert picture_view.picture.shape == (24, 32, 3)
    assert set(picture_view.picture[22:].flatten().tolist()) <= {127, 128}
    data = json.loads(parse(picture_view.html()).scripts[0])
    assert (data["height"], data["width"], data["rows"], data["columns"], data["count"]) == (24, 32, 6, 8, 48)
    assert base64.b64decode(data["pixels"]) == picture_view.picture.numpy().tobytes()


def test_pictures_without_colours_are_grey():
    model = tiny_vision_model(num_channels=1)
    view = show_routing(model, model.config.image_processor(), Image.fromarray(draw_picture(12, 9)[..., 0]))
    assert (view.picture == view.picture[..., :1]).all() and view.picture.unique().numel() > 10


def test_a_large_picture_is_shown_smaller():
    side = 2 * LARGEST_SIDE
    half = torch.zeros(side, side // 2, 3, dtype=torch.uint8)
    half[: side // 2] = 200
    view = PictureRoutingView("large", half, (2, 1), {"query": torch.zeros(1, 2)})
    data = json.loads(parse(view.html()).scripts[0])
    assert (data["height"], data["width"]) == (LARGEST_SIDE, LARGEST_SIDE // 2)
    pixels = np.frombuffer(base64.b64decode(data["pixels"]), np.uint8).reshape(LARGEST_SIDE, -1)
    assert (pixels[: LARGEST_SIDE // 2] == 200).all() and (pixels[LARGEST_SIDE // 2 :] == 0).all()


def test_a_pictures_page_has_only_its_own_script(picture_view):
    title = "</title><script>alert(1)</script>"
    page = picture_page(title, bytes(12), (2, 2), (1, 1), {"</script><script>": [[1.0]]})
    elements, plain = parse(page), parse(picture_page("x", bytes(12), (2, 2), (1, 1), {"x": [[1.0]]}))
    # the policy and its hashes are the same too
    assert elements.found == plain.found and [tag for tag, _ in elements.found].count("script") == 2
    assert json.loads(elements.scripts[0])["routers"][0]["name"] == "</script><script>"
    for text in (page, picture_view.html()):
        assert not any({"src", "href"} & attributes.keys() for _, attributes in parse(text).found)
        assert "url(" not in text and "@import" not in text and "fetch(" not in text and "innerHTML" not in text


def test_a_routed_picture_is_drawn(picture_view):
    from matplotlib.figure import Figure

    for layer in (None, 1):
        axes = Figure().subplots()
        picture_view.plot_picture(axes, "key_value", layer)
        axes.figure.canvas.draw()
        below, above = axes.images
        np.testing.assert_array_equal(below.get_array(), picture_view.picture)
        weights = picture_view.weights["key_value"]
        expected = weights.gt(0).float().mean(0) if layer is None else weights[layer]
        np.testing.assert_array_equal(above.get_array(), expected.view(6, 8))
        # patches that are not routed stay as they are
        assert ((above.get_alpha() > 0) == (expected.view(6, 8) > 0).numpy()).all()
        assert below.get_extent() == above.get_extent() == [0, 32, 24, 0]
    with pytest.raises(ValueError, match="layer is 2; it must be from 0 to 1"):
        picture_view.plot_picture(axes, layer=2)
    with pytest.raises(ValueError, match="router is 'cross'"):
        picture_view.plot_picture(axes, "cross")


def test_pictures_that_cannot_be_shown_are_refused(tokenizer):
    model = tiny_vision_model()
    with pytest.raises(ValueError, match="document is 2 pictures; it must be one"):
        show_routing(model, model.config.image_processor(), [draw_picture(8, 8)] * 2)
    for processor in (tokenizer, None):
        with pytest.raises(TypeError, match=f"processor is a {type(processor).__name__}; for a picture it must be"):
            show_routing(model, processor, draw_picture(8, 8))
    for plain, *rest in (
        (tiny_vision_model(routing="none"), model.config.image_processor(), draw_picture(8, 8)),
        (make(CoLT5EncoderModel, routing="none"), tokenizer, "text"),
    ):
        with pytest.raises(ValueError, match="whose layers route nothing; set routing of its configuration"):
            show_routing(plain, *rest)


def test_the_command_writes_a_pictures_page(tmp_path, capsys):
    model = tiny_vision_model()
    model.save_pretrained(tmp_path / "model")
    model.config.image_processor().save_pretrained(tmp_path / "model")
    Image.fromarray(draw_picture(22, 31)).save(tmp_path / "picture.png")
    main([str(tmp_path / "model"), str(tmp_path / "picture.png"), "--out", str(tmp_path / "page.html")])
    assert "6 × 8 patches" in capsys.readouterr().out
    expected = show_routing(model, model.config.image_processor(), draw_picture(22, 31))
    data = json.loads(parse((tmp_path / "page.html").read_text(encoding="utf-8")).scripts[0])
    assert data == json.loads(parse(expected.html()).scripts[0])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model"), str(tmp_path / "broken.png")])
    assert "error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Any:
    """A headless Chromium, where there is one and Playwright to drive it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser: Any, file: Path) -> tuple[Any, list[str], list[str]]:
    """The page, and what it will say or ask for while it is used."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    return page, said, asked


# starts a browser
@pytest.mark.slow
def test_a_browser_shows_it(browser, view, tmp_path):
    file = view.save(tmp_path / "page.html")
    page, said, asked = open_page(browser, file)
    assert page.locator("main").evaluate("main => main.textContent") == "".join(view.tokens)
    assert page.locator("main img, main script").count() == 0

    def shaded() -> set[int]:
        page.wait_for_timeout(100)
        return set(page.evaluate("[...document.querySelectorAll('main span')].flatMap((s, i) => /s\\d/.test(s.className) ? [i] : [])"))  # fmt: skip  # noqa: E501

    routed = {name: weights > 0 for name, weights in view.weights.items()}
    anywhere = torch.stack(list(routed.values())).flatten(0, 1).any(0)
    assert shaded() == set(anywhere.nonzero().flatten().tolist())
    page.locator("#router").select_option(label="query")
    for layer in (1, 2):
        page.locator("#layer").fill(str(layer))
        assert shaded() == set(routed["query"][layer - 1].nonzero().flatten().tolist())
        assert page.locator("#where").inner_text() == f"layer {layer} of 2"
    token = int(view.weights["query"][1].argmax())
    page.locator("main span").nth(token).hover()
    card = page.locator("#card").inner_text()
    assert f"token {token}: {view.pieces[token]}" in card and f"{view.weights['query'][1, token]:.3f}" in card
    page.locator("#search").fill("RETURN")
    page.wait_for_timeout(300)
    assert page.locator("#found").inner_text() == "2 found"
    page.locator("#search").press("Enter")
    assert page.locator("#found").inner_text() == "1 of 2"
    marked = page.evaluate("[...document.querySelectorAll('main span.here')].map(s => s.textContent).join('')")
    assert "return" in marked
    assert said == [] and asked == [file.as_uri()]


@pytest.mark.slow
def test_a_browser_is_not_held_up_by_16384_tokens(browser, tmp_path):
    """12 layers of 3 routers: each step of the slider takes less than half a second, on a slow machine too."""
    n, layers = 16_384, 12
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.rand(layers, n, generator=generator) - 0.8).clamp(min=0).mul(5).tolist()
        for name in ("query", "key_value", "feed_forward")
    }
    file = tmp_path / "page.html"
    tokens = [f"word{i % 97}{chr(10) if i % 12 == 11 else ' '}" for i in range(n)]
    file.write_text(routing_page("long", tokens, tokens, [False] * n, weights), encoding="utf-8")
    page, said, _ = open_page(browser, file)
    slowest = page.evaluate(
        """async () => {
            const slider = document.getElementById("layer");
            let slowest = 0;
            for (let layer = 0; layer <= 12; layer++) {
                const began = performance.now();
                slider.value = layer;
                slider.dispatchEvent(new Event("input"));
                await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
                slowest = Math.max(slowest, performance.now() - began);
            }
            return slowest;
        }"""
    )
    assert slowest < 500 and said == []


@pytest.mark.slow
def test_a_browser_shows_a_picture(browser, picture_view, tmp_path):
    file = picture_view.save(tmp_path / "page.html")
    page, said, asked = open_page(browser, file)
    read = """n => { const c = document.querySelectorAll('canvas')[n];
        return [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }"""
    width, height, pixels = page.evaluate(read, 0)
    assert (height, width) == (24, 32)
    assert (np.array(pixels).reshape(24, 32, 4)[..., :3] == picture_view.picture.numpy()).all()

    def shaded() -> set[int]:
        page.wait_for_timeout(100)
        opacity = np.array(page.evaluate(read, 1)[2]).reshape(6, 4, 8, 4, 4)[..., 3]
        # a patch is shaded whole or not at all
        assert (opacity.min((1, 3)) == opacity.max((1, 3))).all()
        return set(np.flatnonzero(opacity.max((1, 3))).tolist())

    routed = {name: weights > 0 for name, weights in picture_view.weights.items()}
    assert shaded() == set(torch.stack(list(routed.values())).flatten(0, 1).any(0).nonzero().flatten().tolist())
    page.locator("#router").select_option(label="feed_forward")
    for layer in (1, 2):
        page.locator("#layer").fill(str(layer))
        assert shaded() == set(routed["feed_forward"][layer - 1].nonzero().flatten().tolist())
    patch = int(picture_view.weights["feed_forward"][1].argmax())
    box = page.locator("#picture").bounding_box()
    row, column = divmod(patch, 8)
    page.mouse.move(box["x"] + (column + 0.5) / 8 * box["width"], box["y"] + (row + 0.5) / 6 * box["height"])
    card = page.locator("#card").inner_text()
    assert f"row {row}, column {column}" in card and f"{picture_view.weights['feed_forward'][1, patch]:.3f}" in card
    # Chromium has a word on how this test, not the page, reads the canvas
    assert [line for line in said if "willReadFrequently" not in line] == [] and asked == [file.as_uri()]
