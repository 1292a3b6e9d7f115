"""The commands that serve a run, ask it, and compare the two: parsed options in, printed lines out.

Apart from `cli` for its size; like there, what is given is checked before torch is imported.
"""

import json
from argparse import Namespace


def run_serve(options: Namespace) -> None:
    """Answer HTTP requests with a trained run: battles, rewards, finished texts, and a page to try it on."""
    from rewardmodel.serving.limits import Limits
    from rewardmodel.serving.serve import serve

    serve(
        options.run,
        host=options.host,
        port=options.port,
        name=options.name,
        limits=Limits(options.max_waiting, options.max_tokens, options.max_body, options.timeout),
        overrides=options.overrides,
        log_texts=options.log_texts,
    )


def run_compare(options: Namespace) -> None:
    """Ask a trained run which of two responses to a prompt is better."""
    from rewardmodel.config.loader import load_recipe
    from rewardmodel.inference.battles import single_model
    from rewardmodel.run_folder import RunFolder
    from rewardmodel.serving.compare import compare_responses, read_texts

    single_model(options.run)
    recipe = load_recipe(RunFolder(options.run).recipe, options.overrides, of_run=True)
    texts = read_texts(vars(options))
    answer = compare_responses(options.run, **texts, recipe=recipe)
    from rewardmodel.serving.answers import format_answer

    print(json.dumps(answer, indent=2) if options.json else format_answer(answer))


def run_parity(options: Namespace) -> int:
    """Ask a server of a trained run for scores, with many clients at once, and compare them with the run's."""
    from rewardmodel.serving.parity import format_served_parity, parity

    found = parity(options.run, options.url, options.battles, overrides=options.overrides)
    print(format_served_parity(found))
    return 0 if found.holds else 1
