"""The pages of the documentation, taken apart: blocks of code, commands, links, headings, what is in backticks."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md") if (ROOT / name).is_file()
] + sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))

FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^(?P<fence>```+)(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


@dataclass
class Block:
    page: str
    line: int
    language: str
    code: str
    reason: str | None  # why it is not run; None: it is

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    return [
        Block(page, text.count("\n", 0, match.start("code")), match["language"], match["code"], match["reason"])
        for match in FENCE.finditer(text)
    ]


def run(page: str, names: dict) -> list[Block]:
    """Runs the page's Python from top to bottom, as one program that begins with `names`; what was run."""
    ran = [block for block in blocks(page) if block.language == "python" and block.reason is None]
    for block in ran:
        # Empty lines before it, so that a traceback has the page's own line.
        exec(compile("\n" * block.line + block.code, str(ROOT / page), "exec"), names)
    return ran


def prose(page: str) -> str:
    return FENCE.sub("", text_of(page))


def spans(page: str) -> list[str]:
    return [" ".join(span.split()) for span in SPAN.findall(prose(page))]


def commands(page: str) -> list[list[str]]:
    """The command lines in blocks of bash, as lists of words."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.code.splitlines()]
    return [words for line in lines for words in split(line)]


def mentioned(page: str) -> list[list[str]]:
    """The commands in backticks, which may leave out what they need beside what they are mentioned for."""
    lines = [span for span in spans(page) if re.match(r"(make|python|pip|uv|bench/\w+\.sh) ", span)]
    return [words for line in lines for words in split(line)]


def split(line: str) -> list[list[str]]:
    """The commands of a line of the shell."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in reader:
        if word in ("&&", ";", "|"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def links(page: str) -> list[str]:
    return LINK.findall(SPAN.sub(lambda match: "code", prose(page)))


def anchors(page: str) -> set[str]:
    """The headings of a page, as GitHub and MkDocs name them in links."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
