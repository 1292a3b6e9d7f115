"""The words of an option in, numbers out, or an error that names the option."""

from rewardmodel.errors import InputError


def read_numbers(name: str, words: list[str] | None) -> list[float] | None:
    """Return the numbers given with option `name`; None: it was not given.

    Raises:
        InputError: a word is not a number.
    """
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise InputError(f"{name}: {' '.join(words or ())}: not all are numbers; give numbers") from error
