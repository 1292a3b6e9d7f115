"""Hidden states -> logits: the head of a classifier, in float32, and the poolings that it reads."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import initialization
from transformers.modeling_outputs import SequenceClassifierOutput, SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rewardmodel.errors import InputError
from rewardmodel.model.attention import kernel_of
from rewardmodel.model.families import HEADS
from rewardmodel.objectives import HeadShape


def pool_last_token(
    hidden: torch.Tensor, last: torch.Tensor, responses: torch.Tensor, response_of: torch.Tensor
) -> torch.Tensor:
    """Return the hidden state of the last token of each sequence, (n_sequences, width).

    transformers reads the last id that is not the padding id, which misses a true last token where padding and
    end-of-sequence have the same id.
    """
    return hidden.index_select(0, last)


def pool_responses(
    hidden: torch.Tensor, last: torch.Tensor, responses: torch.Tensor, response_of: torch.Tensor
) -> torch.Tensor:
    """Return the mean hidden state of each sequence's first and second response, (n_sequences, 2 * width) float32."""
    states = hidden.index_select(0, responses).float()
    sums = states.new_zeros(2 * len(last), states.shape[1]).index_add(0, response_of, states)
    counts = states.new_zeros(2 * len(last)).index_add(0, response_of, states.new_ones(len(responses)))
    return (sums / counts.clamp(min=1)[:, None]).view(len(last), -1)


def pool_last_and_responses(
    hidden: torch.Tensor, last: torch.Tensor, responses: torch.Tensor, response_of: torch.Tensor
) -> torch.Tensor:
    """Return the last token's state, then the means of both responses, (n_sequences, 3 * width) float32."""
    indices = (last, responses, response_of)
    return torch.cat([pool_last_token(hidden, *indices).float(), pool_responses(hidden, *indices)], dim=1)


POOLINGS = {
    "last": pool_last_token,
    "responses": pool_responses,
    "last_and_responses": pool_last_and_responses,
}
"""What a decoder's head reads, by the recipe's `model.pooling`.

A pooling takes `hidden`, the hidden states of all tokens of a batch, (n_tokens, width), and the indices of
`model.batching.pooling_indices`, all int64: `last` (n_sequences,), and `responses` and `response_of`, (m,) for the m
tokens of responses. The head reads as many columns as it has weights for: sequences of separate objectives have no
second response.
"""

WIDTHS = {
    "last": lambda responses: 1,
    "responses": lambda responses: responses,
    "last_and_responses": lambda responses: 1 + responses,
}
"""Width of what a pooling returns, in widths of the hidden states: (responses of a sequence) -> factor."""


class FloatLinear(torch.nn.Linear):
    """A linear layer that computes in float32, even under autocast; bitsandbytes, which replaces `Linear`, skips it."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return outputs (..., out_features) float32 of states (..., in_features)."""
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.float())


class TieHead(FloatLinear):
    """A scalar reward, followed by the tie parameter, which is the same for every sequence: (n, 2)."""

    def __init__(self, width: int, outputs: int = 1, bias: bool = False) -> None:
        super().__init__(width, outputs, bias=bias)
        self.tie = torch.nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return rewards and the tie parameter, (n, 2), of pooled states (n, width)."""
        reward = super().forward(states)
        return torch.cat([reward, self.tie.expand_as(reward)], dim=1)


class PairTieHead(TieHead):
    """A scalar reward, followed by a tie parameter that depends on both responses of the battle: (n, 2).

    The tie parameter is tie + tie_apart . |a - b| + tie_mean . (a + b) / 2, where a and b are the pooled states of the
    battle's two sequences; it does not depend on their order.
    """

    def __init__(self, width: int, outputs: int = 1, bias: bool = False) -> None:
        super().__init__(width, outputs, bias)
        self.tie_apart = torch.nn.Parameter(torch.zeros(width))
        self.tie_mean = torch.nn.Parameter(torch.zeros(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return rewards and tie parameters, (n, 2), of pooled states (n, width): A and B of each battle in turn.

        If n is odd, as for a single reward, the last sequence is not part of a pair and its tie parameter is `tie`.
        """
        outputs = super().forward(states)
        with torch.autocast(states.device.type, enabled=False):
            a, b = states.float()[: len(states) // 2 * 2].view(-1, 2, states.shape[1]).unbind(dim=1)
            ties = (a - b).abs() @ self.tie_apart + (a + b) @ self.tie_mean / 2
        added = torch.nn.functional.pad(ties.repeat_interleave(2), (0, len(states) % 2))
        return outputs + torch.stack([torch.zeros_like(added), added], dim=1)


def last_layer_class(shape: HeadShape) -> type[FloatLinear]:
    """Return the class of a head's last layer."""
    return (PairTieHead if shape.pairs else TieHead) if shape.tie else FloatLinear


class FloatHead:
    """A mixin for transformers' classifiers: their head computes in float32 and may have a tie parameter.

    Mixed into transformers' own classes, so that loading, saving and PEFT work as for these. A head's last layer that
    is not loaded starts from zero, so that the first predictions prefer no outcome.

    Attributes:
        pooling: a key of `POOLINGS`.
        shape: what the head reads and returns.
        last_layer: name of the layer that returns the logits.
        new_parts: modules inside the backbone that belong to the head and that its weight files do not have, for
            instance BERT's pooler.
    """

    pooling: str
    shape: HeadShape
    last_layer: str | None = None
    new_parts: tuple[str, ...] = ()
    _keep_in_fp32_modules_strict = tuple(rf"^{name}\." for name in HEADS)
    _keys_to_ignore_on_load_missing = (rf"^({'|'.join(HEADS)})\.",)
    _keys_to_ignore_on_load_unexpected = (r"^(lm_head|cls|lm_predictions|mask_predictions|vocab_\w+|decoder)\.",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]

        # replace the head's linear layers by float32 ones, as wide as the pooling
        heads = head_names(self)
        layers = {
            name: layer
            for name, layer in self.named_modules()  # type: ignore[attr-defined]
            if name.partition(".")[0] in heads and isinstance(layer, torch.nn.Linear)
        }
        last_layer = [name for name, layer in layers.items() if layer.out_features == self.shape.num_labels][-1]
        wider = WIDTHS[self.pooling](self.shape.responses)
        for name, old in layers.items():
            kind = last_layer_class(self.shape) if name == last_layer else FloatLinear
            layer = kind(wider * old.in_features, old.out_features, bias=old.bias is not None)
            self.set_submodule(name, layer)  # type: ignore[attr-defined]
        self.last_layer = last_layer

    def _init_weights(self, module: torch.nn.Module) -> None:
        last = self.last_layer and self.get_submodule(self.last_layer)  # type: ignore[attr-defined]
        if module is not last:
            super()._init_weights(module)  # type: ignore[misc]
        if last and module in (self, last):  # some families initialise the last layer with the whole model
            for weight in last.parameters():
                initialization.zeros_(weight)

    def renew(self) -> None:
        """Replace the loaded last layer, quantised or not, by a new one of zeros."""
        old: Any = self.get_submodule(self.last_layer)  # type: ignore[attr-defined]
        with torch.device("meta"):  # so that no random numbers are drawn
            new = type(old)(old.in_features, old.out_features, old.bias is not None)
        self.set_submodule(self.last_layer, new.to_empty(device=self.device))  # type: ignore[attr-defined]
        for weight in new.parameters():
            torch.nn.init.zeros_(weight)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Return logits (n_sequences, num_labels) float32 of a batch of `model.batching.pad`, by upstream's pooling."""
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[misc]
        return SequenceClassifierOutput(logits=outputs.logits.float())


class PooledHead(FloatHead):
    """A decoder classifier whose head reads one of `POOLINGS`, from packed or padded batches."""

    def forward(  # type: ignore[override]  # batches also have the pooling indices
        self,
        input_ids: torch.Tensor,
        last: torch.Tensor,
        responses: torch.Tensor,
        response_of: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        packing: Any = None,
        **_: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return logits (n_sequences, num_labels) float32 of a batch of `model.batching.pack` or `pad`."""
        kwargs: dict[str, Any] = {"attention_mask": attention_mask}
        if packing is not None:
            kwargs |= {"position_ids": position_ids, "packing": kernel_of(self).prepare(packing)}
        decoder = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = decoder(input_ids, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = POOLINGS[self.pooling](hidden, last, responses, response_of)
            logits = self.score(pooled[:, : self.score.in_features])  # type: ignore[attr-defined]
        return SequenceClassifierOutputWithPast(logits=logits)


def head_names(model: Any) -> list[str]:
    """Return the names of the head's modules: those with weights on top of the backbone, and its `new_parts`."""
    children = model.named_children()
    above = [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    return [*above, *model.new_parts]


def check_loaded(model: Any, found: dict[str, Any], folder: Path) -> None:
    """Check that all weights of the backbone were loaded, and set `new_parts` to parts of the head that were not.

    Args:
        model: the classifier.
        found: transformers' loading info.
        folder: of the backbone, for the message.

    Raises:
        InputError: weights of the backbone are missing, or have other sizes than the configuration says.
    """
    wrong = sorted(key for key, *_ in found["mismatched_keys"] if not key.startswith(model.last_layer))
    if wrong:
        raise InputError(
            f"{folder}: weights of other sizes than its config.json says: {', '.join(wrong[:3])}; fetch or convert it "
            "again"
        )
    # a missing weight is one of the head if a part of its name is one of HEADS: bert.pooler.dense.weight
    absent = [key.split(".") for key in sorted(found["missing_keys"])]
    lacking = [".".join(parts) for parts in absent if not {*parts} & {*HEADS}]
    if lacking:
        raise InputError(f"{folder}: its weight files lack {', '.join(lacking[:3])}; fetch or convert it again")
    # the module of each, up to the part that is one of HEADS: bert.pooler
    ends = [next(end for end, part in enumerate(parts, 1) if part in HEADS) for parts in absent]
    model.new_parts = tuple(sorted({".".join(parts[:end]) for parts, end in zip(absent, ends, strict=True)}))


def classifier_class(config: Any, pooling: str, shape: HeadShape) -> Any:
    """Return the class that loads a classifier of a configuration: transformers' own with a float32 head mixed in.

    Decoders, whose head is the single layer `score`, get `PooledHead`; encoders keep the pooling of their class.

    Args:
        config: transformers configuration of the backbone.
        pooling: a key of `POOLINGS`.
        shape: of the head.

    Raises:
        InputError: transformers has no classifier of this type, or a pooling is set for an encoder.
    """
    upstream = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if upstream is None or config.is_encoder_decoder:
        raise InputError(
            f"model.model_name_or_path: a backbone of type '{config.model_type}' has no classifier in transformers "
            "that reads one sequence; use a decoder (Llama, Mistral, Qwen, Gemma, Phi) or an encoder (DeBERTa, RoBERTa)"
        )
    with torch.device("meta"):
        decoder = hasattr(upstream(copy.deepcopy(config)), "score")
    if pooling != "last" and not decoder:
        raise InputError(
            f"model.pooling: '{pooling}' is for decoders; a backbone of type '{config.model_type}' reads what its own "
            "class in transformers reads; leave it out"
        )
    settings = {"__module__": upstream.__module__, "pooling": pooling, "shape": shape}
    return type(upstream.__name__, (PooledHead if decoder else FloatHead, upstream), settings)
