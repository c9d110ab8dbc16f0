"""A web page of annotate_types.py: paste or upload a module; see its types, where the routers looked, and the time.

    pip install -r spaces/python-types/requirements.txt
    python spaces/python-types/app.py                     # --model FOLDER, --port NUMBER

What is pasted is shown as text alone and is never run; nothing is fetched from the network.
"""

import argparse
import html
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

# before gradio is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

# beside this file in a Space, two folders up in the repository
HERE = Path(__file__).resolve().parent
ROOT = next(folder for folder in (HERE, *HERE.parents) if (folder / "examples/annotate_types.py").exists())
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import gradio as gr  # noqa: E402
from annotate_types import CHECKPOINT, Annotated, annotate, load  # noqa: E402
from python_types.holes import hide  # noqa: E402
from python_types.source import SourceError, read_source, source_of, unified_diff  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.middleware.base import BaseHTTPMiddleware  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402

from modeling_colt5 import show_routing  # noqa: E402

# a longer text is refused before anything reads it: about 64,000 tokens
MOST_CHARACTERS = 200_000
# one token among so many is routed
TRAINED_BUDGET = 16
# gradio's own page asks for a script of another host
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
STYLE = """
.code textarea, .types-diff, .types-table td { font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: 13px; }
.types-diff { white-space: pre; overflow: auto; max-height: 640px; margin: 0; line-height: 1.45; }
.types-diff .added { background: rgba(46, 160, 67, 0.22); }
.types-diff .removed { background: rgba(248, 81, 73, 0.20); }
.types-diff .place { color: rgb(9, 105, 218); }
.types-wide { overflow-x: auto; }
.types-table { border-collapse: collapse; width: 100%; }
.types-table th, .types-table td { padding: 2px 10px; text-align: left;
  border-bottom: 1px solid rgba(128, 128, 128, 0.3); }
.types-table td:nth-child(1), .types-table td:nth-child(4) { text-align: right; }
.types-error { border-left: 4px solid rgb(207, 34, 46); padding: 6px 12px; }
"""
EXAMPLE = """from pathlib import Path


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    return path.read_text(encoding=encoding).splitlines()


def count_lines(path, encoding="utf-8", skip_empty=False):
    return len([line for line in read_lines(path, encoding) if line or not skip_empty])
"""
# the page's parts as they are without a result: what is said, diff, annotations, routing, module
NOTHING = ("", "", "", "")


def as_text(text: str) -> str:
    """Text for a page: no character of it is markup, nor a place of gradio's templates."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")


def as_error(message: str) -> str:
    """What is said of a module that cannot be annotated."""
    return f'<div class="types-error" role="alert">{as_text(message)}</div>'


def diff_page(diff: str) -> str:
    """A unified diff with colours."""
    kinds = {"+": "added", "-": "removed", "@": "place"}
    lines = []
    for line in diff.splitlines():
        kind = "" if line.startswith(("+++", "---")) else kinds.get(line[:1], "")
        lines.append(f'<span class="{kind}">{as_text(line)}</span>')
    return f'<pre class="types-diff">{chr(10).join(lines)}</pre>'


def annotations_page(annotated: Annotated) -> str:
    """A table of each place's type, and how sure the model is of it, or that it is copied from the module."""
    rows = []
    for one in annotated.annotations:
        place = "what it returns" if one.hole.is_return else one.hole.key
        sure = f"{one.probability:.0%}"
        if one.copied is not None:
            shown, sure = one.copied, f"copied (the model: {one.type or 'no type'}, {sure})"
        else:
            shown = one.type or "left: the answer is no type"
        cells = (str(one.hole.line), one.hole.function, place, sure, shown)
        rows.append("<tr>" + "".join(f"<td>{as_text(cell)}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{head}</th>" for head in ("line", "function", "place", "probability", "type"))
    notes = []
    if annotated.needed.imports:
        notes.append(f"To be imported: {', '.join(annotated.needed.imports)}.")
    if annotated.needed.early:
        names = ", ".join(annotated.needed.early)
        notes.append(f"Used before they are there: {names}; put `from __future__ import annotations` first.")
    if annotated.needed.inner:
        notes.append(
            f"Known by these names alone, and by none inside a function: {', '.join(annotated.needed.inner)}."
        )
    said = "".join(f"<p>{as_text(note)}</p>" for note in notes)
    table = f'<table class="types-table"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="types-wide">{table}</div>{said}'


class Page:
    """What the page does, with one model.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        # the budget is the model's own: one request at a time
        self.lock = threading.Lock()

    def upload(self, path: str | None) -> tuple[str, str]:
        """An uploaded file's text, and what is said of it."""
        if path is None:
            return "", ""
        try:
            return read_source(path).text, ""
        except SourceError as error:
            return "", as_error(str(error).replace(path, Path(path).name))

    def annotate(self, text: str, budget: float) -> tuple[str, str, str, str, str]:
        """What is said, the diff, the types, the routing and the module of a text.

        Args:
            text: a module.
            budget: one token among so many is routed.
        """
        try:
            if len(text) > MOST_CHARACTERS:
                raise SourceError(
                    f"module.py: has {len(text):,} characters; must have at most {MOST_CHARACTERS:,}: split the module"
                )
            source = source_of(text)
            with self.lock:
                self.model.set_routing_budget(
                    query=1 / budget, feed_forward=1 / budget, key_value=min(1.0, 2 / budget)
                )
                started = time.perf_counter()
                annotated = annotate(source, self.model, self.tokenizer)
                seconds = time.perf_counter() - started
                # as the model read it
                holes = [one.hole for one in annotated.annotations][: len(self.tokenizer.get_sentinel_token_ids())]
                view = show_routing(self.model, self.tokenizer, hide(source.text, holes).text)
        except SourceError as error:
            return as_error(str(error)), *NOTHING
        tokens, places = len(view.tokens), len(annotated.annotations)
        said = f"{places:,} places of {tokens:,} tokens, read in one piece, in {seconds:.1f} s; one query among "
        said += f"{budget:g} routed"
        diff = unified_diff(source.text, annotated.text, "module.py")
        return as_text(said), diff_page(diff), annotations_page(annotated), view._repr_html_(), annotated.text


def build(page: Page) -> gr.Blocks:
    """The page's components."""
    with gr.Blocks(title="The types of a Python module", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown(
            "# The types of a Python module\nA CoLT5 of 15 M parameters reads a whole module in one piece, and fills "
            "in the annotations of parameters and returns that it lacks. A type that it gives parses, and may be "
            "wrong: run a type checker."
        )
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(
                    EXAMPLE, label="A Python module", lines=18, max_lines=30, elem_id="module", elem_classes="code"
                )
                upload = gr.File(label="or a file", file_types=[".py"], type="filepath", height=140, elem_id="file")
                budget = gr.Slider(
                    4,
                    64,
                    TRAINED_BUDGET,
                    step=4,
                    label=f"one token among so many takes the heavy branches (trained with {TRAINED_BUDGET})",
                    elem_id="budget",
                )
                button = gr.Button("Annotate", variant="primary", elem_id="annotate")
                said = gr.HTML(elem_id="said")
            with gr.Column(scale=2), gr.Tabs():
                with gr.Tab("Difference"):
                    diff = gr.HTML(elem_id="diff")
                with gr.Tab("Types"):
                    types = gr.HTML(elem_id="types")
                with gr.Tab("Where the routers looked"):
                    routing = gr.HTML(elem_id="routing")
                with gr.Tab("Module"):
                    module = gr.Code(language="python", interactive=False, elem_id="annotated", max_lines=40)

        upload.change(page.upload, upload, [text, said], api_visibility="private")
        for event in (button.click, budget.release):
            event(
                page.annotate,
                [text, budget],
                [said, diff, types, routing, module],
                api_visibility="private",
                concurrency_limit=1,
                concurrency_id="model",
            )
    return blocks


class Policy(BaseHTTPMiddleware):
    """Tells the browser to fetch nothing from other hosts."""

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response


def launch(page: Page, **options: Any) -> tuple[gr.Blocks, str]:
    """Start the page; gives it, and its address.

    Args:
        page: what it does.
        options: of gradio's `launch`.
    """
    blocks = build(page)
    # the default theme's fonts are another host's
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = blocks.launch(
        theme=gr.themes.Default(**fonts),
        css=STYLE,
        max_file_size=MOST_CHARACTERS * 4,
        footer_links=[],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(Policy)]},
        **options,
    )
    return blocks, address


def main(argv: list[str] | None = None) -> None:
    """Load the model, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    arguments = parser.parse_args(argv)
    try:
        page = Page(*load(arguments.model))
    except (ValueError, OSError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        sys.exit(f"app.py: {first}")
    launch(page, server_port=arguments.port)


if __name__ == "__main__":
    main()
