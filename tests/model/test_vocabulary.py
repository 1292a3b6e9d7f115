import pytest
from builders import make_backbone, make_encoder_tokenizer, make_tokenizer, small_recipe
from transformers import LlamaConfig, RobertaConfig

from rewardmodel.errors import InputError
from rewardmodel.model.vocabulary import check_vocabulary
from rewardmodel.planning.workload import read_workload
from rewardmodel.training.train import train

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


def test_training_and_doctor_refuse_it_before_weights_are_read(tmp_path):
    tokenizer = make_encoder_tokenizer()
    folder = make_backbone("roberta", tmp_path / "backbone", vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    recipe = small_recipe(folder, tmp_path)
    for look in (lambda: train(recipe), lambda: read_workload(recipe, folder)):
        with pytest.raises(InputError, match=r"the backbone's embedding .* rows, and '\[PAD\]' .* has none"):
            look()
    assert not recipe.run_folder.exists()
