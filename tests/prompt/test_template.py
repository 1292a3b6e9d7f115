import re

import pytest
from builders import CHATML, GEMMA, OWN, OWN_SEPARATE, chat_tokenizer

from rewardmodel.errors import InputError
from rewardmodel.prompt.template import (
    JOINT_RESPONSES,
    SEPARATE_RESPONSES,
    TEMPLATES,
    Template,
    TemplateLayout,
    compile_markers,
)

BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST] {% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def spelled(layout: TemplateLayout) -> str:
    """Return the text of a layout, with each turn as its round and its letter: <1P>, <1A>, <1B>."""
    turns = [f"<{number + 1}{'PAB'[text]}>" for number, text in layout.turns]
    return "".join(before + turn for before, turn in zip(layout.before, turns, strict=True)) + layout.after


def every_round(text: str, joint: str = "") -> str:
    return joint.join(text.replace("1", str(number)) for number in (1, 2, 3))


INSTRUCTION_ROUND = "### Prompt:\n<1P>\n\n### Response A:\n<1A>\n\n### Response B:\n<1B>"
INSTRUCTION_END = "\n\n### Which response is better, A or B, or is it a tie?\nAnswer:"
ENCODER_ROUND = "PROMPT: <1P> <eos> RESPONSE A: <1A> <eos> RESPONSE B: <1B>"
OWN_ROUND = "<1P>\n[Response A]\n<1A>\n[Response B]\n<1B>\n"
CHATML_ROUND = "<|im_start|>user\n<1P><|im_end|>\n<|im_start|>assistant\n<1A><|im_end|>\n"
GEMMA_ROUND = "<start_of_turn>user\n<1P><end_of_turn>\n<start_of_turn>model\n<1A><end_of_turn>\n"


@pytest.mark.parametrize(
    ("template", "chat", "one", "three"),
    [
        (
            "instruction",
            None,
            INSTRUCTION_ROUND + INSTRUCTION_END,
            every_round(INSTRUCTION_ROUND, "\n\n") + INSTRUCTION_END,
        ),
        ("encoder", None, ENCODER_ROUND, every_round(ENCODER_ROUND, " <eos> ")),
        (
            OWN,
            None,
            f"Two assistants answered.\n[Prompt]\n{OWN_ROUND}[Verdict: A, B, tie]",
            f"Two assistants answered.\n[Prompt]\n{every_round(OWN_ROUND, '[And then]' + chr(10))}[Verdict: A, B, tie]",
        ),
        (
            OWN_SEPARATE,
            None,
            "Q1: <1P>\nA1: <1A>\nHow good is it?",
            every_round("Q1: <1P>\nA1: <1A>\n") + "How good is it?",
        ),
        ("chat", CHATML, CHATML_ROUND, every_round(CHATML_ROUND)),
        ("chat", GEMMA, "<bos>" + GEMMA_ROUND, "<bos>" + every_round(GEMMA_ROUND)),
        ("chat", BRACKETS, "[INST] <1P> [/INST] <1A><eos>", every_round("[INST] <1P> [/INST] <1A><eos>")),
    ],
    ids=["instruction", "encoder", "own", "own-separate", "chatml", "gemma", "brackets"],
)
def test_the_text_of_one_and_of_three_rounds(template, chat, one, three):
    tokenizer = chat_tokenizer(chat)
    tokenizer.sep_token = "<eos>"
    made = Template(template, tokenizer)
    assert spelled(made.render(1)) == one
    assert spelled(made.render(3)) == three


def test_a_separator_that_the_tokenizer_has_not_is_left_out(tokenizer):
    assert spelled(Template("encoder", tokenizer).render(1)) == "PROMPT: <1P>  RESPONSE A: <1A>  RESPONSE B: <1B>"


def test_a_template_may_place_the_turns_in_any_order(tokenizer):
    text = (
        "{% for r in rounds %}{{ r.response_b }}|{{ r.prompt }}|{% endfor %}"
        "{% for r in rounds %}{{ r.response_a }}|{% endfor %}"
    )
    assert spelled(Template(text, tokenizer).render(2)) == "<1B>|<1P>|<2B>|<2P>|<1A>|<2A>|"


@pytest.mark.parametrize(
    ("template", "chat", "responses"),
    [
        ("instruction", None, JOINT_RESPONSES),
        ("encoder", None, JOINT_RESPONSES),
        (OWN, None, JOINT_RESPONSES),
        (OWN_SEPARATE, None, SEPARATE_RESPONSES),
        ("chat", CHATML, SEPARATE_RESPONSES),
    ],
    ids=["instruction", "encoder", "own", "own-separate", "chat"],
)
def test_which_responses_stand_in_one_sequence(template, chat, responses):
    assert Template(template, chat_tokenizer(chat)).responses == responses


def looped(text: str) -> str:
    return "{% for round in rounds %}" + text + "{% endfor %}"


ALL = "{{ round.prompt }} {{ round.response }}"
ABSENT = "with 1 rounds, the prompt of round 1 occurs 0 times"

REFUSED = {
    "syntax": (looped(ALL + "{{ round.prompt }"), r"unexpected '}'; fix the template"),
    "no end": ("{% for round in rounds %}{{ round.prompt }}", r"Unexpected end of template.*; fix the template"),
    "undefined": (looped(ALL + "{{ question }}"), r"'question' is undefined; fix the template"),
    "no such key": (looped(ALL + "{{ round.answer }}"), r"'dict object' has no attribute 'answer'; fix the template"),
    "no such filter": (looped(ALL + "{{ round | shout }}"), r"No filter named 'shout'.*; fix the template"),
    "changed": (
        looped("{{ round.prompt | tojson }} {{ round.response }}"),
        "the prompt of round 1 occurs 0 times",
    ),
    "shortened": (looped("{{ round.prompt[:3] }} {{ round.response }}"), ABSENT),
    "counted": (
        looped("{{ round.prompt | length }} {{ round.response }}"),
        "the prompt of round 1 occurs 0 times",
    ),
    "twice": (
        looped(ALL + "{{ round.response }}"),
        "with 1 rounds, the response of round 1 occurs 2 times; "
        "a template must have prompt, response of every round once",
    ),
    "never": (
        looped("{{ round.prompt }} {{ round.response_a }}"),
        "the response_b of round 1 occurs 0 times; "
        "a template must have prompt, response_a, response_b of every round once",
    ),
    "only the first round": (
        "{{ rounds[0].prompt }} {{ rounds[0].response }}",
        "with 2 rounds, the prompt of round 2 occurs 0 times",
    ),
    "no turns": ("{{ 'Which is better?' }}", ABSENT),
    "unknown": ("instructions", "no template 'instructions' .did you mean 'instruction'"),
    "unknown, unlike any": (
        "zzz",
        "no template 'zzz'; known: instruction, encoder, encoder_response, response, chat",
    ),
    "empty": ("", "no template ''; known: instruction, encoder, encoder_response, response, chat"),
    "no chat template": ("chat", "the backbone has no chat template; set it to response, or give Jinja"),
    # What a recipe from elsewhere might try.
    "a class": (looped(ALL) + "{{ ().__class__ }}", "access to attribute '__class__' .* is unsafe"),
    "subclasses": (looped(ALL) + "{{ ().__class__.__base__.__subclasses__() }}", "access to attribute '__class__'"),
    "globals": (looped(ALL) + "{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' .* is unsafe"),
    "a list that grows": (looped(ALL) + "{{ rounds.append(rounds[0]) }}", "access to attribute 'append' .* is unsafe"),
    "a turn that is set": (looped(ALL + "{{ round.update(prompt='x') }}"), "access to attribute 'update' .* is unsafe"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(name, tokenizer):
    text, message = REFUSED[name]
    with pytest.raises(InputError, match=f"^prompt.template: .*{message}") as caught:
        Template(text, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{{ raise_exception('no\nroles') }}", "no roles; fix the template"),
        ("{{ messages[0]['content'] }}", "the response of round 1 occurs 0 times"),
        ("{{ ().__class__.__base__ }}", "access to attribute '__class__' .* is unsafe"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_in_one_line(chat, message):
    with pytest.raises(InputError, match=f"^prompt.template: .*{message}") as caught:
        Template("chat", chat_tokenizer(chat))
    assert "\n" not in str(caught.value)


def test_a_template_that_fails_only_for_many_rounds_is_refused_when_it_meets_them(tokenizer):
    made = Template("{% for r in rounds[:4] %}{{ r.prompt }} {{ r.response }}{% endfor %}", tokenizer)
    assert spelled(made.render(4)) == "".join(f"<{number}P> <{number}A>" for number in range(1, 5))
    with pytest.raises(InputError, match="with 5 rounds, the prompt of round 5 occurs 0 times"):
        made.render(5)


@pytest.mark.parametrize("name", ["upper", "lower", "title", "capitalize"])
def test_a_filter_that_changes_letters_is_refused(name, tokenizer):
    with pytest.raises(InputError, match="the prompt of round 1 occurs 0 times"):
        Template(looped(f"{{{{ round.prompt | {name} }}}} {{{{ round.response }}}}"), tokenizer)


@pytest.mark.parametrize(
    "text",
    ["{{ loop.index + '. ' }}", "{{ 1 / 0 }}", "{% for i in range(1000000) %}{% endfor %}", "{% include 'a file' %}"],
    ids=["a number and a text", "a division by zero", "a loop of a million", "a file"],
)
def test_a_python_error_inside_a_template_is_refused_in_one_line(text, tokenizer):
    with pytest.raises(InputError, match=r"^prompt\.template: "):
        Template(looped(ALL + text), tokenizer)


def test_a_text_of_many_lines_that_is_no_jinja_is_refused_in_one_line(tokenizer):
    with pytest.raises(InputError, match="no template") as caught:
        Template("Prompt:\nResponse A:\nResponse B:\n", tokenizer)
    assert "\n" not in str(caught.value)


def pattern_of(template: str, tokenizer) -> tuple[re.Pattern[str], TemplateLayout]:
    layout = Template(template, tokenizer).render(2)
    return compile_markers(layout, tokenizer.all_special_tokens), layout


INSTRUCTION_MARKERS = {
    "### Prompt:",
    "### Response A:",
    "### Response B:",
    "### Which response is better, A or B, or is it a tie?",
}


@pytest.mark.parametrize(
    ("template", "chat", "special", "lines"),
    [
        ("instruction", None, True, INSTRUCTION_MARKERS),
        ("encoder", None, True, {"PROMPT:", "RESPONSE A:", "RESPONSE B:"}),
        (OWN, None, True, {"[Prompt]", "[And then]", "[Response A]", "[Response B]", "[Verdict: A, B, tie]"}),
        (OWN_SEPARATE, None, True, {"Q1:", "A1:", "Q2:", "A2:", "How good is it?"}),
        ("chat", CHATML, True, set()),
        ("chat", GEMMA, True, set()),
        ("chat", CHATML, False, {"<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"}),
        ("chat", GEMMA, False, {"<start_of_turn>user", "<start_of_turn>model"}),
        ("chat", BRACKETS, True, {"[INST]", "[/INST]"}),
    ],
    ids=[
        *("instruction", "encoder", "own", "own-separate", "chatml", "gemma"),
        *("chatml in plain text", "gemma in plain text", "brackets"),
    ],
)
def test_the_markers_are_the_lines_that_tell_turns_apart(template, chat, special, lines):
    pattern, layout = pattern_of(template, chat_tokenizer(chat, special=special))
    assert set(pattern.findall("".join([*layout.before, layout.after]))) == lines


@pytest.mark.parametrize("spelling", ["### RESPONSE B:", "### response b:", "###\tResponse\n B:", "###   Response  B:"])
def test_a_marker_is_found_in_any_case_and_spacing(spelling, tokenizer):
    pattern, _ = pattern_of("instruction", tokenizer)
    assert pattern.findall(f"so {spelling} there") == [spelling]


@pytest.mark.parametrize("template", [*TEMPLATES, OWN], ids=[*TEMPLATES, "own"])
def test_words_of_every_day_are_no_markers(template, tokenizer):
    pattern, _ = pattern_of(template, tokenizer)
    assert not pattern.findall("Final Answer: 4\nAnswer:\nuser\nmodel\nassistant\nResponse B is better than A.")


@pytest.mark.parametrize("chat", [CHATML, GEMMA])
def test_the_roles_of_a_chat_are_no_markers(chat):
    pattern, _ = pattern_of("chat", chat_tokenizer(chat))
    assert not pattern.findall("user\nassistant\nmodel\n### Response B:\n")
