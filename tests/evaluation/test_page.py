import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rewardmodel.battles import OUTCOMES
from rewardmodel.evaluation import charts
from rewardmodel.evaluation.bootstrap import paired_difference, summarise
from rewardmodel.evaluation.calibration import CALIBRATION_METHODS, reliability_bins
from rewardmodel.evaluation.evaluate import evaluate
from rewardmodel.evaluation.findings import list_findings
from rewardmodel.evaluation.page import (
    PUBLISHED_LOG_LOSSES,
    ComparedRun,
    format_number,
    is_arena,
    render_comparison,
    render_run,
)
from rewardmodel.evaluation.results import BaselineResult, CalibrationResult, Difference, Evaluation, Interval
from rewardmodel.evaluation.run_facts import describe_run
from rewardmodel.evaluation.verdict import judge_baselines
from rewardmodel.metrics import log_loss_terms
from rewardmodel.predictions import PROBABILITIES, average_probabilities, predicted, true_outcomes

VOID = {"meta", "br", "hr", "img", "input", "link"}
SECTIONS = ["summary", "metrics", "calibration", "position", "length", "models", "slices", "learning", "battles", "run"]
NAMES = ("gpt-4-1106-preview", "claude-2.1", "llama-2-70b-chat", "mixtral-8x7b-instruct-v0.1", "vicuna-13b")
STRENGTH = (1.0, 0.4, 0.0, 0.3, -0.4)
NASTY = (
    "<script>alert(1)</script>",
    "</svg></style></pre></details><b>",
    "\"'><img src=x onerror=alert(1)>",
    "👩‍👩‍👧 emoji {{ 7 * 7 }}",
    "مرحبا بالعالم \u202e reversed",
    "w" * 50_000,
    "before\0after\ud800\x1b[31m",
)


def table_of(count, seed=0, strength=1.0, bias=0.15):
    """Battles whose outcomes depend on models and lengths, and predictions that know `strength` of it."""
    random = np.random.default_rng(seed)
    models = np.stack([random.permutation(len(NAMES))[:2] for _ in range(count)])
    chars = random.lognormal(6.5, 0.8, (count, 2)).astype(int)
    reward = 2 * np.array(STRENGTH)[models] + np.log(chars)
    lead = reward[:, 0] - reward[:, 1]
    true = probabilities_of(lead + random.normal(0, 0.3, count))
    winners = (true.cumsum(axis=1) > random.random((count, 1))).argmax(axis=1)
    noise = random.normal(0, 0.5, (2, count))
    ab, ba = (probabilities_of(strength * (lead + noise[order]) + sign * bias) for order, sign in ((0, 1), (1, -1)))
    columns = {"id": [f"{100_000 + row}" for row in range(count)], "group": np.arange(count) // 2}
    columns |= {"source": "arena", "model_a": np.array(NAMES)[models[:, 0]], "model_b": np.array(NAMES)[models[:, 1]]}
    columns |= dict(zip(OUTCOMES, np.eye(3)[winners].T, strict=True))
    columns |= dict(zip(PROBABILITIES, average_probabilities([ab, ba]).T, strict=True))
    for order, given in (("ab", ab), ("ba", ba)):
        columns |= {f"{order}_{name}": p for name, p in zip(PROBABILITIES, given.T, strict=True)}
    columns |= {"turns": random.choice([1, 1, 1, 2, 4], count), "script": random.choice(["Latin", "Han"], count)}
    columns |= {"prompt_chars": random.integers(10, 900, count)}
    columns |= {"response_a_chars": chars[:, 0], "response_b_chars": chars[:, 1]}
    texts = {
        "prompt": "Explain why the sky is blue.\n\nBriefly.",
        "response_a": "Light scatters. ",
        "response_b": "Because. ",
    }
    return pd.DataFrame(columns | {name: (text * 40)[:1500] for name, text in texts.items()})


def probabilities_of(lead):
    logits = np.stack([lead / 2, -lead / 2, np.full_like(lead, 0.2)], axis=1)
    raised = np.exp(logits)
    return raised / raised.sum(axis=1, keepdims=True)


CHANGE = Difference(-0.0123, -0.02, -0.004, p=0.002)


def facts_of(table):
    """What `evaluate` finds, with baselines and a calibration as a run has them."""
    facts = evaluate(table)
    true, model, groups = true_outcomes(table), predicted(table), table["group"].to_numpy()
    prior = np.tile(true.mean(axis=0), (len(true), 1))
    baselines = {"prior": prior, "length": 0.95 * prior + 0.05 * model, "tfidf": 0.9 * prior + 0.1 * model}
    return replace(
        facts,
        baselines={
            name: BaselineResult(summarise(p, true, groups)["log_loss"], paired_difference(model, p, true, groups))
            for name, p in baselines.items()
        },
        calibration=CalibrationResult(
            method="vector",
            parameters=[-0.2, 0.1, 0.345],
            applied=True,
            fitted_on="cross-fitted on validation",
            tried={"temperature": replace(CHANGE, value=-0.0067), "vector": CHANGE},
            verdict="applied: vector changes the log loss by -0.0123",
            blended=replace(CHANGE, value=-0.0189),
            before={"log_loss": 1.2345, "expected_calibration_error": 0.0987},
            gain=CHANGE,
        ),
        reliability=replace(facts.reliability, after=reliability_bins(model, true)),
    )


def write_run(folder, steps=60):
    random = np.random.default_rng(0)
    log = [
        {"step": s, "loss": 0.8 + 0.3 * 0.1 ** (s / steps) + random.normal(0, 0.03), "epoch": s / steps}
        for s in range(2, steps, 2)
    ]
    log += [
        {"step": s, "eval_log_loss": 0.92 + 0.16 * (1 - s / steps) ** 2, "eval_loss": 9.0}
        for s in range(steps // 5, steps + 1, steps // 5)
    ]
    (folder / f"checkpoint-{steps}").mkdir(parents=True)
    (folder / f"checkpoint-{steps}" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "recipe.yaml").write_text("data:\n  train: '<b>train</b>.csv'\ntrainer:\n  learning_rate: 0.0002\n")
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}, indent=2))
    return folder


@pytest.fixture(scope="module")
def table():
    return table_of(400)


@pytest.fixture(scope="module")
def facts(table):
    return facts_of(table)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "gemma <2>")


@pytest.fixture(scope="module")
def page(facts, table, run):
    return render_run(facts, table, run)


@pytest.fixture
def light(monkeypatch):
    """Charts that cost nothing, where a test is about what stands around them."""
    for name in ("intervals", "reliability", "orders", "win_rates", "learning_curve"):
        monkeypatch.setattr(charts, f"draw_{name}", lambda *given, **options: "<svg></svg>")


class Reader(HTMLParser):
    """Balanced tags, unique ids, references that are there, and the text of each section."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.tags, self.links, self.text, self.svg = [], [], [], [], {}, ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("href", "xlink:href", "src", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, name in self.open:
            self.svg += data if tag == "svg" else ""
            if tag == "section":
                self.text[name] = self.text.get(name, "") + data


@pytest.mark.slow  # seconds a case
def test_page_is_balanced_and_its_references_are_within_it(page):
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(reader.ids)
    assert list(reader.text) == SECTIONS
    assert [link for link in reader.links if link[1:] in SECTIONS] == [f"#{name}" for name in SECTIONS[1:]]


def test_page_asks_for_nothing_and_runs_nothing(page):
    tags = [tag for tag, _ in Reader(page).tags]
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(tags)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "<?xml" not in page
    assert not [name for _, given in Reader(page).tags for name in given if name.startswith("on")]
    assert "default-src 'none'" in page


def test_same_input_gives_the_same_bytes(page, facts, table, run):
    assert render_run(facts, table, run) == page


def test_summary_says_whether_the_baselines_are_beaten(page, facts):
    text = Reader(page).text["summary"]
    loss = facts.metrics["log_loss"]
    assert f"{loss.value:.3f}" in text
    assert f"[{loss.low:.3f}, {loss.high:.3f}]" in text
    assert "It beats every baseline beyond noise: class prior by" in text
    for baseline in facts.baselines.values():
        assert format_number(baseline.log_loss, 3) in text
        assert format_number(baseline.difference, 3) in text
    for label, value in PUBLISHED_LOG_LOSSES:
        assert label in text
        assert f"{value:.3f}" in text


def test_metrics_and_confusion_are_all_there(page, facts):
    text = Reader(page).text["metrics"]
    for name, metric in facts.metrics.items():
        digits, scale = (1, 100) if name.startswith("accuracy") else (4, 1)
        assert format_number(metric, digits, scale) in text, name
        assert format_number(metric.low, digits, scale) in text, name
    for count in np.array(facts.confusion).ravel():
        assert str(count) in text


def test_calibration_is_shown_with_its_parameters_before_and_after(page, facts):
    text = Reader(page).text["calibration"]
    for said in (
        "vector",
        "applied",
        "1.2345",
        "0.0987",
        format_number(facts.metrics["log_loss"]),
        "−0.0123",
        "−0.0067",
    ):
        assert said in text
    assert f"{np.exp(0.2):.4f}" in text  # a temperature, from the logarithm of its inverse
    assert "0.3450" in text
    assert "changes the log loss by −0.0189 [−0.0200, −0.0040] compared with calibration alone; not applied" in text
    assert "Before calibration." in text
    assert "After calibration" in text


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_parameters_of_every_method_have_a_name(light, facts, table, method):
    parameters = [0.0123] * len(CALIBRATION_METHODS[method].start)
    given = replace(facts, calibration=replace(facts.calibration, method=method, parameters=parameters))
    text = Reader(render_run(given, table, None)).text["calibration"]
    assert method.replace("_", " ") in text
    assert text.count("0.0123\n") + text.count(f"{np.exp(-0.0123):.4f}\n") >= len(parameters)


def test_audits_are_shown(page, facts):
    text = Reader(page).text
    position, verbosity = facts.position, facts.verbosity
    for name, digits, scale in (("flip_rate", 1, 100), ("preference", 1, 100), ("gain", 4, 1)):
        assert format_number(getattr(position, name), digits, scale) in text["position"], name
    for order in ("ab", "ba", "average"):
        assert format_number(position.log_loss[order]) in text["position"]
    for name in ("humans", "model", "difference"):
        assert format_number(getattr(verbosity, name), 2) in text["length"], name
    assert verbosity.verdict in text["length"]
    assert facts.models.families
    for row in facts.models.families:
        assert row.name in text["models"]
        assert format_number(row.difference, 1, 100) in text["models"]
    for rows in facts.slices.values():
        for row in (rows or []) if len(rows or []) > 1 else []:  # one slice alone is all battles
            assert row.name in text["slices"]
            assert format_number(row.log_loss, 3) in text["slices"]


def test_learning_curve_is_the_checkpoint_s(page):
    text = Reader(page).text["learning"]
    assert "0.9200, at step 60 of 60" in text
    assert "training loss" in text
    assert "validation log loss" in text


def test_battles_are_the_worst_and_the_most_contested(page, table):
    text = Reader(page).text["battles"]
    losses = log_loss_terms(predicted(table), true_outcomes(table))
    entropy = log_loss_terms(predicted(table), predicted(table))
    listed = re.findall(r"<bdi>(100\d{3})</bdi>", page)
    for start, order in ((0, np.argsort(-losses, kind="stable")), (10, np.argsort(-entropy, kind="stable"))):
        assert listed[start : start + 10] == table["id"].iloc[order[:10]].tolist()
    worst = table.iloc[losses.argmax()]
    for name in PROBABILITIES:
        assert f"{worst[name]:.3f}" in text
    assert f"log loss {losses.max():.3f}" in text
    assert worst["model_a"] in text


def test_recipe_and_environment_are_shown_as_text(page):
    assert "&lt;b&gt;train&lt;/b&gt;.csv" in page
    assert '"torch": "2.13"' in Reader(page).text["run"]
    assert "gemma &lt;2&gt;" in page


@pytest.mark.parametrize(
    "part", ["baselines", "calibration", "reliability", "confusion", "position", "verbosity", "models"]
)
def test_a_part_that_is_not_there_is_left_out(light, facts, table, part):
    reader = Reader(render_run(replace(facts, **{part: None}), table, None))
    missing = {"position": "position", "verbosity": "length", "models": "models"}.get(part)
    left = [name for name in SECTIONS if name not in (missing, "learning", "run")]  # of no run: no curve, no recipe
    assert list(reader.text) == left
    assert [link for link in reader.links if link[1:] in SECTIONS] == [f"#{name}" for name in left[1:]]


def test_page_of_nothing_but_a_plain_table_is_whole(table):
    bare = table[["id", "group", *OUTCOMES, *PROBABILITIES]].iloc[:1]
    reader = Reader(render_run(Evaluation(1, 1), bare, None))
    assert list(reader.text) == ["summary", "battles"]
    assert "on 1 held-out battle of 1 prompt" in reader.text["summary"]
    assert "100000" in reader.text["battles"]
    assert not [tag for tag, _ in reader.tags if tag == "details"]
    assert "nan" not in " ".join(reader.text.values())


def test_no_battles_make_a_page(table):
    assert list(Reader(render_run(Evaluation(0, 0), table.iloc[:0], None)).text) == ["summary"]


def test_half_filled_figures_make_a_page(light, facts, table, tmp_path):
    nothing = dict.fromkeys(("humans", "model", "difference", "longer_wins", "matched"))
    half = replace(
        facts,
        verbosity=replace(facts.verbosity, **nothing),
        models=replace(facts.models, families=[]),
        slices=facts.slices | {"source": None},
        metrics={name: metric for name, metric in facts.metrics.items() if name != "log_loss_tie"},
        calibration=CalibrationResult(None, [], False, "calibration part", {}, "left as it is", None, {}, None),
        reliability=replace(facts.reliability, after=None),
    )
    (tmp_path / "trainer_state.json").write_text(
        '{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": 3.0}]}'
    )
    text = Reader(render_run(half, table, tmp_path)).text
    assert facts.models.names[0].name in text["models"]
    assert "As predicted." in text["calibration"]
    assert "blended" not in text["calibration"]
    assert "NaN or infinite at 1 logged step." in text["summary"]
    assert "run" not in text


def test_text_of_a_battle_stays_text(facts):
    odd = table_of(10)  # as many as a list shows
    for name in ("id", "model_a", "prompt", "response_a", "response_b"):
        odd[name] = [NASTY[row % len(NASTY)].replace("\ud800", "") for row in range(10)]  # no column can hold it
    families = [replace(facts.models.families[0], name=nasty) for nasty in NASTY]
    scripts = [replace(facts.slices["script"][0], name=nasty) for nasty in NASTY]
    given = replace(facts, models=replace(facts.models, families=families), slices=facts.slices | {"script": scripts})
    page = render_run(given, odd, None)
    reader = Reader(page)
    page.encode()
    assert not set("\0\x1b\ud800") & set(page)
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    for nasty in NASTY:
        for section in ("battles", "models", "slices"):
            assert nasty.partition("\0")[0][:600] in reader.text[section]
        assert nasty.partition("\0")[0][:14] in reader.svg


def test_a_text_that_is_cut_is_marked(light, facts):
    long = table_of(60).assign(prompt="p" * 701, response_a="a" * 700, response_a_chars=700, response_b_chars=1500)
    text = Reader(render_run(facts, long.drop(columns="prompt_chars"), None)).text["battles"]
    assert "prompt, 701 characters (start only)" + "p" * 700 + " …" in text
    assert "response A, 700 characters" + "a" * 700 + "response B, 1,500 characters (start only)" in text.replace(
        "\n", ""
    )


def test_texts_may_be_lists_of_turns_and_be_missing(light, facts):
    odd = table_of(60)
    odd["prompt"] = [["first turn", None, "second turn"]] * 60
    odd["response_a"] = None
    odd["response_b"] = np.nan
    text = Reader(render_run(facts, odd, None)).text["battles"]
    assert "first turn\n\n\n\nsecond turn" in text
    assert "response A" not in text


def test_a_battle_is_listed_by_the_first_words_of_its_prompt(light, facts):
    prompts = ["Why is  the sky\nblue?", "word " * 50, "w" * 300, ""]
    text = Reader(render_run(facts, table_of(60).assign(prompt=prompts * 15), None)).text["battles"]
    assert "Why is the sky blue? · id 1000" in " ".join(text.split())
    assert "word " * 17 + "word …" in text
    assert "w" * 90 + " …" in text


def test_published_results_are_drawn_beside_those_of_the_arena_only(light, facts, table):
    assert is_arena(table)
    others = table.assign(model_a="grade-1", model_b="grade-2")
    for other in (others, table.drop(columns="model_a"), table.iloc[:0]):
        assert not is_arena(other)
    assert "published" in render_run(facts, table, None)
    assert "published" not in render_run(facts, others, None)


def test_the_head_says_what_was_trained_and_judged_on_what_where_and_when(light, facts, table, run):
    reader = Reader(render_run(facts, table, run))
    assert [given for _, given in reader.tags if given.get("class") == "about"]
    assert "judged on 400 battles of 200 prompts" in describe_run(run, facts)


def test_models_are_listed_by_name_where_there_is_no_family(light, facts, table):
    grades = [replace(one, name=f"grade-{number}") for number, one in enumerate(facts.models.names)]
    text = Reader(render_run(replace(facts, models=replace(facts.models, families=[], names=grades)), table, None)).text
    assert all(one.name in text["models"] for one in grades)


def test_a_dimension_of_one_slice_is_left_out(light, facts, table):
    alone = replace(facts.slices["turns"][0], name="others (3)")
    text = Reader(render_run(replace(facts, slices=facts.slices | {"turns": [alone]}), table, None)).text["slices"]
    assert "others (3)" not in text
    assert "longer response" in text


def test_page_of_many_battles_is_small(facts):
    assert len(render_run(facts, table_of(2000), None).encode()) < 3_000_000


def test_what_stands_out_is_listed_once_each(light, facts, table):
    broken = table_of(400, strength=-5, bias=3)
    measured = facts_of(broken)
    assert judge_baselines(measured)[0] == "bad"
    assert judge_baselines(facts)[0] == "good"
    page = render_run(measured, broken, None)
    said = list_findings(measured)
    assert re.findall("<li>([^<]+)</li>", page)[: len(said)] == [escape(one) for one in said]
    assert len(set(said)) == len(said) > 3
    assert "Nothing else stands out" in render_run(facts, table, None)


def compared(**differences):
    """Return an evaluation whose log loss is 1 ± 0.1, and minus that of the baselines as given, ± 0.1."""
    found = {
        name: BaselineResult(Interval(1, 1, 1), Difference(value, value - 0.1, value + 0.1, 0.5))
        for name, value in differences.items()
    }
    return Evaluation(100, 100, metrics={"log_loss": Interval(1, 0.9, 1.1)}, prior=1.05, baselines=found)


def few(**differences):
    """Return an evaluation of so few prompts that there are no intervals."""
    found = {
        name: BaselineResult(Interval(1, None, None), Difference(value, None, None, None))
        for name, value in differences.items()
    }
    return Evaluation(6, 1, metrics={"log_loss": Interval(1, None, None)}, prior=1.05, baselines=found)


def test_a_page_of_few_prompts_has_no_interval(light):
    page = render_run(replace(few(prior=-0.3), position=None), table_of(6), None)
    assert "<b>Too few prompts to tell</b>" in page
    assert 'class="interval"' not in page
    assert "log loss, 95 %" not in page


def test_the_heading_of_a_page_claims_no_more_than_its_sentence(light):
    headings = {
        "Within noise of its baselines": compared(prior=0.05),
        "Better than some baselines": compared(prior=0.05, length=-0.2),
        "Not better than its baselines": compared(prior=0.2, length=-0.2),
    }
    for heading, facts in headings.items():
        assert f"<b>{heading}</b>" in render_run(facts, table_of(40), None)


@pytest.mark.parametrize(
    ("facts", "state", "said"),
    [
        (compared(prior=-0.3, tfidf=-0.2), "good", "every baseline beyond noise: class prior by 0.300 and TF-IDF"),
        (compared(prior=-0.3, tfidf=-0.05), "mixed", "beyond noise, but is within noise of TF-IDF + length."),
        (compared(prior=-0.3, tfidf=0.2), "mixed", "but is worse than TF-IDF + length by 0.200, beyond noise."),
        (compared(prior=0.05), "even", "It does not beat its baselines: it is within noise of class prior."),
        (compared(prior=0.05, length=-0.2), "mixed", "It does beat length only by 0.200."),
        (compared(prior=0.2, length=-0.2), "bad", "It does not beat its baselines: it is worse than class prior by"),
        (few(prior=-0.3, tfidf=0.2), "few", "There are too few prompts to tell whether it beats its baselines."),
        (few(), "few", "There are too few prompts to tell whether it beats the class prior (1.0500)."),
        (compared(), "even", "It is not different, beyond noise, from the class prior (1.0500)"),
        (replace(compared(), prior=1.2), "mixed", "It beats the class prior (1.2000) beyond noise."),
        (replace(compared(), prior=0.8), "bad", "It is worse than the class prior (0.8000)"),
        (Evaluation(0, 0), "unknown", "was not measured"),
    ],
)
def test_verdict_is_beyond_noise_or_not(facts, state, said):
    assert judge_baselines(facts)[0] == state
    assert said in judge_baselines(facts)[1]


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (-0.12345, {}, "−0.1235"),
        (0.5, {"digits": 1, "scale": 100}, "50.0"),
        (0.5, {"sign": "+"}, "+0.5000"),
        (12345, {"digits": 0}, "12,345"),
        (Interval(1.5, 1, 2), {"digits": 2}, "1.50"),
        (None, {}, "–"),
        (float("nan"), {}, "–"),
        (np.float64(0.25), {"digits": 2}, "0.25"),
        (np.int64(3), {"digits": 0}, "3"),
    ],
)
def test_numbers_are_written_for_people(value, options, text):
    assert format_number(value, **options) == text


def comparison(facts, names, difference):
    return [ComparedRun(name, facts, difference if place else None) for place, name in enumerate(names)]


def test_runs_are_compared_in_one_table_and_one_chart(facts):
    difference = Difference(-0.0456, -0.06, -0.03, p=0.001)
    page = render_comparison(comparison(facts, ["first", "<second>"], difference))
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("svg") == tags.count("table") == 1
    text = reader.text["runs"]
    for said in ("Better than first beyond noise: <second>.", "−0.0456", "[−0.0600, −0.0300]", "< 0.01"):
        assert said in text
    assert page == render_comparison(comparison(facts, ["first", "<second>"], difference))


def test_runs_on_other_battles_are_not_set_against_each_other(facts):
    runs = comparison(facts, ["first", "second"], None)
    runs[1] = replace(runs[1], evaluation=replace(facts, battles=7))
    text = Reader(render_comparison(runs)).text["runs"]
    assert "different numbers of battles" in text
    assert "Better than" not in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow  # seconds a case
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the pages were not looked at")
def test_pages_open_in_a_browser_on_a_phone_and_on_a_desk(page, facts, tmp_path):
    pages = {"run": page, "comparison": render_comparison(comparison(facts, ["first", "w" * 300], None))}
    for kind, shown in pages.items():
        (tmp_path / f"{kind}.html").write_text(shown, encoding="utf-8")
    # A frame has the width asked for (a headless window is never below 500 px), and its parent can measure it.
    frames = [(kind, width) for kind in pages for width in (375, 1280)]
    tags = [
        f'<iframe src="{kind}.html" style="border:0;width:{width}px;height:900px"></iframe>' for kind, width in frames
    ]
    (tmp_path / "frames.html").write_text(
        f'<body style="margin:0;font-size:0;white-space:nowrap">{"".join(tags)}<p></p>'
        "<script>onload = () => { const found = Array.from(frames).map(({document: inner}) => {"
        "const page = inner.documentElement;"
        'const cut = [...inner.querySelectorAll(".table")].filter(one => one.scrollWidth > one.clientWidth).length;'
        "return [page.scrollWidth, page.clientWidth, cut]; });"
        'document.querySelector("p").textContent = `found ${JSON.stringify(found)}.` }</script>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--window-size=3400,900"]
    options += [f"--screenshot={tmp_path / 'shot.png'}", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"found (\[[\d,\[\]]+\])\.", done.stdout)
    assert found, done.stderr
    shot, left = np.asarray(Image.open(tmp_path / "shot.png").convert("L")), 0
    for (kind, width), (needed, given, cut) in zip(frames, json.loads(found[1]), strict=True):
        assert needed == given == width
        assert not cut or (kind, width) == ("comparison", 375), "a table is wider than the page"
        pixels, left = shot[:, left : left + width], left + width
        assert (pixels < 128).any(axis=1).mean() > 0.05, "the page is blank"
