"""Hooks of the documentation site: pages and pictures of the repository that the documentation links to come along."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
# what stands outside of docs/ and is part of the site, under the same path
OUTSIDE = ("benchmarks/README.md", "benchmarks/results/*.md", "benchmarks/results/*.svg", "tokenization/README.md")
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of `OUTSIDE`."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links across docs/ and the rest of the repository to where the site has their targets; what the site has
    not, such as a script, keeps its words without the link."""
    source = page.file.src_uri
    # where the page stands in the repository
    home = source if source.startswith(("benchmarks/", "tokenization/")) else f"docs/{source}"

    def replaced(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
        inside = wanted.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            if not (ROOT / wanted).exists():
                raise FileNotFoundError(f"{home} links to {target}, which does not exist")
            return words.lstrip("!")[1:-1]
        link = posixpath.relpath(inside, posixpath.dirname(source) or ".")
        return f"{words}({link}{'#' + anchor if anchor else ''})"

    # nothing within fenced blocks is a link
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)
