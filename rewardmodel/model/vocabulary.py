"""A tokenizer and a backbone's configuration -> an error where a token can occur that the embedding has no row for."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from rewardmodel.errors import InputError
from rewardmodel.model.families import FAMILIES


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raise if a tokenizer gives ids that are beyond the rows of the backbone's embedding.

    Tokens that never occur do no harm, like the image token of a text-only Gemma 3: special tokens that neither frame
    a text nor stand in the chat template, and the padding token of a backbone whose rows are packed.

    Args:
        tokenizer: of the backbone.
        config: transformers configuration of the backbone.

    Raises:
        InputError: a token without a row can occur.
    """
    rows = config.get_text_config().vocab_size
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    framing = {*tokenizer("a")["input_ids"]}
    padded = bool(tokenizer.sep_token) or config.model_type not in FAMILIES
    for token, number in sorted(beyond.items(), key=lambda one: one[1]):
        named = token in str(tokenizer.chat_template or "")
        if token not in special or number in framing or named or (padded and token == tokenizer.pad_token):
            raise InputError(
                f"model.model_name_or_path: the tokenizer has {len(tokenizer):,} tokens, the backbone's embedding "
                f"{rows:,} rows, and '{token}' (id {number}) has none; save the backbone with more rows "
                "(resize_token_embeddings), or give the tokenizer that it was trained with"
            )
