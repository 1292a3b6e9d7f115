"""Words that a stranger cannot search the web for stay out of docstrings, messages, help, recipes and documents."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATTERNS = ("rewardmodel/**/*.py", "rewardmodel/**/*.jinja", "recipes/**/*.yaml", "recipes/*.md")
PATTERNS += ("scripts/*.py", "scripts/*.sh", "scripts/*.md", "README.md", ".github/*.md")
FILES = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})

WORDS = {
    r"\bmend(s|ed|ing)?\b": "fix, hint",
    r"\b(is|are) no numbers?\b": "is NaN or infinite",
    r"\banew\b": "again",
    r"\bnone:": "default:",
    r"\bknown again\b": "identified by",
    r"\bbegun\b": "started",
    r"\bof (its|their|his) own\b": "separate",
    r"fmt: skip": "one entry a line",
}
"""What is not to be written, and what is written instead."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_those_of_the_field(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for word, instead in WORDS.items():
            assert not re.search(word, line), f"{path}:{number}: {line.strip()} (write: {instead})"
