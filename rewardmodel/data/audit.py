"""Audit battles before training: statistics and likely problems, as JSON for a file and as text for a terminal."""

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, SCRIPTS, TEXT_COLUMNS, count_characters, detect_scripts, outcomes
from rewardmodel.data.duplicates import find_duplicates, find_near_duplicates, winner_signs
from rewardmodel.data.folds import CALIBRATION_FOLD, HOLDOUT_FOLD, TRAIN_ONLY, TRAIN_WITH, UNUSED
from rewardmodel.errors import plural
from rewardmodel.metrics import wilson_interval

_PERCENTILES = (5, 25, 50, 75, 95, 99)
"""Percentiles that summarise lengths."""

_PART_NAMES = {
    TRAIN_ONLY: "train only",
    CALIBRATION_FOLD: "calibration",
    HOLDOUT_FOLD: "holdout",
    UNUSED: "unused",
    -1: "no fold",
}
"""Names of the values of `fold` that are not folds."""

_FEW_BATTLES = 50
"""Groups and sources of fewer battles are never reported as a problem."""


def audit(
    battles: Dataset, tokens: dict[str, Any] | None = None, unread: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    """Return statistics of the battles as a dictionary that can be written as JSON.

    Args:
        battles: with `group` and `fold`, or -1 where they are not assigned.
        tokens: what `prompt.token_counts.count_tokens` returned for the same battles; default: no `tokens` section.
        unread: columns of the files that are not read, by source: {"train": ["language"]}.

    Returns:
        `battles`: how many; `sources`: name -> battles and outcome shares; `outcomes`: mean outcome by name, None for
        unlabelled battles; `position` and `longer_response`: how often A, and the longer response, wins among battles
        whose likeliest outcome is not a tie, None if there are none; `turns`; `empty_turns` and `characters` by
        column; `scripts`: share of battles by the script of most letters of the prompt; `groups`; `duplicates`;
        `near_duplicates`; `parts`: by fold and part the battles, their outcome shares and the largest deviation of
        these from the shares of all battles; `tokens`: those given, lengths summarised by percentiles;
        `unread_columns`: those given.
    """
    survey, array = _survey_texts(battles), outcomes(battles)
    signs = winner_signs(array)
    longer = np.sign(survey.characters[:, 1] - survey.characters[:, 2]) * signs
    return {
        "battles": len(battles),
        "sources": _sources(survey, array),
        "outcomes": _shares(_mean(array)),
        "position": _win_rate(signs),
        "longer_response": _win_rate(longer),
        "turns": _turns(survey.turns),
        "empty_turns": dict(zip(TEXT_COLUMNS, survey.empty.tolist(), strict=True)),
        "scripts": survey.scripts,
        "characters": {name: _percentiles(survey.characters[:, column]) for column, name in enumerate(TEXT_COLUMNS)},
        "groups": _groups(np.asarray(battles.with_format(None)["group"][:])),
        "duplicates": find_duplicates(battles),
        "near_duplicates": find_near_duplicates(battles),
        "parts": _parts(np.asarray(battles.with_format(None)["fold"][:]), array),
        "tokens": _summarise_tokens(tokens),
        "unread_columns": unread or {},
    }


class _Survey(NamedTuple):
    """Text statistics from one pass over the battles.

    Attributes:
        sources: the distinct names.
        source: (n_battles,) int64, the index of each battle's source in `sources`.
        turns: (n_battles,) int64, turns of each prompt.
        characters: (n_battles, 3) int64 of prompt, A and B.
        empty: (3,) int64, turns without text in each of these columns.
        scripts: share of battles by script of the prompt, the most frequent first.
    """

    sources: list[str]
    source: np.ndarray
    turns: np.ndarray
    characters: np.ndarray
    empty: np.ndarray
    scripts: dict[str, float]


def _survey_texts(battles: Dataset) -> _Survey:
    numbers: dict[str, int] = {}
    source, turns, characters, scripts = [], [], [], []
    empty = np.zeros(len(TEXT_COLUMNS), np.int64)
    for table in battles.with_format("arrow").select_columns([*TEXT_COLUMNS, "source"]).iter(batch_size=1000):
        source.append([numbers.setdefault(name, len(numbers)) for name in table.column("source").to_pylist()])
        texts = [table.column(name).combine_chunks() for name in TEXT_COLUMNS]
        turns.append(pc.list_value_length(texts[0]).to_numpy())
        characters.append(np.stack([count_characters(column) for column in texts], axis=1))
        empty += [pc.sum(pc.equal(pc.utf8_trim_whitespace(column.flatten()), "")).as_py() for column in texts]
        scripts.append(detect_scripts(texts[0]))
    share = np.bincount(np.concatenate(scripts), minlength=len(SCRIPTS)) / len(battles)
    ranked = sorted(zip(SCRIPTS, share.tolist(), strict=True), key=lambda item: -item[1])
    return _Survey(
        list(numbers),
        np.concatenate(source),
        np.concatenate(turns),
        np.concatenate(characters),
        empty,
        {name: here for name, here in ranked if here},
    )


def _shares(mean: np.ndarray) -> dict[str, float] | None:
    """Return the (3,) mean outcomes by name, or None if they are NaN."""
    return None if np.isnan(mean).any() else dict(zip(OUTCOMES, mean.tolist(), strict=True))


def _mean(array: np.ndarray) -> np.ndarray:
    """Return the mean outcome, (3,), of the labelled battles; NaN if there are none."""
    known = array[~np.isnan(array).any(axis=1)]
    return known.mean(axis=0) if len(known) else np.full(3, np.nan)


def _sources(survey: _Survey, array: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(survey.source)
    means = np.stack([np.bincount(survey.source, column) for column in array.T], axis=1) / counts[:, None]
    rows = zip(survey.sources, counts, means, strict=True)
    return {name: {"battles": int(count), "outcomes": _shares(mean)} for name, count, mean in rows}


def _win_rate(sign: np.ndarray) -> dict[str, Any] | None:
    """Return the share of +1 among +1 and -1 with Wilson's 95 % interval, and whether that contains one half."""
    won, decided = int((sign > 0).sum()), int((sign != 0).sum())
    if not decided:
        return None
    share = won / decided
    low, high = wilson_interval(share, decided)
    return {"decided": decided, "share": share, "low": low, "high": high, "balanced": low <= 0.5 <= high}


def _turns(turns: np.ndarray) -> dict[str, Any]:
    shares = {"1": turns == 1, "2": turns == 2, "3+": turns > 2}
    return {**{name: float(mask.mean()) for name, mask in shares.items()}, "most": int(turns.max())}


def _percentiles(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, _PERCENTILES)
    named = {str(percent): float(value) for percent, value in zip(_PERCENTILES, found, strict=True)}
    return {"mean": float(values.mean()), **named, "max": float(values.max())}


def _groups(groups: np.ndarray) -> dict[str, Any] | None:
    """Return the number of groups, the share of battles in groups of several, and the size of the largest group."""
    if (groups < 0).any():
        return None
    sizes = np.unique(groups, return_counts=True)[1]
    return {"number": len(sizes), "shared": float(sizes[sizes > 1].sum() / len(groups)), "largest": int(sizes.max())}


def _parts(fold: np.ndarray, array: np.ndarray) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for part in sorted(np.unique(fold).tolist(), key=lambda part: (part < 0, abs(part))):
        mean = _mean(array[fold == part])
        shares = _shares(mean)
        deviation = None if shares is None else float(np.abs(mean - _mean(array)).max())
        name = _PART_NAMES.get(part, f"fold {part}" if part >= 0 else f"train with fold {TRAIN_WITH - part}")
        parts[name] = {"battles": int((fold == part).sum()), "outcomes": shares, "deviation": deviation}
    return parts


def _summarise_tokens(tokens: dict[str, Any] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {**tokens, "lengths": {name: _percentiles(values) for name, values in tokens["lengths"].items()}}


_ROWS_SHOWN = 12
_NAMES_SHOWN = 4
"""Sources and parts that the text lists one by one; scripts and sources that one line or sentence names."""


def format_audit(facts: dict[str, Any]) -> str:
    """Return what `audit` found as text of at most 120 columns, with a sentence for each likely problem."""
    tokens, problems = facts["tokens"], [*_outcome_problems(facts), *_text_problems(facts)]
    lines = [*_outcome_lines(facts), "", *_text_lines(facts), *(["", *_token_lines(tokens)] if tokens else []), ""]
    wrap = textwrap.TextWrapper(118, "  - ", "    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "problems" if problems else "no problems found", *map(wrap.fill, problems)])


def _outcome_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{'':32}{'battles':>9}{'A wins':>9}{'B wins':>9}{'tie':>9}", _outcome_row("all battles", facts)]
    sources = sorted(facts["sources"].items(), key=lambda item: -item[1]["battles"])
    for title, rows in (("sources", sources), ("folds and parts", list(facts["parts"].items()))):
        lines += [title, *(_outcome_row(f"  {name}", row) for name, row in rows[:_ROWS_SHOWN])]
        lines += [f"  and {len(rows) - _ROWS_SHOWN} more"] * (len(rows) > _ROWS_SHOWN)
    for name, key in (("A wins", "position"), ("the longer response wins", "longer_response")):
        if wins := facts[key]:
            interval = f"95 % [{100 * wins['low']:.1f}, {100 * wins['high']:.1f}]"
            verdict = f"of decided battles, {interval}: 50 is {'inside' if wins['balanced'] else 'outside'}"
            lines.append(f"{name:<32}{wins['decided']:>9,}{_percent(wins['share'])} {verdict}")
    return lines


def _outcome_row(name: str, row: dict[str, Any]) -> str:
    shares = row["outcomes"]
    shown = "  not labelled" if shares is None else "".join(_percent(shares[outcome]) for outcome in OUTCOMES)
    return f"{name if len(name) <= 31 else name[:30] + '…':<32}{row['battles']:>9,}{shown}"


def _percent(share: float) -> str:
    return f"{100 * share:>7.1f} %"


def _text_lines(facts: dict[str, Any]) -> list[str]:
    turns, groups, same, near = (facts[name] for name in ("turns", "groups", "duplicates", "near_duplicates"))
    twice, rounds = same["identical_responses"]["battles"], ("1", "2", "3+")
    grouped = groups and f"{groups['number']:,}; the largest has {_count(groups['largest'])}"
    shared = groups and f"; {100 * groups['shared']:.1f} % of battles share one"
    lines = {
        "turns": ", ".join(f"{name}: {100 * turns[name]:.1f} %" for name in rounds) + f"; at most {turns['most']}",
        "empty turns": ", ".join(f"{name}: {count:,}" for name, count in facts["empty_turns"].items()),
        "script of prompt": _join_names([f"{name}: {100 * share:.1f} %" for name, share in facts["scripts"].items()]),
        "prompt groups": f"{grouped}{shared}" if groups else "not assigned",
        "exact duplicates": f"{_count(same['battles'])}; both responses are the same in {_count(twice)}",
        "similar prompts": f"at least {plural(near['pairs'], 'pair')} among {plural(near['prompts'], 'prompt')}, "
        "of different groups",
    }
    if unread := [f"{name}: {_join_names(columns)}" for name, columns in facts["unread_columns"].items()]:
        lines["columns not read"] = textwrap.shorten("; ".join(unread), 100, placeholder=" …")
    shown = [f"{name:<18}{line}" for name, line in lines.items()]
    return [*shown, "", *_percentile_lines("characters", facts["characters"])]


def _join_names(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _count(battles: int) -> str:
    return plural(battles, "battle")


def _percentile_lines(title: str, rows: dict[str, dict[str, float]]) -> list[str]:
    heads = ("mean", *(f"{percent} %" for percent in _PERCENTILES), "max")
    lines = [f"{title:<26}" + "".join(f"{head:>9}" for head in heads)]
    for name, row in rows.items():
        lines.append(f"  {name.replace('_', ' '):<24}" + "".join(f"{value:>9,.0f}" for value in row.values()))
    return lines


def _token_lines(tokens: dict[str, Any]) -> list[str]:
    lines = _percentile_lines(f"tokens of {_count(tokens['battles'])}", tokens["lengths"])
    title = (
        f"truncation '{tokens['truncation']}' | plain right cut; tokens of the response that keeps less (*: max_length)"
    )
    heads = ("battles cut", "prompts kept", "responses kept", "lesser response")
    lines += ["", title, f"{'max_length':>12}" + "".join(f"{head:>18}" for head in heads)]
    for row in tokens["retention"]:
        both = (row["kept"], row["right_cut"])
        names = ("battles_cut", "prompt_kept", "responses_kept")
        cells = [" | ".join(f"{100 * one[name]:5.1f}" for one in both) + " %" for name in names]
        cells.append(" | ".join(f"{one['less_kept_response']:5,.0f}" for one in both) + "  ")
        mark = "*" if row["max_length"] == tokens["max_length"] else " "
        lines.append((f"{mark}{row['max_length']:>11,}" + "".join(f"{cell:>18}" for cell in cells)).rstrip())
    return lines


def _outcome_problems(facts: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each problem with outcomes, sources and folds."""
    position = facts["position"]
    if facts["outcomes"] is None:
        yield "The battles are not labelled: they can be predicted, but not trained on."
        return
    if position and not position["balanced"] and abs(position["share"] - 0.5) > 0.01:
        wins = f"A wins {100 * position['share']:.1f} % of decided battles"
        yield f"{wins}: position is not balanced; data.swap_augmentation balances it in training."

    # Sources without ties, next to others with ties.
    rows = facts["sources"].items()
    large = {name: row["outcomes"] for name, row in rows if row["battles"] >= _FEW_BATTLES and row["outcomes"]}
    without = [name for name, shares in large.items() if not shares["winner_tie"]]
    if without and facts["outcomes"]["winner_tie"] > 0:
        yield f"There are ties, but none in {_join_names(without)}: a model can learn to recognise the source."

    # Parts whose outcomes differ from all battles' by more than 2 points, and by more than chance explains.
    for name, part in facts["parts"].items():
        if (
            not name.startswith("train")
            and name != _PART_NAMES[UNUSED]
            and part["deviation"] is not None
            and part["deviation"] > max(0.02, 1.5 / part["battles"] ** 0.5)
        ):
            yield f"An outcome's share in {name} is {100 * part['deviation']:.1f} points off its share in all battles."


def _text_problems(facts: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each problem with texts and groups."""
    same, near, groups = (facts[name] for name in ("duplicates", "near_duplicates", "groups"))
    conflicts, decided = same["label_conflicts"], same["identical_responses"]["decided"]
    if same["battles"]:
        yield f"Exact duplicates, with A and B exchanged or not: {_count(same['battles'])}. They count several times."
    if conflicts["sets"]:
        several = f"{_count(conflicts['sets'])}, in {conflicts['battles']:,} rows{_examples(conflicts['examples'])}"
        yield f"Judged several times, with different winners: {several}. No model can predict all of them."
    if decided:
        yield f"A winner although both responses are the same: {_count(decided)}."
    if near["pairs"]:
        pairs = f"{near['pairs']:,} ({_count(near['battles'])}){_examples([one['ids'] for one in near['examples']])}"
        yield f"Pairs of nearly equal prompts in different groups: at least {pairs}. A split may separate them."
    if groups and groups["largest"] > max(0.1 * facts["battles"], _FEW_BATTLES):
        share = 100 * groups["largest"] / facts["battles"]
        yield f"One prompt group has {share:.0f} % of the battles: folds will differ in size."


def _examples(ids: list[list[str]]) -> str:
    return ", e.g. " + "; ".join(" and ".join(one[:2]) for one in ids[:2])
