"""Two thousand broken files: each is battles or one line that says what is wrong with it, never a traceback."""

import contextlib
import csv
import io
import json
import zipfile
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rewardmodel.battles import BATTLE_FEATURES
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError

FILES = 500
"""Files of each kind."""

HUGE = 100
"""Every so many files have a field of a megabyte."""

TURNS = [
    [["What is 2 + 2?"], ["4"], ["It is 5."]],
    [["Hi", "And in German?"], ["Hello", "Hallo"], ["Hey", None]],
    [["猫はどこ? 😀"], ["ここ"], ["知らない\u2028二行目"]],
    [['He said "no",\nthen left.'], ["a, b; c\ttab"], ["\\ and \\n and ''"]],
    [["écris-moi", "", "encore"], ["à", "é", "ü"], [None, None, "ß"]],
    [[" "], [""], [None]],
    [["Long? " * 30], ["Yes. " * 40], ["No. " * 50]],
    [["[1, 2]"], ['{"a": 1}'], ["null"]],
]
"""Prompt, response A and response B of the battles that the files are made of."""


def messages(turns, answers):
    pairs = zip(turns, answers, strict=True)
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def competition():
    return [
        {
            **{"id": number, "model_a": "gpt", "model_b": "llama"},
            **dict(zip(("prompt", "response_a", "response_b"), texts, strict=True)),
            **{"winner_model_a": number % 2, "winner_model_b": 1 - number % 2, "winner_tie": 0, "weight": 1.5},
        }
        for number, texts in enumerate(TURNS)
    ]


def conversations():
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"] * 2
    return [
        {
            **{"question_id": f"q{number}", "winner": winners[number], "model_a": "gpt", "model_b": "llama"},
            **{"conversation_a": messages(prompt, one), "conversation_b": messages(prompt, other)},
        }
        for number, (prompt, one, other) in enumerate(TURNS)
    ]


def preference():
    return [
        {"prompt": prompt[0], "chosen": messages(prompt, one), "rejected": messages(prompt, other), "chosen_model": "x"}
        for prompt, one, other in TURNS
    ]


def soft():
    return [
        {"id": str(number), "prompt": p[0], "response_a": a[0] or "", "response_b": b[0] or "", "p_b": number / 8}
        for number, (p, a, b) in enumerate(TURNS[:-1])
    ]


SHAPES = [competition, competition, conversations, preference, soft]

STRANGE = [
    *(None, "", " ", "null", "[]", "[", "[{", "{}", '["cut', "nan", "[NaN]", "-1", "1e999", "\x00", "\r", "a\nb"),
    *(0, 1, -1, 7.5, float("nan"), float("inf"), 10**30, True, False, r'["\ud800"]', "\n\nHuman: x", "\ufeff"),
    *([], [[]], [["nested", ["lists"]]], {}, {"role": "user"}, [{"role": "user", "content": ["x"]}], [None], [1, "a"]),
    *([{"role": "judge", "content": "x"}], [{"role": 3}], ["x", {"content": "y"}], {"a": {"b": [1]}}, "model_c"),
]
"""Values that a cell is given in place of its own."""


def pick(random, values):
    return values[random.integers(len(values))]


def strange_rows(random, rows, huge):
    """Return the rows with some cells, keys or rows changed."""
    rows = [dict(row) for row in rows]
    for _ in range(pick(random, [0, 0, 1, 2])):
        row, kind = pick(random, rows), random.integers(6)
        name = pick(random, list(row)) if row else "id"
        if kind <= 2:
            row[name] = pick(random, STRANGE)
        elif kind == 3:
            row.pop(name, None)
        elif kind == 4:
            rows.insert(random.integers(len(rows)), dict(row))
        else:
            for one in rows:
                one[f"{name}_"] = one.pop(name, None)
    if huge:
        pick(random, rows)[pick(random, list(rows[0]))] = pick(random, ["x" * 2**20, ["y" * 2**20], '["' + "z" * 2**20])
    return rows


def flat(value):
    """Return a cell as CSV has it."""
    return json.dumps(value) if isinstance(value, list | dict) else value


STYLES = [{}, {}, {}, {"quoting": csv.QUOTE_ALL}, {"quotechar": "'"}, {"doublequote": False, "escapechar": "\\"}]


def csv_bytes(random, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([flat(row.get(name)) for name in names] for row in rows)]
    kind = random.integers(15)
    if kind == 0:  # ragged, and a field too many in place of one too few
        lines[random.integers(len(lines))].append("more")
        lines[random.integers(len(lines))].pop()
    elif kind == 1:
        lines[0][random.integers(len(names))] = pick(random, names)
    elif kind == 2:
        lines[0][random.integers(len(names))] += pick(random, [" ", "\n", '"', "\x00", "é"])
    elif kind == 3:
        lines = [[*line, *line] for line in lines]
    elif kind == 4:
        random.shuffle(lines)
    file = io.StringIO()
    style = {
        **{"delimiter": pick(random, [*[","] * 10, ";", "\t"]), "lineterminator": pick(random, ["\n", "\r\n", "\r"])},
        **pick(random, STYLES),
    }
    csv.writer(file, **style).writerows(lines)
    text = file.getvalue()
    if random.integers(8) == 0:
        text = text.replace(*pick(random, [('""', '"'), ('"', ""), ('"', "'"), (",", ", "), ("\n", "\n\n")]))
    return encoded(random, text)


def json_lines_bytes(random, rows):
    lines = [json.dumps(row, ensure_ascii=bool(random.integers(2))) for row in rows]
    kind = random.integers(14)
    place = random.integers(len(lines))
    if kind == 0:
        lines[place] = json.dumps(list(rows[place].values()))
    elif kind == 1:
        lines[place] = lines[place][:-1] + ", " + lines[place][1:]  # every key twice
    elif kind == 2:
        lines.insert(place, pick(random, ["", " ", "\x0c", "\t\r", "\u2028", "null", "[]", "3", '"text"', "{}", "#"]))
    elif kind == 3:
        lines[place] = lines[place].replace('"', "'")
    elif kind == 4:
        lines[place] = '{"prompt": ' + "[" * (depth := int(random.integers(1, 3000))) + "]" * depth + "}"
    elif kind == 5:
        lines = ["[" + ",".join(lines) + "]"]
    return encoded(random, pick(random, ["\n", "\n", "\r\n"]).join(lines) + pick(random, ["", "\n", "\n\n"]))


def encoded(random, text):
    name = pick(random, [*["utf-8"] * 12, "utf-8-sig", "latin-1", "utf-16", "utf-16-le", "cp1252", "utf-8-sig"])
    return text.encode(name, "surrogatepass" if name.startswith("utf") else "replace")


def strange_arrays(count):
    """Return arrays of types that a column of battles should not have, or may have by chance."""
    texts = [f"t{number}" for number in range(count)]
    lists = [[text] for text in texts]
    moments = [datetime(2024, 1, 1) + timedelta(hours=number) for number in range(count)]
    offsets = pa.array(np.arange(count + 1, dtype=np.int32))
    return [
        pa.array(range(count)),
        pa.array([number / 7 for number in range(count)], pa.float32()),
        pa.array([float("nan")] * count),
        pa.array([number % 2 == 0 for number in range(count)]),
        *(
            pa.array(moments, pa.timestamp(unit, zone))
            for unit, zone in [("ns", None), ("us", "UTC"), ("ms", "No/Where")]
        ),
        pa.array([2**62] * count).cast(pa.timestamp("us")),
        pa.array(moments).cast(pa.date32()),
        pa.array([2**31 - 1] * count, pa.int32()).cast(pa.date32()),
        pa.array([timedelta(seconds=number) for number in range(count)]),
        pa.array([Decimal(number) for number in range(count)], pa.decimal128(20, 3)),
        pa.array([b"\xff\xfe" + text.encode() for text in texts]),
        pa.array([text.encode() for text in texts], pa.large_binary()),
        pa.array([[("key", text)] for text in texts], pa.map_(pa.string(), pa.string())),
        pa.array(texts).dictionary_encode(),
        pa.array(texts, pa.large_string()),
        pa.array(lists, pa.large_list(pa.large_string())),
        pa.array([["a", None]] * count, pa.list_(pa.string(), 2)),
        pa.array([[1, 2]] * count),
        pa.array([[[text]] for text in texts]),
        pa.array([{"role": "user", "content": text} for text in texts]),
        pa.array([[{"role": "user", "content": [{"text": text, "image": None}]}] for text in texts]),
        pa.ListArray.from_arrays(offsets, pa.array([None] * count, pa.string())),
        pa.nulls(count),
        pa.nulls(count, pa.list_(pa.string())),
        pa.array([None, *texts[1:]]),
    ]


def parquet_bytes(random, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = []
    for name in names:
        column = [row.get(name) for row in rows]
        try:
            arrays.append(pa.array(column))
        except (pa.ArrowException, OverflowError):  # mixed types: as text
            arrays.append(pa.array([None if value is None else json.dumps(value) for value in column]))
    for _ in range(pick(random, [0, 1, 1, 2])):
        arrays[random.integers(len(arrays))] = pick(random, strange_arrays(len(rows)))
    if random.integers(20) == 0:
        names[random.integers(len(names))] = pick(random, names)
    file = io.BytesIO()
    table = pa.Table.from_arrays(arrays, names)
    compression = pick(random, ["snappy", "zstd", "none", "gzip"])
    pq.write_table(table, file, compression=compression, row_group_size=pick(random, [3, 100]))
    return file.getvalue()


WRITERS = {".csv": csv_bytes, ".jsonl": json_lines_bytes, ".parquet": parquet_bytes}


def zip_bytes(random, rows):
    ending = pick(random, list(WRITERS))
    content = WRITERS[ending](random, rows)
    content = broken(random, content) if random.integers(3) == 0 else content
    others = pick(random, [[], [], ["readme.txt"], ["test.csv", "sample_submission.csv"], ["train.json"], ["b.csv"]])
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", pick(random, methods)) as archive:
        archive.writestr(pick(random, ["train", "deep/er/train"]) + ending, content)
        for name in others:
            archive.writestr(name, b"id,winner_tie\n")
    packed = bytearray(file.getvalue())
    if random.integers(20) == 0:  # says that its files are encrypted
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            packed[packed.index(mark) + place] |= 1
    return bytes(packed)


def broken(random, content):
    """Return the bytes cut, flipped, filled, shortened or mixed."""
    kind, size = random.integers(7), len(content)
    place = int(random.integers(size + 1))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[place:]
    if kind == 2:
        return content[:place] + bytes(random.integers(0, 256, random.integers(1, 5), np.uint8)) + content[place:]
    if kind == 3:
        return content[:place] + content[place + int(random.integers(1, 5)) :]
    if kind == 4:
        return content[:place] + b"\x00" * int(random.integers(1, 4)) + content[place:]
    changed = bytearray(content)
    for at in random.integers(0, size, random.integers(1, 4)) if size else ():
        changed[at] = random.integers(256) if kind == 5 else changed[at] ^ (1 << random.integers(8))
    return bytes(changed)


def made_file(folder, kind, number):
    """Write the file of this kind and number, and return its path."""
    random = np.random.default_rng([list(KINDS).index(kind), number])
    rows = strange_rows(random, pick(random, SHAPES)(), huge=number % HUGE == 0)
    content = KINDS[kind](random, rows)
    content = broken(random, content) if random.integers(2) else content
    path = folder / f"{kind}-{number}.{kind}"
    path.write_bytes(content)
    return path


KINDS = {"csv": csv_bytes, "jsonl": json_lines_bytes, "parquet": parquet_bytes, "zip": zip_bytes}


def count_csv(content):
    text = content.decode("utf-8-sig")
    separator = max(",;\t", key=text.partition("p_b")[0].count)
    lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if line]
    while not any(map(str.strip, lines[0])):
        del lines[0]
    return len(lines) - 1


def count_json_lines(content):
    text = content.decode("utf-8-sig")
    with contextlib.suppress(json.JSONDecodeError):  # one list, under a name for lines
        if isinstance(whole := json.loads(text, strict=False), list):
            return len(whole)
    return sum(bool(line.strip()) for line in text.split("\n"))


def count_parquet(content):
    return pq.ParquetFile(io.BytesIO(content)).metadata.num_rows


def count_zip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        inside = [name for name in names if Path(name).suffix.lower()[1:] in COUNTS]
        name = inside[0] if len(inside) == 1 else next(name for name in inside if Path(name).stem == "train")
        return COUNTS[Path(name).suffix.lower()[1:]](archive.read(name))


COUNTS = {"csv": count_csv, "jsonl": count_json_lines, "parquet": count_parquet, "zip": count_zip}
"""How many rows a file has, counted without rewardmodel."""


def fault_of(path, kind):
    """Return what is wrong with how the file was read (None: nothing), and whether it was read."""
    try:
        battles = read_battles(path)
    except InputError as error:
        message = str(error)
        one_line = message.startswith(str(path)) and not {"\n", "\r"} & set(message)
        return None if one_line else f"message {message[:300]!r}", False
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}", False
    count = COUNTS[kind](path.read_bytes())
    if battles.features != BATTLE_FEATURES or len(battles) != count:
        return f"{len(battles)} battles of {count} rows", True
    return None, True


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_battles_or_one_line_that_says_what_is_wrong(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "cache"))
    csv.field_size_limit(2**24)
    faults, read = [], 0
    for number in range(FILES):
        path = made_file(tmp_path, kind, number)
        fault, was_read = fault_of(path, kind)
        read += was_read
        if fault is not None:
            faults.append(f"kind {kind}, seed {number}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} of {FILES} files", *faults[:10]])
    assert FILES / 20 < read < FILES * 19 / 20  # the files are not all broken, and not all whole
