"""The pages that show routing, of a text or of a picture: one HTML file each, nothing from the network, and all text
stays text."""

import base64
import hashlib
import html
import json
import struct
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

# weights are kept as whole numbers up to this; 0 is a token that was not routed
UNIT = 65535

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d0d7de; --heavy: 9, 105, 218;
  --hit: #fff3b0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --heavy: 88, 166, 255; --hit: #6b5900; }
}
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 1; padding: 10px 18px; background: var(--paper);
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: center; }
h1 { font-size: 16px; margin: 0; flex-basis: 100%; }
label { display: inline-flex; gap: 8px; align-items: center; }
select, input { font: inherit; }
input[type=range] { width: 190px; }
#where, #found, #share { min-width: 6.5em; font-variant-numeric: tabular-nums; }
#legend { display: inline-flex; align-items: center; gap: 6px; font-size: 13px; }
#legend i { width: 18px; height: 14px; border: 1px solid var(--line); }
#card { position: fixed; z-index: 2; pointer-events: none; padding: 8px 10px;
  background: var(--paper); color: var(--ink); border: 1px solid var(--line); border-radius: 6px;
  box-shadow: 0 4px 14px rgba(0, 0, 0, 0.25); font-size: 12.5px; }
#card[hidden] { display: none; }
#card table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: 4px; }
#card th, #card td { padding: 0 7px; text-align: right; font-weight: normal; }
#card thead th { border-bottom: 1px solid var(--line); }
#card td.on { background: rgba(var(--heavy), 0.3); }
"""


def _shades(least: float, more: float) -> str:
    """The style of the steps 1 to 10, each of which covers more of what is below it."""
    return "".join(
        f".s{step} {{ background: rgba(var(--heavy), {least + more * step:.3f}); }}\n" for step in range(1, 11)
    )


TEXT_STYLE = """
main { padding: 16px 18px 40vh; max-width: 110ch; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
main span { border-radius: 2px; }
main span.special { opacity: 0.55; font-size: 12px; }
main span.hit { outline: 2px solid #bf8700; background-color: var(--hit); }
main span.here { outline-width: 3px; outline-color: #cf222e; }
main span:hover { outline: 1px solid var(--ink); }
""" + _shades(0.10, 0.075)

PICTURE_STYLE = """
main { padding: 16px 18px; }
#picture { position: relative; width: min(94vw, 1024px); margin: 0 auto; }
#picture canvas { display: block; width: 100%; height: 100%; image-rendering: pixelated;
  border: 1px solid var(--line); }
#picture canvas + canvas { position: absolute; inset: 0; border-color: transparent; }
""" + _shades(0.15, 0.055)

# What both pages do. Each says after it how it is shown: `paint(place, step)` shades one of `count` places in steps
# from 0 to 10, and `name(place)` is what stands above the weights of a place.
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main"), card = document.getElementById("card");
const routerMenu = document.getElementById("router"), slider = document.getElementById("layer");
const where = document.getElementById("where"), share = document.getElementById("share");

function numbers(text) {
  const bytes = atob(text), whole = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < whole.length; i++) whole[i] = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
  return whole;
}
const count = data.count, shades = new Uint8Array(count);
const routers = data.routers.map(r => ({ name: r.name, layers: r.layers, weights: numbers(r.weights) }));

routerMenu.append(new Option("all routers", -1));
routers.forEach((r, k) => routerMenu.append(new Option(r.name, k)));
function chosen() { return Number(routerMenu.value) < 0 ? routers : [routers[Number(routerMenu.value)]]; }

function shade() {
  const layer = Number(slider.value), picked = chosen();
  let routed = 0;
  for (let i = 0; i < count; i++) {
    let sum = 0, places = 0;
    for (const r of picked) {
      const first = layer ? layer - 1 : 0, last = layer ? Math.min(layer, r.layers) : r.layers;
      for (let l = first; l < last; l++) {
        const weight = r.weights[l * count + i];
        sum += layer ? weight / data.unit : (weight > 0);
        places++;
      }
    }
    if (sum > 0) routed++;
    const step = sum > 0 ? Math.max(1, Math.round(10 * sum / places)) : 0;
    if (step !== shades[i]) {
      paint(i, step);
      shades[i] = step;
    }
  }
  where.textContent = layer ? "layer " + layer + " of " + data.layers : "all layers";
  share.textContent = (100 * routed / Math.max(1, count)).toFixed(1) + " % routed";
  document.getElementById("low").textContent = layer ? "weight 0" : "never";
  document.getElementById("high").textContent = layer ? "1" : "in every layer";
}
let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; shade(); });
}
slider.addEventListener("input", later);
routerMenu.addEventListener("change", later);

function cell(row, kind, content, on) {
  const made = document.createElement(kind);
  made.textContent = content;
  if (on) made.className = "on";
  row.append(made);
}
function describe(i) {
  const title = document.createElement("div"), table = document.createElement("table");
  title.textContent = name(i);
  const head = table.createTHead().insertRow();
  cell(head, "th", "layer");
  routers.forEach(r => cell(head, "th", r.name));
  const body = table.createTBody();
  for (let l = 0; l < data.layers; l++) {
    const row = body.insertRow();
    cell(row, "td", l + 1);
    for (const r of routers) {
      const weight = l < r.layers ? r.weights[l * count + i] : 0;
      cell(row, "td", weight ? (weight / data.unit).toFixed(3) : "\\u00b7", weight > 0);
    }
  }
  card.replaceChildren(title, table);
}
function showCard(i, box) {
  describe(i);
  card.hidden = false;
  const size = card.getBoundingClientRect();
  const below = box.bottom + 6 + size.height < innerHeight;
  card.style.left = Math.max(4, Math.min(box.left, innerWidth - size.width - 8)) + "px";
  card.style.top = Math.max(4, below ? box.bottom + 6 : box.top - size.height - 6) + "px";
}
main.addEventListener("mouseleave", () => { card.hidden = true; });
"""

TEXT_SCRIPT = """
const search = document.getElementById("search"), found = document.getElementById("found");
const spans = new Array(count);
const pieces = document.createDocumentFragment();
for (let i = 0; i < count; i++) {
  const span = document.createElement("span");
  span.textContent = data.tokens[i];
  span.dataset.i = i;
  if (data.special[i]) span.classList.add("special");
  spans[i] = span;
  pieces.append(span);
}
main.append(pieces);
function paint(i, step) {
  if (shades[i]) spans[i].classList.remove("s" + shades[i]);
  if (step) spans[i].classList.add("s" + step);
}
function name(i) { return "token " + i + ": " + data.pieces[i]; }
main.addEventListener("mouseover", event => {
  const span = event.target.closest("span");
  if (span) showCard(Number(span.dataset.i), span.getBoundingClientRect());
});

let hits = [], here = -1;
const ends = new Array(count);
let text = "";
for (let i = 0; i < count; i++) { text += data.tokens[i]; ends[i] = text.length; }
// a few characters have more in lower case: places would differ, so case counts in such a text
const folds = text.toLowerCase().length === text.length;
const lower = folds ? text.toLowerCase() : text;
function tokenAt(place) {
  let low = 0, high = count - 1;
  while (low < high) { const mid = (low + high) >> 1; if (ends[mid] > place) high = mid; else low = mid + 1; }
  return low;
}
function find() {
  for (const hit of hits) for (const i of hit) spans[i].classList.remove("hit", "here");
  hits = []; here = -1;
  const wanted = folds ? search.value.toLowerCase() : search.value;
  if (wanted) {
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, at + wanted.length)) {
      const hit = [];
      for (let i = tokenAt(at); i <= tokenAt(at + wanted.length - 1); i++) {
        hit.push(i);
        spans[i].classList.add("hit");
      }
      hits.push(hit);
    }
  }
  found.textContent = wanted ? hits.length + " found" : "";
}
function next(step) {
  if (!hits.length) return;
  if (here >= 0) for (const i of hits[here]) spans[i].classList.remove("here");
  here = (here + step + hits.length) % hits.length;
  for (const i of hits[here]) spans[i].classList.add("here");
  spans[hits[here][0]].scrollIntoView({ block: "center" });
  found.textContent = (here + 1) + " of " + hits.length;
}
let timer = 0;
search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(find, 120); });
search.addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  clearTimeout(timer);
  if (here < 0) find();
  next(event.shiftKey ? -1 : 1);
});

shade();
"""

PICTURE_SCRIPT = """
const frame = document.getElementById("picture"), [below, above] = frame.querySelectorAll("canvas");
const bytes = atob(data.pixels), image = new ImageData(data.width, data.height);
for (let i = 0; i < data.width * data.height; i++) {
  for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes.charCodeAt(3 * i + c);
  image.data[4 * i + 3] = 255;
}
for (const canvas of [below, above]) { canvas.width = data.width; canvas.height = data.height; }
frame.style.aspectRatio = data.width + " / " + data.height;
below.getContext("2d").putImageData(image, 0, 0);
const pen = above.getContext("2d");
function colour(step) {
  const sample = document.createElement("i");
  sample.className = "s" + step;
  card.append(sample);
  const found = getComputedStyle(sample).backgroundColor;
  sample.remove();
  return found;
}
const colours = Array.from({ length: 11 }, (_, step) => colour(step));
// sides of a patch in pixels of the canvas
const tall = data.height / data.rows, broad = data.width / data.columns;
function edges(i) {
  const row = Math.floor(i / data.columns), column = i % data.columns;
  const left = Math.round(column * broad), top = Math.round(row * tall);
  return [left, top, Math.round((column + 1) * broad) - left, Math.round((row + 1) * tall) - top];
}
function paint(i, step) {
  pen.clearRect(...edges(i));
  if (!step) return;
  pen.fillStyle = colours[step];
  pen.fillRect(...edges(i));
}
function name(i) { return "row " + Math.floor(i / data.columns) + ", column " + i % data.columns; }
frame.addEventListener("mousemove", event => {
  const box = frame.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / box.width * data.columns);
  const row = Math.floor((event.clientY - box.top) / box.height * data.rows);
  if (row < 0 || column < 0 || row >= data.rows || column >= data.columns) return;
  const left = box.left + column / data.columns * box.width, top = box.top + row / data.rows * box.height;
  showCard(row * data.columns + column, { left: left, top: top, bottom: top + box.height / data.rows });
});
shade();
"""

SEARCH = """<label>search <input id="search" type="search" autocomplete="off"></label>
<output id="found"></output>
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<label>router <select id="router"></select></label>
<label>layer <input id="layer" type="range" min="0" max="$layers" value="0" step="1"></label>
<output id="where"></output>
<output id="share"></output>
$controls<span id="legend"><span id="low"></span>$legend<span id="high"></span></span>
</header>
<main>$main</main>
<div id="card" hidden></div>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
""")


def as_script_text(value: Any) -> str:
    """JSON that stands in a page's script element: no character of it ends the element or begins a comment."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def packed(weights: Sequence[Sequence[float]]) -> str:
    """Weights from 0 to 1, row by row, as little-endian whole numbers of 16 bits in base64; above 0 stays above 0."""
    whole = [max(1, min(UNIT, round(weight * UNIT))) if weight > 0 else 0 for row in weights for weight in row]
    return base64.b64encode(struct.pack(f"<{len(whole)}H", *whole)).decode("ascii")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _page(
    title: str,
    weights: Mapping[str, Sequence[Sequence[float]]],
    own: dict[str, Any],
    style: str,
    script: str,
    controls: str = "",
    main: str = "",
) -> str:
    """A page with `own` data, style, script, controls and elements beside those of all pages."""
    data = {
        **own,
        "unit": UNIT,
        "layers": max(len(rows) for rows in weights.values()),
        "routers": [{"name": name, "layers": len(rows), "weights": packed(rows)} for name, rows in weights.items()],
    }
    style, script = STYLE + style, SCRIPT + script
    return PAGE.substitute(
        # only the page's own script runs, and nothing is fetched
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}",
        title=html.escape(title),
        style=style,
        layers=data["layers"],
        controls=controls,
        main=main,
        legend="".join(f'<i class="s{step}"></i>' for step in (1, 4, 7, 10)),
        data=as_script_text(data),
        script=script,
    )


def routing_page(
    title: str,
    tokens: Sequence[str],
    pieces: Sequence[str],
    special: Sequence[bool],
    weights: Mapping[str, Sequence[Sequence[float]]],
) -> str:
    """A standalone page of a document's routing.

    Args:
        title: what stands at its top.
        tokens: each token's part of the document; together they are what the page shows.
        pieces: what the tokenizer calls each.
        special: which tokens stand for no text of the document.
        weights: by the router's name, each layer's weight for each token, 0 where it was not routed.
    """
    own = {
        "count": len(tokens),
        "tokens": list(tokens),
        "pieces": list(pieces),
        "special": [int(flag) for flag in special],
    }
    return _page(title, weights, own, TEXT_STYLE, TEXT_SCRIPT, controls=SEARCH)


def picture_page(
    title: str,
    pixels: bytes,
    size: tuple[int, int],
    grid: tuple[int, int],
    weights: Mapping[str, Sequence[Sequence[float]]],
) -> str:
    """A standalone page of a picture's routing.

    Args:
        title: what stands at its top.
        pixels: three bytes each, red, green and blue, row by row.
        size: height and width of the picture in pixels.
        grid: rows and columns of patches, which cover the picture.
        weights: by the router's name, each layer's weight for each patch, 0 where it was not routed.
    """
    (height, width), (rows, columns) = size, grid
    own = {
        "count": rows * columns,
        "pixels": base64.b64encode(pixels).decode("ascii"),
        "height": height,
        "width": width,
        "rows": rows,
        "columns": columns,
    }
    canvases = '<div id="picture"><canvas></canvas><canvas></canvas></div>'
    return _page(title, weights, own, PICTURE_STYLE, PICTURE_SCRIPT, main=canvases)
