"""A column of turns in, the length and the script of each battle's text out."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SCRIPTS = (
    "Latin", "Han", "Japanese", "Hangul", "Cyrillic", "Arabic", "Devanagari", "Hebrew", "Thai", "Greek",
    "other", "none",
)  # fmt: skip
"""Scripts that are told apart, as Unicode names them; letters of others are `other`, and no letters are `none`."""


def count_characters(column: pa.ListArray) -> np.ndarray:
    """Return the characters of all turns of each battle, (n,) int64."""
    lengths = pc.utf8_length(column.flatten()).to_numpy()
    return np.bincount(pc.list_parent_indices(column), lengths, minlength=len(column)).astype(np.int64)


def detect_scripts(column: pa.ListArray) -> np.ndarray:
    """Return where in `SCRIPTS` the script of most letters of each battle stands, (n,); kana make Han Japanese."""
    texts = pc.binary_join(column, "\n")
    han, kana, none = (SCRIPTS.index(name) for name in ("Han", "Japanese", "none"))
    latin = pc.match_substring_regex(texts, "[A-Za-z]").to_numpy(zero_copy_only=False)
    script = np.where(latin, SCRIPTS.index("Latin"), none)
    mixed = pc.invert(pc.string_is_ascii(texts))
    named = [r"\p{Hiragana}\p{Katakana}" if name == "Japanese" else rf"\p{{{name}}}" for name in SCRIPTS[:-2]]
    classes = [*(f"[{one}]" for one in named), rf"[^{''.join(named)}\P{{L}}]"]
    counts = np.stack([pc.count_substring_regex(texts.filter(mixed), one).to_numpy() for one in classes], axis=1)
    counts[:, kana] += np.where(counts[:, kana] > 0, counts[:, han], 0)
    counts[counts[:, kana] > 0, han] = 0
    script[mixed.to_numpy(zero_copy_only=False)] = np.where(counts.any(axis=1), counts.argmax(axis=1), none)
    return script
