"""Commands that ask a trained run, or let others ask it: serve, compare, parity."""

import json
from argparse import Namespace


def _serve(options: Namespace) -> None:
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


def _compare(options: Namespace) -> None:
    """Ask a trained run which of two responses to a prompt is better."""
    from rewardmodel.inference.battles import single_model
    from rewardmodel.run_folder import load_run_recipe
    from rewardmodel.serving.compare import compare_responses, read_texts

    single_model(options.run)
    recipe = load_run_recipe(options.run, options.overrides)
    texts = read_texts(vars(options))
    answer = compare_responses(options.run, **texts, recipe=recipe)
    from rewardmodel.serving.answers import format_answer

    print(json.dumps(answer, indent=2) if options.json else format_answer(answer, recipe))


def _parity(options: Namespace) -> int:
    """Ask a server of a trained run for scores, with many clients at once, and compare them with the run's."""
    from rewardmodel.serving.parity import format_served_parity, parity

    found = parity(options.run, options.url, options.battles, overrides=options.overrides)
    print(format_served_parity(found))
    return 0 if found.holds else 1


ASKING = {"serve": _serve, "compare": _compare, "parity": _parity}
