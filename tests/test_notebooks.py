"""Each short notebook runs from its first cell to its last, and is kept without outputs."""

import json
import os
import re
from pathlib import Path

import pytest
from example_runs import PATIENT

# of the extra "dev", which a machine with a torch of its own may lack
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[1]
# test_notebook.py runs the long one
NOTEBOOKS = [path for path in sorted(ROOT.glob("examples/*.ipynb")) if path.stem != "colt5_in_a_notebook"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_no_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


# what each shows beside a figure, in the outputs of its cells
SHOWN = {
    "convert": r"^\d\.\de-0[67]\n",
    "embed_and_classify": r"of held-out modules, by chance 0.25",
    "fine_tune": r"memory  [\d.]+ GiB.*'eval_f1': [\d.]+",
    "generate": r"(<pad><extra_id_0> str<extra_id_1> bool</s>)<pad>.*\n\1\n",
    "see_routing": r"<iframe",
}


# a kernel of its own: some ten seconds
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(paths), "IPYTHONDIR": str(tmp_path), "TMPDIR": str(tmp_path)
    }  # fmt: skip
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **PATIENT)
    client.execute(env=environment)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    kinds = ("text/html", "text/plain")
    texts = [output.get("text") or "".join(output.get("data", {}).get(kind, "") for kind in kinds) for output in shown]
    text = "\n".join(part.strip("\n") for part in texts if "arning" not in part) + "\n"
    assert re.search(SHOWN[path.stem], text, re.DOTALL | re.MULTILINE), text[-3000:]
