"""Battles as Python objects, a dict or a list of dicts, -> a DataFrame, which is read like a file."""

from collections.abc import Mapping
from typing import Any

import pandas as pd


def rows_as_table(battles: Any) -> Any:
    """Return battles given as a dict, or as a list of dicts, as a table; anything else as it is.

    Args:
        battles: one battle, `{"prompt": "2 + 2?", "response_a": "4", "response_b": "5"}`, or a list of these; texts
            are turns, as a file has them: a text, or a list of texts.

    Raises:
        TypeError: a list of dicts and other things, or bytes.
    """
    if isinstance(battles, bytes):
        raise TypeError("battles are given as bytes; give a path, a DataFrame, a Dataset, or a list of dicts")
    if isinstance(battles, Mapping) and not hasattr(battles, "num_rows"):  # a DatasetDict is a mapping, too
        return pd.DataFrame([dict(battles)])
    if isinstance(battles, list | tuple) and any(isinstance(one, Mapping) for one in battles):
        other = next((type(one).__name__ for one in battles if not isinstance(one, Mapping)), None)
        if other is not None:
            raise TypeError(f"battles are a list of dicts and of {other}; give a list of dicts, one a battle")
        return pd.DataFrame([dict(one) for one in battles])
    return battles
