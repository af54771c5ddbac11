"""What the documentation site takes from outside ``docs/`` (a hook of mkdocs).

Pages link to result files, examples and the README by paths that also work where the repository is
browsed. On the site these files lie beside the pages, and the links are bent to them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that are files at the root of the repository.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
BESIDE = ("benchmarks/results", "benchmarks/configs", "examples")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(
            File.generated(config, page, content=_page((ROOT / source).read_text("utf-8")))
        )
    for folder in BESIDE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".json", ".yaml", ".py"):
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of ``docs/`` lead to the same files beside the pages."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return re.sub(r"\]\(\.\./(benchmarks|examples)/", r"](\1/", markdown)


def _page(markdown: str) -> str:
    """A page of the repository's root, with links as from ``docs/``."""
    markdown = re.sub(r"\]\(docs/", "](", markdown)
    for source, page in PAGES.items():
        markdown = markdown.replace(f"]({source}", f"]({page}")
    return markdown
