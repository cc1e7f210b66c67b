"""A hook of MkDocs: pages that stand elsewhere in the repository, and links that fit both the repository and the site.

README.md and its like are written for those who read them in the repository. Here they become pages of the site: a link
to a file that is a page leads to that page, and a picture is copied. What is no page, such as a source file, keeps its
name and loses its link.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]

PAGES = {  # in the repository: in the site. Files of docs/ are where they are.
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "bench/NOTES.md": "measurements/notes.md",
    "bench/NOTES-cuda.md": "measurements/notes-cuda.md",
    "bench/results/REPORT.md": "measurements/report.md",
}
SOURCES = {site: source for source, site in PAGES.items()}
PICTURES = (".png", ".svg")

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
CODE = re.compile(r"^(```|~~~).*?^\1|``.*?``|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def source_of(page: str) -> str:
    return SOURCES.get(page, f"docs/{page}")


def page_of(source: str) -> str:
    if source in PAGES:
        return PAGES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else source


def on_files(files, config):
    for source, page in PAGES.items():
        path = ROOT / source
        if path.is_file():
            text = path.read_text()
            files.append(File.generated(config, page, content=text))
            for _, _, target, _ in LINK.findall(CODE.sub("", text)):
                picture = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
                known = files.get_file_from_path(page_of(picture))
                if picture.endswith(PICTURES) and known is None and (ROOT / picture).is_file():
                    files.append(File.generated(config, page_of(picture), abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    source = source_of(here)

    def link(match):
        mark, text, target, anchor = match.groups(default="")
        if not target or ":" in target:
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if files.get_file_from_path(page_of(wanted)) is None and (ROOT / wanted).exists():
            return text
        relative = os.path.relpath(page_of(wanted), posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({relative}{anchor})"

    return outside_code(link, markdown)


def outside_code(link, markdown):
    """`markdown` with its links replaced, but for what looks like links in code. A link's text may be code."""
    parts, end = [], 0
    for code in re.finditer(r"^(```|~~~).*?^\1", markdown, re.MULTILINE | re.DOTALL):
        parts += [LINK.sub(link, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(link, markdown[end:])])
