"""Battles as Python objects, a dict or a list of dicts, -> a DataFrame, which is read like a file."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from rewardmodel.battles import OUTCOMES
from rewardmodel.data.text_lists import is_sequence
from rewardmodel.errors import InputError

SINGLE = ("id", "question_id", "model_a", "model_b", "winner", *OUTCOMES, "weight")
"""Columns that hold one value a battle, never a list."""


def rows_as_table(battles: Any) -> Any:
    """Return battles given as a dict, or as a list of dicts, as a table; anything else as it is.

    Args:
        battles: one battle, `{"prompt": "2 + 2?", "response_a": "4", "response_b": "5"}`, or a list of these; texts
            are turns, as a file has them: a text, or a list of texts. A dict is one of columns, as
            `datasets.Dataset[:8]` returns it, if a column of `SINGLE` is a list, or if a value is a Series or a list
            of lists.

    Raises:
        InputError: a dict of lists of texts, which may be several battles, or one of several turns; or columns that are
            not equally long.
        TypeError: a list of dicts and other things, or bytes.
    """
    if isinstance(battles, bytes):
        raise TypeError("battles are given as bytes; give a path, a DataFrame, a Dataset, or a list of dicts")
    if isinstance(battles, Mapping) and not hasattr(battles, "num_rows"):  # a DatasetDict is a mapping, too
        return _columns_as_table(dict(battles)) if _holds_columns(battles) else pd.DataFrame([dict(battles)])
    if isinstance(battles, list | tuple) and any(isinstance(one, Mapping) for one in battles):
        other = next((type(one).__name__ for one in battles if not isinstance(one, Mapping)), None)
        if other is not None:
            raise TypeError(f"battles are a list of dicts and of {other}; give a list of dicts, one a battle")
        return pd.DataFrame([dict(one) for one in battles])
    return battles


def _holds_columns(battles: Mapping[str, Any]) -> bool:
    """Return whether a dict holds the columns of several battles, not one battle; raise if it may be either."""
    lists = {name: value for name, value in battles.items() if is_sequence(value) or isinstance(value, pd.Series)}
    nested = (is_sequence(value[0]) for value in lists.values() if is_sequence(value) and len(value))
    if lists.keys() & {*SINGLE} or any(isinstance(value, pd.Series) for value in lists.values()) or any(nested):
        return True
    sizes = {len(value) for value in lists.values()}
    texts = all(isinstance(one, str) for value in lists.values() for one in value)
    if lists and len(lists) == len(battles) and len(sizes) == 1 and max(sizes) > 1 and texts:
        raise InputError(
            f"battles: a dict whose values are lists of {max(sizes)} texts: {max(sizes)} battles, or one of as many "
            "turns; give pandas.DataFrame(battles) if they are columns, or [battles] if it is one battle"
        )
    return False


def _columns_as_table(columns: dict[str, Any]) -> pd.DataFrame:
    try:
        return pd.DataFrame(columns)
    except ValueError as error:
        raise InputError(f"battles: a dict of columns that make no table ({error}); give each as many rows") from error
