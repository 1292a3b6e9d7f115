"""Hidden states in, logits out: what a decoder's classification head reads, and the head itself, in float32."""

from typing import Any

import torch
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rewardmodel.errors import InputError


def last_token(hidden: torch.Tensor, attention_mask: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden state of the last token that the attention mask shows, (n, width).

    transformers takes the last id that is not the padding id, and misses a true last token where padding and
    end-of-sequence share an id.
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (positions * attention_mask).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def response_means(hidden: torch.Tensor, attention_mask: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Return the mean hidden state over response A beside that over response B, (n, 2 * width) float32."""
    means = []
    for segment in (1, 2):
        inside = (segment_ids == segment).unsqueeze(-1).to(torch.float32)
        means.append((hidden.float() * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1))
    return torch.cat(means, dim=-1)


POOLINGS = {"last": (last_token, 1), "responses": (response_means, 2)}
"""What the head reads, by the recipe's `model.pooling`: the pooling, and its width in hidden sizes."""


class PooledHead:
    """A decoder classifier whose float32 head reads a pooling of the hidden states.

    Mixed into transformers' own classes, so that loading, saving and PEFT work as ever. A new head is zero: it
    starts even-handed, not at random.
    """

    pooling: str
    _keys_to_ignore_on_load_missing = (r"^score\.weight$",)
    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        width = POOLINGS[self.pooling][1] * config.get_text_config().hidden_size
        if width != self.score.in_features:  # type: ignore[has-type]
            self.score = torch.nn.Linear(width, config.num_labels, bias=False)

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is self.score:
            torch.nn.init.zeros_(module.weight)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, segment_ids: torch.Tensor, **_: Any
    ) -> SequenceClassifierOutputWithPast:
        """Return logits (n, num_labels) float32; the arguments are (n, length), padded on either side."""
        decoder = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = decoder(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = POOLINGS[self.pooling][0](hidden, attention_mask, segment_ids)
            logits = self.score(pooled.float())
        return SequenceClassifierOutputWithPast(logits=logits)


def classifier_class(config: Any, pooling: str) -> Any:
    """Return the class that loads a classifier of this configuration, with `PooledHead`.

    Raises:
        InputError: transformers has no such class, or its head is its own (encoders).
    """
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    upstream = known.get(type(config), None)
    if upstream is None or not issubclass(upstream, GenericForSequenceClassification):
        raise InputError(
            f"model.model_name_or_path: a backbone of type '{config.model_type}' has no decoder classifier in "
            "transformers; use a Llama, Mistral, Qwen or Gemma class one"
        )
    return type(upstream.__name__, (PooledHead, upstream), {"__module__": upstream.__module__, "pooling": pooling})
