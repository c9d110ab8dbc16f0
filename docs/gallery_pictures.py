"""The gallery's pictures: run every notebook that draws, and keep its last figure.

python docs/gallery_pictures.py [NAME ...]
"""

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent
EXAMPLES = DOCS.parent / "examples"


def main(names: list[str]) -> None:
    """Write docs/gallery_<name>.png of each."""
    for name in names or sorted(path.stem for path in EXAMPLES.glob("*.ipynb")):
        notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        for picture in pictures[-1:]:
            (DOCS / f"gallery_{name}.png").write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main(sys.argv[1:])
