"""Check the prose rules of CONTRIBUTING that a word list can check. Prints each finding and fails on any."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_WORDS = 25  # in a sentence
OPENINGS = re.compile(r"(What|Whether|Those|Of|Where|Beside|Neither|How|Who)\b")
BRITISH = (
    r"colour\w*|grey\w*|normalis\w*|optimis\w*|serialis\w*|synchronis\w*|initialis\w*|quantis\w*|centre\w*|licence\w*"
)
HOME_MADE = (
    r"second-level cache|first-level cache|derivatives taken forwards|launches that overlap|turned round|by reckoning"
    r"|pictures?|multiprocessors?"
)
WORDS = re.compile(rf"\b({BRITISH}|{HOME_MADE})\b", re.IGNORECASE)
KEPT = {".ci/prose.py", "recipes/synthetic_shapes/RUNS.md"}  # the list itself, and the log of past runs


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring."""
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a docstring or of Markdown, without code, tables and lists of arguments."""
    text = re.sub(r"^---.*?^---|```.*?```|^\|.*?$|^ {4,}\S.*?$", "", text, flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.) |\n#+ |\n(?=\s*\w+(?:, \w+)*: )", text):
        yield from re.split(r"(?<=[.:;?!)]) +", " ".join(paragraph.split()))


def findings(path: Path) -> Iterator[str]:
    """Yield a line for each violation in a file."""
    source = path.read_text(encoding="utf-8")
    texts = list(docstrings(source)) if path.suffix == ".py" else [(1, source)]
    for line, text in texts:
        if path.suffix == ".py" and OPENINGS.match(text):
            yield f"{path}:{line}: a docstring begins with an imperative or a noun phrase: {text[:60]!r}"
        for sentence in sentences(text):
            if len(sentence.split()) > MOST_WORDS:
                yield f"{path}:{line}: {len(sentence.split())} words in one sentence: {sentence[:70]!r}"
    for number, line_text in enumerate(source.splitlines(), 1):
        for match in WORDS.finditer(line_text):
            yield f"{path}:{number}: {match[0]!r} is not the spelling or term that this project uses"


def main() -> int:
    """Check every tracked Python and Markdown file."""
    command = ["git", "ls-files", "-z", "*.py", "*.md"]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [Path(file) for file in files if file and file not in KEPT and "results/" not in file]
    found = [finding for path in paths if path.exists() for finding in findings(path)]
    print(*found, sep="\n")
    print(f"prose: {len(paths)} files, {len(found)} findings")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
