"""Battles in, what is in them and what is wrong with them out: facts for a file, and lines for a terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, SCRIPTS, TEXT_COLUMNS, count_characters, detect_scripts, outcomes
from rewardmodel.data.duplicates import find_duplicates, find_near_duplicates, winner_signs
from rewardmodel.data.folds import CALIBRATION_FOLD, HOLDOUT_FOLD, TRAIN_ONLY, TRAIN_WITH, UNUSED
from rewardmodel.metrics import wilson_interval
from rewardmodel.prompt.encoder import PromptEncoder, sum_sizes
from rewardmodel.prompt.truncation import MIN_ROUND_TOKENS, Sizes, measure_retention

SAMPLE = 20_000
"""Battles, drawn with the seed, whose tokens are counted; all of them where there are fewer."""

MAX_LENGTHS = (512, 1024, 1536, 2048, 3072, 4096, 8192)
"""Budgets at which truncation is measured, besides the encoder's own."""

PERCENTILES = (5, 25, 50, 75, 95, 99)

PARTS = {
    TRAIN_ONLY: "train only",
    CALIBRATION_FOLD: "calibration",
    HOLDOUT_FOLD: "holdout",
    UNUSED: "unused",
    -1: "not dealt",
}

IMBALANCE, DEVIATION, LARGE_GROUP, FEW = 0.01, 0.02, 0.1, 50
"""What is told as wrong, beyond chance: a share of A's wins farther from one half; an outcome's share in a part farther
from its share in all; a group with more of the battles. Groups and sources of fewer battles are not looked at."""

Facts = dict[str, Any]


def audit(battles: Dataset, encoder: PromptEncoder | None = None, seed: int = 0) -> Facts:
    """Return what is in the battles, as values that JSON can hold.

    Args:
        battles: with `group` and `fold` set; -1 where they are not.
        encoder: counts tokens and says what its truncation keeps; none: no `tokens`.
        seed: draws the battles whose tokens are counted.

    Returns:
        `battles`; `sources`: name -> battles and outcome shares; `outcomes`: mean outcome by name, None if unlabelled;
        `position` and `longer_response`: how often A, and the longer response, wins decided battles (likeliest
        outcome, None if there are none); `turns`; `empty_turns` and `characters` by column; `scripts`: share of
        battles by the script of most letters of the prompt; `groups`; `duplicates`; `near_duplicates`; `parts`:
        battles, outcome shares and their largest deviation from all battles' by fold and part; `tokens`.
    """
    survey, array = _survey(battles), outcomes(battles)
    verdict = winner_signs(array)
    longer = np.sign(survey.characters[:, 1] - survey.characters[:, 2]) * verdict
    return {
        "battles": len(battles),
        "sources": _sources(survey, array),
        "outcomes": _shares(_mean(array)),
        "position": _wins(verdict),
        "longer_response": _wins(longer),
        "turns": _turns(survey.turns),
        "empty_turns": dict(zip(TEXT_COLUMNS, survey.empty.tolist(), strict=True)),
        "scripts": survey.scripts,
        "characters": {name: _percentiles(survey.characters[:, column]) for column, name in enumerate(TEXT_COLUMNS)},
        "groups": _groups(np.asarray(battles.with_format(None)["group"][:])),
        "duplicates": find_duplicates(battles),
        "near_duplicates": find_near_duplicates(battles),
        "parts": _parts(np.asarray(battles.with_format(None)["fold"][:]), array),
        "tokens": None if encoder is None else _tokens(battles, encoder, seed),
    }


class _Survey(NamedTuple):
    """What one pass over the texts gives; `source` (its number), `turns` and `characters` (3 columns) by battle."""

    sources: list[str]
    source: np.ndarray
    turns: np.ndarray
    characters: np.ndarray
    empty: np.ndarray
    scripts: dict[str, float]


def _survey(battles: Dataset) -> _Survey:
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
    found = {name: here for name, here in ranked if here}
    numbered, rounds = np.concatenate(source), np.concatenate(turns)
    return _Survey(list(numbers), numbered, rounds, np.concatenate(characters), empty, found)


def _shares(mean: np.ndarray) -> dict[str, float] | None:
    """Return the (3,) mean outcomes by name, or None if they are not known."""
    return None if np.isnan(mean).any() else dict(zip(OUTCOMES, mean.tolist(), strict=True))


def _mean(array: np.ndarray) -> np.ndarray:
    """Return the mean outcomes, (3,), of the battles that have one; NaN if none has."""
    known = array[~np.isnan(array).any(axis=1)]
    return known.mean(axis=0) if len(known) else np.full(3, np.nan)


def _sources(survey: _Survey, array: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(survey.source)
    means = np.stack([np.bincount(survey.source, column) for column in array.T], axis=1) / counts[:, None]
    rows = zip(survey.sources, counts, means, strict=True)
    return {name: {"battles": int(count), "outcomes": _shares(mean)} for name, count, mean in rows}


def _wins(sign: np.ndarray) -> dict[str, Any] | None:
    """Return how often +1 stands among +1 and -1, with Wilson's 95 % interval, and whether it holds one half."""
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
    found = np.percentile(values, PERCENTILES)
    named = {str(percent): float(value) for percent, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(values.mean()), **named, "max": float(values.max())}


def _groups(groups: np.ndarray) -> dict[str, Any] | None:
    """Return how many groups there are, the share of battles that are not alone in theirs, and the largest one."""
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
        name = PARTS.get(part, f"fold {part}" if part >= 0 else f"train with fold {TRAIN_WITH - part}")
        parts[name] = {"battles": int((fold == part).sum()), "outcomes": shares, "deviation": deviation}
    return parts


def _tokens(battles: Dataset, encoder: PromptEncoder, seed: int) -> dict[str, Any]:
    """Return percentiles of tokens, and what truncation keeps at each budget, beside a plain cut on the right.

    Where each response is encoded alone, there are two sequences a battle, and the prompt keeps what it keeps in the
    shorter of both. A plain cut takes the same layout, whole, and leaves its first `max_length` tokens.
    """
    count = min(SAMPLE, len(battles))
    rows = np.sort(np.random.default_rng(seed).choice(len(battles), count, replace=False))
    least = encoder.fixed_tokens(1).length + len(encoder.mark) + MIN_ROUND_TOKENS
    budgets = [length for length in sorted({*MAX_LENGTHS, encoder.max_length}) if length >= least]
    sides = [TEXT_COLUMNS] if len(encoder.responses) > 1 else [(TEXT_COLUMNS[0], name) for name in TEXT_COLUMNS[1:]]
    full, sequences, kept = [], [], []
    for batch in battles.select(rows).with_format(None).select_columns(list(TEXT_COLUMNS)).iter(batch_size=500):
        for each in zip(*(encoder.tokenize_rounds(*(batch[name] for name in side)) for side in sides), strict=True):
            sizes = [[tuple(map(len, texts)) for texts in rounds] for rounds in each]
            totals = [sum_sizes(rounds) for rounds in sizes]
            full.append((totals[0][0], *(size for one in totals for size in one[1:])))
            sequences += [sum(map(sum, rounds)) + encoder.fixed_tokens(len(rounds)).length for rounds in sizes]
            stay = [_kept(encoder, rounds, budgets) for rounds in sizes]
            kept.append(np.dstack([np.min([one[..., 0] for one in stay], axis=0), *(one[..., 1:] for one in stay)]))
    sizes_of, stays, ways = np.array(full), np.array(kept), ("kept", "right_cut")
    responses = {"both_responses": sizes_of[:, 1:].sum(axis=1), "longer_response": sizes_of[:, 1:].max(axis=1)}
    lengths = {"prompt": sizes_of[:, 0], **responses, "sequence": np.array(sequences)}
    return {
        "battles": count,
        "max_length": encoder.max_length,
        "truncation": encoder.truncation,
        "lengths": {name: _percentiles(values) for name, values in lengths.items()},
        "retention": [
            {
                "max_length": length,
                **{name: measure_retention(sizes_of, stays[:, way, number]) for way, name in enumerate(ways)},
            }
            for number, length in enumerate(budgets)
        ],
    }


def _kept(encoder: PromptEncoder, rounds: Sequence[Sizes], budgets: list[int]) -> np.ndarray:
    """Return the tokens of each text that stay, (2, n_budgets, n_texts) int64: by our truncation, by a right cut."""
    ours = [encoder.count_kept(rounds, encoder.fit_rounds(rounds, length)) for length in budgets]
    fixed, right, place = encoder.fixed_tokens(len(rounds)), np.zeros((len(budgets), len(rounds[0])), np.int64), 0
    for before, (number, text) in zip(fixed.before, fixed.turns, strict=True):
        place += len(before)
        right[:, text] += np.clip(np.array(budgets) - place, 0, rounds[number][text])
        place += rounds[number][text]
    return np.stack([ours, right])


MOST_ROWS, MOST_NAMES = 12, 4
"""Sources, and parts, that are shown one by one; scripts, and sources in a sentence, that are named."""


def format_audit(facts: Facts) -> str:
    """Return what `audit` found as lines for a terminal, with a sentence for each thing that is wrong."""
    tokens, wrong = facts["tokens"], [*_wrong_outcomes(facts), *_wrong_texts(facts)]
    lines = [*_outcome_lines(facts), "", *_text_lines(facts), *(["", *_token_lines(tokens)] if tokens else []), ""]
    wrap = textwrap.TextWrapper(118, "  - ", "    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "what is wrong" if wrong else "nothing looks wrong", *map(wrap.fill, wrong)])


def _outcome_lines(facts: Facts) -> list[str]:
    lines = [f"{'':32}{'battles':>9}{'A wins':>9}{'B wins':>9}{'tie':>9}", _outcome_row("all battles", facts)]
    sources = sorted(facts["sources"].items(), key=lambda item: -item[1]["battles"])
    for title, rows in (("sources", sources), ("folds and parts", list(facts["parts"].items()))):
        lines += [title, *(_outcome_row(f"  {name}", row) for name, row in rows[:MOST_ROWS])]
        lines += [f"  and {len(rows) - MOST_ROWS} more"] * (len(rows) > MOST_ROWS)
    for name, key in (("A wins", "position"), ("the longer response wins", "longer_response")):
        if wins := facts[key]:
            interval = f"95 % [{100 * wins['low']:.1f}, {100 * wins['high']:.1f}]"
            verdict = f"of those decided, {interval}: 50 is {'inside' if wins['balanced'] else 'outside'}"
            lines.append(f"{name:<32}{wins['decided']:>9,}{_percent(wins['share'])} {verdict}")
    return lines


def _outcome_row(name: str, row: Facts) -> str:
    shares = row["outcomes"]
    shown = "  not labelled" if shares is None else "".join(_percent(shares[outcome]) for outcome in OUTCOMES)
    return f"{name if len(name) <= 31 else name[:30] + '…':<32}{row['battles']:>9,}{shown}"


def _percent(share: float) -> str:
    return f"{100 * share:>7.1f} %"


def _text_lines(facts: Facts) -> list[str]:
    turns, groups, same, near = (facts[name] for name in ("turns", "groups", "duplicates", "near_duplicates"))
    twice, rounds = same["identical_responses"]["battles"], ("1", "2", "3+")
    grouped = groups and f"{groups['number']:,}; the largest has {_count(groups['largest'])}"
    shared = groups and f"; {100 * groups['shared']:.1f} % of battles are not alone in theirs"
    lines = {
        "turns": ", ".join(f"{name}: {100 * turns[name]:.1f} %" for name in rounds) + f"; at most {turns['most']}",
        "empty turns": ", ".join(f"{name}: {count:,}" for name, count in facts["empty_turns"].items()),
        "script of prompt": _first([f"{name}: {100 * share:.1f} %" for name, share in facts["scripts"].items()]),
        "prompt groups": f"{grouped}{shared}" if groups else "not assigned",
        "exact repeats": f"{_count(same['battles'])}; both responses are the same in {_count(twice)}",
        "similar prompts": f"at least {near['pairs']:,} pairs among {near['prompts']:,} prompts, of different groups",
    }
    shown = [f"{name:<18}{line}" for name, line in lines.items()]
    return [*shown, "", *_percentile_lines("characters", facts["characters"])]


def _first(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _count(battles: int) -> str:
    return f"{battles:,} battle{'' if battles == 1 else 's'}"


def _percentile_lines(title: str, rows: dict[str, dict[str, float]]) -> list[str]:
    heads = ("mean", *(f"{percent} %" for percent in PERCENTILES), "max")
    lines = [f"{title:<26}" + "".join(f"{head:>9}" for head in heads)]
    for name, row in rows.items():
        lines.append(f"  {name.replace('_', ' '):<24}" + "".join(f"{value:>9,.0f}" for value in row.values()))
    return lines


def _token_lines(tokens: Facts) -> list[str]:
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


def _wrong_outcomes(facts: Facts) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with outcomes and how they are dealt."""
    position = facts["position"]
    if facts["outcomes"] is None:
        yield "The battles are not labelled: they can be predicted, but not trained on."
        return
    if position and not position["balanced"] and abs(position["share"] - 0.5) > IMBALANCE:
        wins = f"A wins {100 * position['share']:.1f} % of decided battles"
        yield f"{wins}: position is not balanced; data.swap_augmentation mends it in training."
    rows = facts["sources"].items()
    large = {name: row["outcomes"] for name, row in rows if row["battles"] >= FEW and row["outcomes"]}
    without = [name for name, shares in large.items() if not shares["winner_tie"]]
    if without and facts["outcomes"]["winner_tie"] > 0:
        yield f"There are ties, but none in {_first(without)}: a model learns which texts come from where ties are."
    for name, part in facts["parts"].items():
        if (
            not name.startswith("train")
            and name != PARTS[UNUSED]
            and part["deviation"] is not None
            and part["deviation"] > max(DEVIATION, 1.5 / part["battles"] ** 0.5)
        ):
            yield f"An outcome's share in {name} is {100 * part['deviation']:.1f} points off its share in all battles."


def _wrong_texts(facts: Facts) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with texts and groups."""
    same, near, groups = (facts[name] for name in ("duplicates", "near_duplicates", "groups"))
    conflicts, decided = same["label_conflicts"], same["identical_responses"]["decided"]
    if same["battles"]:
        yield f"Exact repeats, with A and B exchanged or not: {_count(same['battles'])}. What is repeated counts more."
    if conflicts["sets"]:
        several = f"{_count(conflicts['sets'])}, in {conflicts['battles']:,} rows{_examples(conflicts['examples'])}"
        yield f"Judged several times, with different winners: {several}. No model is right on all of them."
    if decided:
        yield f"A winner, though both responses are the same: {_count(decided)}."
    if near["pairs"]:
        pairs = f"{near['pairs']:,} ({_count(near['battles'])}){_examples([one['ids'] for one in near['examples']])}"
        yield f"Pairs of prompts of different groups that are nearly the same: at least {pairs}. A split may part them."
    if groups and groups["largest"] > max(LARGE_GROUP * facts["battles"], FEW):
        yield f"One prompt group has {100 * groups['largest'] / facts['battles']:.0f} % of the battles: folds differ."


def _examples(ids: list[list[str]]) -> str:
    return ", e.g. " + "; ".join(" and ".join(one[:2]) for one in ids[:2])
