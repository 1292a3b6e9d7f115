"""Hidden states in, logits out: what a decoder's classification head reads, and the head itself, in float32."""

from typing import Any

import torch
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rewardmodel.attention import Layout, Packing
from rewardmodel.errors import InputError
from rewardmodel.objective import Head


def last_token(
    hidden: torch.Tensor, last: torch.Tensor, responses: torch.Tensor, response_of: torch.Tensor
) -> torch.Tensor:
    """Return the hidden state of the last token of each sequence, (n, width).

    transformers takes the last id that is not the padding id, and misses a true last token where padding and
    end-of-sequence share an id.
    """
    return hidden.index_select(0, last)


def response_means(
    hidden: torch.Tensor, last: torch.Tensor, responses: torch.Tensor, response_of: torch.Tensor
) -> torch.Tensor:
    """Return the mean hidden state over each response of a sequence side by side, (n, 2 * width) float32."""
    read = hidden.index_select(0, responses).float()
    sums = read.new_zeros(2 * len(last), read.shape[1]).index_add(0, response_of, read)
    counts = read.new_zeros(2 * len(last)).index_add(0, response_of, read.new_ones(len(responses)))
    return (sums / counts.clamp(min=1)[:, None]).view(len(last), -1)


POOLINGS = {"last": last_token, "responses": response_means}
"""What the head reads, by the recipe's `model.pooling`.

A pooling takes the hidden states of all places of a batch, (places, width), and `rewardmodel.batches.readings`.
"""


class TieHead(torch.nn.Linear):
    """A scalar reward, and beside it the tie parameter, the same for every sequence: (n, 2)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=False)
        self.tie = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return rewards and the tie parameter, (n, 2), of pooled states (n, width)."""
        reward = super().forward(pooled)
        return torch.cat([reward, self.tie.expand_as(reward)], dim=1)


class PooledHead:
    """A decoder classifier whose float32 head reads a pooling of the hidden states.

    Mixed into transformers' own classes, so that loading, saving and PEFT work as ever. A new head is zero: it
    starts even-handed, not at random.

    Attributes:
        pooling: a name out of `POOLINGS`.
        head: its shape.
    """

    pooling: str
    head: Head
    _keep_in_fp32_modules_strict = ("score",)
    _keys_to_ignore_on_load_missing = (r"^score\.(weight|tie)$",)
    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        width = config.get_text_config().hidden_size * (1 if self.pooling == "last" else self.head.responses)
        self.read_width = width
        self.score = TieHead(width) if self.head.tie else torch.nn.Linear(width, config.num_labels, bias=False)

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is self.score:
            for weight in module.parameters():
                torch.nn.init.zeros_(weight)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: torch.Tensor,
        last: torch.Tensor,
        responses: torch.Tensor,
        response_of: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        layout: Layout | None = None,
        **_: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return logits (n_sequences, num_labels) float32 of `rewardmodel.batches.pack` or `pad`."""
        kwargs: dict[str, Any] = {"attention_mask": attention_mask}
        if layout is not None:
            kwargs = {"attention_mask": None, "position_ids": position_ids, "packing": Packing(layout)}
        decoder = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = decoder(input_ids, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = POOLINGS[self.pooling](hidden, last, responses, response_of).float()
            logits = self.score(pooled[:, : self.read_width])
        return SequenceClassifierOutputWithPast(logits=logits)


def classifier_class(config: Any, pooling: str, head: Head) -> Any:
    """Return the class that loads a classifier of this configuration, with `PooledHead` of these attributes.

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
    settings = {"__module__": upstream.__module__, "pooling": pooling, "head": head}
    return type(upstream.__name__, (PooledHead, upstream), settings)
