"""PDFs as input of the training scripts: their text, page after page; errors for those without any."""

import sys
from pathlib import Path
from typing import Any

import data
import finetune_classification
import pretrain
import pytest
import training_defaults
from example_runs import FAST, NEW_MODEL, ROWS


def make_pdf(path: Path, pages: list[list[str]]) -> Path:
    """Write a PDF, each page with some lines of text, or without any: then it has a filled rectangle alone."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for i, lines in enumerate(pages):
        drawn = "\n".join(f"({line}) Tj T*" for line in lines)
        content = f"BT /F1 12 Tf 72 720 Td 14 TL\n{drawn}\nET" if lines else "72 72 400 600 re f"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {5 + 2 * i} 0 R >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    text, places = "%PDF-1.4\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(text))
        text += f"{number} 0 obj\n{item}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(text)}\n%%EOF\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}", encoding="ascii")
    return path


@pytest.fixture
def pypdf() -> Any:
    return pytest.importorskip("pypdf", reason="pypdf is not installed")


def test_pages_are_joined_in_order(tmp_path, pypdf, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    pages = [["The first page", "has two lines"], ["The second"], ["The third"]]
    assert data.read_pdf(make_pdf(tmp_path / "a.pdf", pages)) == "\n".join(line for page in pages for line in page)
    assert said == []
    pages[1] = []
    text = data.read_pdf(make_pdf(tmp_path / "b.pdf", pages))
    assert text == "The first page\nhas two lines\nThe third"
    assert len(said) == 1 and "1 of 3 pages have no text, the first is page 2" in said[0]


def test_a_pdf_of_pictures_is_refused(tmp_path, pypdf):
    path = make_pdf(tmp_path / "scan.pdf", [[], []])
    with pytest.raises(ValueError, match=r"scan.pdf has no text on its 2 pages.*\(OCR\)"):
        data.read_pdf(path)
    # pre-training reads a document when its turn comes, and finds this before
    with pytest.raises(ValueError, match="scan.pdf has no text"):
        pretrain.load_documents(pretrain.CorpusArguments(train_files=[str(tmp_path)]))


@pytest.mark.parametrize("content", [b"", b"no PDF at all", b"%PDF-1.4\ncut off"])
def test_a_broken_pdf_is_refused(tmp_path, pypdf, content):
    (tmp_path / "broken.pdf").write_bytes(content)
    with pytest.raises(ValueError, match="broken.pdf cannot be read as a PDF"):
        data.read_pdf(tmp_path / "broken.pdf")


def test_an_encrypted_pdf_is_refused(tmp_path, pypdf):
    writer = pypdf.PdfWriter(clone_from=make_pdf(tmp_path / "open.pdf", [["secret"]]))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(tmp_path / "closed.pdf")
    with pytest.raises(ValueError, match="closed.pdf cannot be read as a PDF"):
        data.read_pdf(tmp_path / "closed.pdf")


def test_without_pypdf_the_error_says_what_to_install(tmp_path, monkeypatch):
    make_pdf(tmp_path / "texts/a/1.pdf", [["text"]])
    monkeypatch.setitem(sys.modules, "pypdf", None)
    monkeypatch.setattr(sys, "argv", ["finetune_classification.py", *NEW_MODEL, *FAST])
    sys.argv += ["--train_file", str(tmp_path / "texts"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        training_defaults.run_script(finetune_classification.prepare)
    assert str(stop.value.code).endswith("1.pdf needs pypdf: pip install pypdf")


@pytest.mark.slow
def test_scripts_read_pdfs_beside_texts(tmp_path, pypdf):
    folder = tmp_path / "texts"
    for i, row in enumerate(ROWS):
        place = folder / "ab"[i % 2] / str(i)
        if i < 2:
            make_pdf(place.with_suffix(".pdf"), [["a page about"], [f"number {i}"]])
        else:
            place.with_suffix(".txt").write_text(row["document"])
    rows = data.load_rows(data.DataArguments(train_file=str(folder)))["train"]
    assert rows["file_name"] == ["a/0.pdf", "a/2.txt", "b/1.pdf", "b/3.txt"] and rows["label"] == ["a", "a", "b", "b"]
    assert rows["text"][0] == "a page about\nnumber 0" and rows["text"][1] == ROWS[2]["document"]
    options = [*NEW_MODEL, *FAST, "--train_file", str(folder), "--validation_file", str(folder), "--max_steps", "1"]
    options += ["--save_strategy", "no", "--output_dir", str(tmp_path / "out")]
    assert "eval_accuracy" in finetune_classification.main(options)
    documents, _ = pretrain.load_documents(pretrain.CorpusArguments(train_files=[str(folder)]))
    # twice: a run reads its documents as often as it needs them
    for _ in range(2):
        assert sorted(documents) == sorted(rows["text"])
