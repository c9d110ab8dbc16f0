"""The notebook runs from its first cell to its last, and is kept without outputs."""

import html
import inspect
import json
import os
import pickle
import re
import uuid
from pathlib import Path

import pytest
from example_runs import PATIENT
from test_routing_view import parse

# of the extra "dev", which a machine with a torch of its own may lack
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "colt5_in_a_notebook.ipynb"


def test_outputs_are_stripped():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


# reads some 17,000 tokens seven times and trains for thirty steps: half a minute
@pytest.mark.slow
def test_it_runs(tmp_path, request):
    """Every cell; it pushes where there is a loopback Hub to push to."""
    environment = dict(os.environ)
    if "COLT5_TEST_HUB_ENDPOINT" in environment:
        environment = dict(request.getfixturevalue("hub_environment"))
        environment["COLT5_NOTEBOOK_REPOSITORY"] = f"notebook-{uuid.uuid4().hex[:8]}"
    environment |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(NOTEBOOK.parent)}}, **PATIENT)
    client.execute(env=environment)

    code = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    printed = {name: "".join(output.get("text", "") for output in cell.outputs) for name, cell in code.items()}
    pages = [code[name].outputs[0]["data"]["text/html"] for name in ("routing", "routing-again")]
    frames = [html.unescape(re.search(r'srcdoc="([^"]*)"', page)[1]) for page in pages]
    new, trained = (json.loads(parse(frame).scripts[0]) for frame in frames)
    for shown in (new, trained):
        text = [token for token, is_special in zip(shown["tokens"], shown["special"], strict=True) if not is_special]
        assert "".join(text).strip() == inspect.getsource(pickle).strip()
    for before, after in zip(new["routers"], trained["routers"], strict=True):
        assert before["weights"] != after["weights"], f"training changed no choice of {before['name']}"
    rows = [line.split() for line in printed["budget"].splitlines()[1:]]
    distances = [float(distance) for _, _, distance in rows]
    assert len(rows) == 4 and distances[0] == 0 and all(distance > 0 for distance in distances[1:])
    before, after = map(float, re.findall(r"(\d+\.\d+) (?:before|after)", printed["train"]))
    assert after < before - 1
    assert printed["push"].startswith("pushed to" if "COLT5_NOTEBOOK_REPOSITORY" in environment else "kept in")
