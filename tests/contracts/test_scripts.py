"""The benchmark scripts: each answers --help, and the comparisons run on random weights without a GPU or a download."""

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fresh import run_fresh

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ["plan_recipes", "read_depths", *sorted(path.stem for path in SCRIPTS.glob("bench_*.py"))]

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 40_000,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
"""The shape that is measured here; drawn ids are below 40,000."""


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.mark.parametrize("name", NAMES)
def test_a_script_says_how_it_is_called(name, script, monkeypatch, capsys):
    module = script(name)
    if not hasattr(module, "main"):
        return
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.fixture
def plan_of(script, tmp_path, monkeypatch):
    """Return a function that writes the plan of a comparison of 8 battles after 8: plan_of("training_battles", 4)."""
    models, comparison = script("bench_models"), script("bench_compare")
    monkeypatch.setitem(models.SHAPES, "tiny", dataclasses.replace(models.SHAPES["tiny"], config=TINY, max_length=96))
    monkeypatch.setattr(comparison, "WARM", 8)
    monkeypatch.setattr(comparison, "matrix_rate", lambda *_: 1e12)
    monkeypatch.setattr(models, "text_tokenizer", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def plan(counted: str, bits: int) -> str:
        words = ["--synthetic", "--shape", "tiny", "--battles", "8", "--bits", str(bits)]
        return str(comparison.planned(comparison.arguments("", ("ours",), counted).parse_args(words), tmp_path))

    return plan


def test_passes_beside_a_neighbour_are_compared_in_turns(script, monkeypatch, capsys):
    module = script("bench_neighbour")
    monkeypatch.setattr(module, "SETTINGS", {"default": {}, "one thread": {"OMP_NUM_THREADS": "1"}})
    answering = "import os, sys\nfor _ in sys.stdin: print(200 if 'OMP_NUM_THREADS' in os.environ else 100, flush=True)"
    found = module.measure([sys.executable, "-c", answering], rounds=2, neighbours=1)
    assert found.keys() == {"alone", "beside"}
    for one in found.values():
        assert one["default"] == {"milliseconds": 100, "fastest": 100, "ratio": 1.0}
        assert one["one thread"] == {"milliseconds": 200, "fastest": 200, "ratio": 2.0}
    monkeypatch.setattr(sys, "stdin", ["\n"])
    module.answer_passes(layers=1, tokens=4)
    assert float(capsys.readouterr().out) > 0


@pytest.mark.slow  # seconds a case
# transformers' and TRL's own trainers, as users of the release see them
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "bits"),
    [("ours", 16), ("ours", 4), ("separate", 16), ("trainer", 16), ("trainer", 4), ("trl", 16)],
    # not TRL's on 4 bits: it casts adapters to bfloat16, which a forward pass in float32, as here, does not take
)
def test_training_is_measured_on_random_weights(name, bits, script, plan_of):
    figures = script("bench_training").train(plan_of("training_battles", bits), name)
    assert figures["optimiser_steps"] == 1
    assert figures["battles_a_second"] > 0
    assert figures["loss"] == pytest.approx(1.1, abs=1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [16, 4])
def test_inference_is_measured_on_random_weights_and_all_agree(bits, script, plan_of):
    module, plan = script("bench_inference"), plan_of("inference_battles", bits)
    figures = {name: module.both_orders(plan, name) for name in module.COMPETITORS}
    assert {one["battles"] for one in figures.values()} == {8}
    for name in ("stock", "sorted"):
        assert figures[name]["largest_difference_from_ours"] < 0.02


PROGRAM = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Run the file named first as `python FILE ARGUMENTS` does."""


@pytest.mark.slow  # a fresh process that runs every part of the script
def test_the_script_for_gpus_runs_every_part_on_a_cpu(script, tmp_path, user_cache):
    module, path = script("bench_gpu"), tmp_path / "gpu.json"
    own = {"PYTHONPATH": str(SCRIPTS.parent), "CUDA_VISIBLE_DEVICES": ""}
    words = ["--seconds", "900", "--json", str(path)]
    out, err = run_fresh(PROGRAM, SCRIPTS / "bench_gpu.py", *words, env=os.environ | own)
    assert "failed: " not in out, err
    (found,) = json.loads(path.read_text()).values()
    figures = found["figures"]
    todo = module.jobs(list(module.PARTS), ["tiny", "tiny-gemma2"], list(module.PRECISIONS))
    assert list(figures) == [job.name for job in todo]
    for job in todo:
        one = figures[job.name]
        assert "failed" not in one
        if "skipped" in one:  # only what this release, or this machine, does not have, and what is measured already
            assert job.precision == "fp8" or (job.part, job.shape) == ("kept", "tiny"), job.name
        elif job.part in module.SPEEDS:
            assert one["tokens_a_second"] > 0
            assert one["battles_a_second"] > 0
            assert 0 < one["flops_utilisation"] < 2
            assert one["peak_gib"] > 0
        elif job.part == "profile":
            assert 0 <= one["gap_share"] < 1
            assert one["kernels"][0]["ms"] > 0
        elif job.part == "doctor":
            assert one["training"]["told_gib"] > 0
            assert one["training"]["peak_gib"] == figures[f"training {job.shape} {job.precision}"]["peak_gib"]
    for name in ("stock", "sorted"):  # the cap and the window of Gemma 2 too
        assert figures[f"{name} tiny nf4"]["largest_difference_from_ours"] < 0.02
        assert figures[f"{name} tiny-gemma2 nf4"]["largest_difference_from_ours"] < 0.02
    assert figures["smollm2"]["log_loss_before"] == pytest.approx(1.0986, abs=0.001)
    table = out.partition("battles/s")[2]
    assert max(map(len, table.splitlines()[1:])) <= 110
    for name in ("training tiny nf4", "sorted tiny-gemma2 nf4", "smollm2", "profile tiny bf16"):
        assert f"\n{name}" in table


@pytest.mark.parametrize(
    ("intervals", "busy"),
    [
        ([(0, 1), (2, 3)], 2),
        ([(2, 3), (0, 1)], 2),
        ([(0, 4), (1, 2), (3, 6)], 6),  # two streams at once
        ([(0, 1), (1, 2)], 2),
        ([(5, 5)], 0),
        ([], 0),
    ],
)
def test_the_time_in_which_a_kernel_runs_is_known_by_hand(intervals, busy, script):
    assert script("gpu_parts").busy_time(intervals) == busy


def test_the_kernels_that_take_longest_come_first(script):
    events = [("a", 0, 1000), ("b", 1000, 4000), ("a", 4000, 5000)]
    first, second = script("gpu_parts").top_kernels(events)
    assert first == {"name": "b", "ms": 3.0, "share": 0.6, "calls": 1}
    assert second == {"name": "a", "ms": 2.0, "share": 0.4, "calls": 2}


def test_a_part_has_its_share_of_the_time_that_is_left(script):
    share_of = script("bench_gpu").share_of
    assert share_of(1, 4, 40) == 10
    assert share_of(3, 3, 40) == 40  # what others left over goes to the last
    assert share_of(1, 4, -5) == 0


def test_training_stops_before_a_step_that_would_not_end_in_time(script):
    steps = script("gpu_speed").Steps
    control = SimpleNamespace(should_training_stop=False)
    early, late = (steps(torch.device("cpu"), time.monotonic() + seconds) for seconds in (60, -1))
    for one in (early, late):
        one.on_train_begin()
    early.on_step_end(None, SimpleNamespace(global_step=1, max_steps=9), control)
    assert (control.should_training_stop, early.stopped) == (False, False)
    late.on_step_end(None, SimpleNamespace(global_step=9, max_steps=9), control)
    assert (control.should_training_stop, late.stopped) == (False, False)  # the last step: it is over anyway
    late.on_step_end(None, SimpleNamespace(global_step=1, max_steps=9), control)
    assert (control.should_training_stop, late.stopped) == (True, True)
    assert len(late.marks) == 3
    control.should_training_stop, soon = False, steps(torch.device("cpu"), time.monotonic() + 0.15)
    soon.on_train_begin()
    time.sleep(0.1)  # the next one would end after 0.2 s
    soon.on_step_end(None, SimpleNamespace(global_step=1, max_steps=9), control)
    assert (control.should_training_stop, soon.stopped) == (True, True)


def test_a_part_that_fails_or_hangs_does_not_end_the_others(script, monkeypatch, capsys):
    module, written = script("bench_gpu"), []
    monkeypatch.setattr(module, "GRACE", 0.0)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")

    def skip(*_):
        raise module.SkippedError("no such precision")

    measures = {"full": fail, "other": skip, "hanging": lambda *_: time.sleep(60), "good": lambda *_: {"figure": 1}}
    todo = [module.Job(name, 1, measure) for name, measure in measures.items()]
    bench = SimpleNamespace(figures={}, cuda=False, clear=lambda: None)
    module.run_all(bench, todo, time.monotonic() + 2, lambda: written.append(len(bench.figures)))
    assert written == [1, 2, 3, 4]
    assert bench.figures["full"]["failed"] == "OutOfMemoryError: CUDA out of memory."
    assert bench.figures["other"]["skipped"] == "no such precision"
    assert bench.figures["hanging"]["failed"].startswith("TimeoutError: not done 1 s")
    assert bench.figures["good"]["figure"] == 1
    assert "out of memory" in capsys.readouterr().err
    module.run_all(bench, todo, time.monotonic() - 1, lambda: None)
    assert bench.figures["good"]["skipped"] == "no time left"
    text = module.table(bench.figures)
    assert "no time left" in text


def test_the_overhead_of_a_step_is_measured(script, monkeypatch):
    module = script("bench_overhead")
    monkeypatch.setitem(module.BACKBONE, "num_hidden_layers", 4)
    monkeypatch.setattr(module, "text_tokenizer", lambda: None)
    figures = module.measure(battles=2, longest=90, repeats=2)
    assert figures["modules"] > 300
    assert figures["battles"] == 2
    assert 0 < figures["collate_ms"] < figures["step_ms"] < 10_000
    assert figures["together_operations"] < 0.8 * figures["apart_operations"]
    assert figures["together_ms"] > 0


def test_serving_is_measured_on_a_tiny_model(script, backbone, tmp_path):
    import threading
    from contextlib import contextmanager

    import uvicorn
    from builders import battle_frame, small_recipe, write_untrained_run

    from rewardmodel.config.schema import ObjectiveConfig
    from rewardmodel.data.formats import read_battles
    from rewardmodel.inference.judge import load_judge
    from rewardmodel.serving.app import build_app

    @contextmanager
    def served(run):
        server = uvicorn.Server(uvicorn.Config(build_app(load_judge(run), ["run"]), port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            thread.join(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()

    recipe = small_recipe(backbone("llama"), tmp_path)
    prompt = dataclasses.replace(recipe.prompt, template="response")
    run = write_untrained_run(dataclasses.replace(recipe, objective=ObjectiveConfig(name="davidson"), prompt=prompt))
    found = script("bench_serving").measure(str(run), read_battles(battle_frame(2)), [1, 4], served)
    assert found["battles"] == 8
    assert found["clients"].keys() == {"1", "4"}
    for one in found["clients"].values():
        assert 0 < one["p50_s"] <= one["p99_s"]
        assert one["of_offline"] == pytest.approx(one["a_second"] / found["offline_a_second"], rel=0.02, abs=0.01)
    assert found["best_of_8"]["prompt_shared"] > 0


def test_depths_read_together_are_what_each_backbone_reads_alone(script, backbone, tmp_path, monkeypatch):
    from builders import battles_of, small_recipe

    from rewardmodel.config.schema import ObjectiveConfig

    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "together"))
    module, alone = script("read_depths"), script("out_of_fold")
    recipe = small_recipe(backbone("llama"), tmp_path, objective=ObjectiveConfig("davidson"))
    recipe = dataclasses.replace(recipe, prompt=dataclasses.replace(recipe.prompt, template="response"))
    battles = battles_of([("good", "bad, and longer"), ("one", "two"), ("yes", "")], np.eye(3))
    assert module.read_depths(recipe, battles, [1, 2]) == 3
    assert module.read_depths(recipe, battles, [1, 2]) == 0  # the cache has them
    recipes = [
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=depth))
        for depth in (1, 2)
    ]
    together = [alone.read(one, battles).features for one in recipes]
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "alone"))
    for one, found in zip(recipes, together, strict=True):
        np.testing.assert_array_equal(found, alone.read(one, battles).features)


def test_large_recipes_are_planned_on_every_machine(script, backbone, monkeypatch):
    module = script("plan_recipes")
    monkeypatch.setattr(module, "MACHINES", {"T4": 2})
    words = [f"--model.model_name_or_path={backbone('llama')}", "--prompt.max_length=64"]
    found = module.plan("llama3_8b_qlora", words, None)["2 x T4"]
    assert found["precision"] == "float16"
    assert 0 < found["training_hours"] <= found["hours"] < 1
    assert 0 < found["gib_at_least"] < 1
    refused = module.plan("llama3_8b_qlora", [*words, "--model.load_in_fp8=true", "--model.load_in_4bit=false"], None)
    assert "model.load_in_fp8" in refused["2 x T4"]["problems"][0]


def test_reward_models_learn_from_a_teacher_on_folds_that_neither_saw(script, backbone, tmp_path, monkeypatch):
    from builders import battle_frame, small_recipe, write_csv

    from rewardmodel.config.loader import dump_recipe

    recipe = small_recipe(backbone("llama"), tmp_path)
    model = dataclasses.replace(recipe.model, freeze_backbone=True, pooling="last_and_responses", pair_ties=True)
    objective = dataclasses.replace(recipe.objective, name="davidson")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(dataclasses.replace(recipe, model=model, objective=objective)))
    train = [str(write_csv(battle_frame(9), tmp_path / "train.csv"))]
    keys = ["--prompt.template=response"]
    options = SimpleNamespace(recipe=path, keys=keys, train=train, folds=3, limit=None)
    monkeypatch.setattr("rewardmodel.training.head_fit.PENALTIES", (3.0,))
    found = script("bench_distillation").measure_rewards(options, 0)
    assert found["battles"] == 36
    assert {"joint teacher", "served, votes", "served, teacher", "own, both"} <= found["log_loss"].keys()
    assert found["log_loss_differences"]["served, teacher - served, votes"]["value"] != 0


def test_a_teacher_has_seen_neither_the_battle_nor_the_fold_that_is_judged(script, monkeypatch):

    module, fold = script("bench_distillation"), np.array([0, 1, 2, 2, 1, 0])

    def fitted(recipe, given, dealing, folds, changes):
        learnt = sum(10**number for number in set(fold[dealing.fold != folds[0]].tolist()))
        return np.full((2, 6, 3), float(learnt))

    monkeypatch.setattr(module, "fitted_out_of_fold", fitted)
    found = module.taught(None, None, script("out_of_fold").Fold(fold, fold, np.ones(6, bool)))
    nan = np.nan
    np.testing.assert_array_equal(found[0][:, 0], [nan, 100, 10, 10, 100, nan])
    np.testing.assert_array_equal(found[2][:, 0], [10, 1, nan, nan, 1, 10])
