"""Hook of the documentation site: links to files of the repository lead to pages of the site that show them.

Where the repository is read, `[text](../path)` is an ordinary link. In the site, every linked file becomes the page
`source/<path>`, and a linked directory becomes a list of its files. So source links work without a network and always
show the version that the site was built from. A link to a missing file is left alone and fails the strict build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
# Repository files that are pages already.
_PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
_LEXERS = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".sbatch": "bash", ".md": "markdown"}
_HEAD = "---\nsearch:\n  exclude: true\n---\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every repository file or directory that a page links to."""
    texts = [f.content_string for f in files.documentation_pages()]
    wanted = {posixpath.normpath(match[1]) for text in texts for match in _LINK.finditer(text)}
    for path in sorted(wanted - set(_PAGES)):
        target = ROOT / path
        if path.startswith("docs/"):
            continue
        if target.is_dir():
            below = sorted(f for f in target.rglob("*") if f.is_file() and _is_source(f))
            listing = "".join(f"- [{f.relative_to(target).as_posix()}]({_relative(f, path)})\n" for f in below)
            files.append(_generated(config, f"source/{path}/index.md", f"# {path}\n\n{listing}"))
            wanted_files = below
        else:
            wanted_files = [target] if target.is_file() else []
        for file in wanted_files:
            name = file.relative_to(ROOT).as_posix()
            if files.get_file_from_path(f"source/{name}.md") is None:
                code = file.read_text(encoding="utf-8")
                lexer = _LEXERS.get(file.suffix, "text")
                files.append(_generated(config, f"source/{name}.md", f"# {name}\n\n~~~~~~{lexer}\n{code}\n~~~~~~\n"))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **unused: Any) -> str:
    """Point links to repository files at their pages."""
    depth = page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(match[1])
        if path in _PAGES:
            return f"]({'../' * depth}{_PAGES[path]}{match[2] or ''})"
        name = f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"
        return f"]({'../' * depth}{name})" if files.get_file_from_path(name) else match[0]

    return _LINK.sub(link, markdown) if not page.file.src_uri.startswith("source/") else markdown


def _generated(config: MkDocsConfig, uri: str, content: str) -> File:
    return File.generated(config, uri, content=_HEAD + content)


def _is_source(path: Path) -> bool:
    hidden = any(part.startswith((".", "__")) for part in path.relative_to(ROOT).parts)
    return not hidden and path.suffix in {*_LEXERS, ".json", ".txt"} and "egg-info" not in str(path)


def _relative(file: Path, directory: str) -> str:
    return posixpath.relpath(f"{file.relative_to(ROOT).as_posix()}.md", directory)
