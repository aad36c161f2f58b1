"""Check the prose rules of CONTRIBUTING that a word list can check. Prints each finding and fails on any."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

OPENINGS = re.compile(r"(What|Whether|Those|Of|Where|Beside|Neither|How|Who)\b")
BRITISH = r"colour\w*|grey\w*|normalis\w*|optimis\w*|serialis\w*|synchronis\w*|initialis\w*|centre\w*|licence\w*"
HOME_MADE = (
    r"second-level cache|first-level cache|derivatives taken forwards|launches that overlap|turned round|by reckoning"
    r"|multiprocessor\w*|out of the way of"
)
WORDS = re.compile(rf"\b({BRITISH}|{HOME_MADE})\b", re.IGNORECASE)
NAMES = re.compile(r"multi_?processor|MultiProcessor|LICENCE|\bcentred\b")  # APIs and identifiers
KEPT = {".ci/prose.py"}


def docstrings(source: str) -> list[tuple[int, str]]:
    """Return line and text of every docstring."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, nodes) and (text := ast.get_docstring(node)):
            found.append((node.body[0].lineno, text))
    return found


def findings(path: Path) -> list[str]:
    """Return a line for each violation in a file."""
    source = path.read_text(encoding="utf-8")
    found = []
    if path.suffix == ".py":
        for line, text in docstrings(source):
            if OPENINGS.match(text):
                found.append(f"{path}:{line}: a docstring begins with an imperative or a noun phrase: {text[:60]!r}")
    for number, line in enumerate(source.splitlines(), 1):
        for match in WORDS.finditer(line):
            if not NAMES.search(line):
                found.append(f"{path}:{number}: {match[0]!r} is not the spelling or term that this project uses")
    return found


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
