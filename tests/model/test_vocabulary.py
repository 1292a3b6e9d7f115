import pytest
from builders import make_encoder_tokenizer, make_tokenizer
from transformers import LlamaConfig, RobertaConfig

from rewardmodel.errors import InputError
from rewardmodel.model.vocabulary import check_vocabulary

LLAMA, ROBERTA = (lambda rows: LlamaConfig(vocab_size=rows)), (lambda rows: RobertaConfig(vocab_size=rows))


def test_an_embedding_with_a_row_for_each_token_is_taken():
    tokenizer = make_tokenizer()
    for rows in (len(tokenizer), len(tokenizer) + 64):
        check_vocabulary(tokenizer, LLAMA(rows))


@pytest.mark.parametrize(("config", "padded"), [(ROBERTA, True), (LLAMA, False)])
def test_a_padding_token_without_a_row_is_refused_where_rows_are_padded(config, padded):
    tokenizer = make_encoder_tokenizer() if padded else make_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if not padded:
        check_vocabulary(tokenizer, config(rows))
        return
    message = f"the tokenizer has {rows + 1} tokens, the backbone's embedding {rows} rows, and .*PAD.* \\(id {rows}\\)"
    with pytest.raises(InputError, match=message):
        check_vocabulary(tokenizer, config(rows))


def test_a_token_that_a_text_may_have_is_refused_and_a_special_one_that_never_occurs_is_not():
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, LLAMA(rows))
    tokenizer.chat_template = "<image>{{ messages }}"
    with pytest.raises(InputError, match="<image>"):
        check_vocabulary(tokenizer, LLAMA(rows))
    tokenizer.chat_template = None
    tokenizer.add_tokens(["plainword"])
    with pytest.raises(InputError, match="plainword"):
        check_vocabulary(tokenizer, LLAMA(rows))
