"""Hidden states in, logits out: the head of a classifier, in float32, and what it reads."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import initialization
from transformers.modeling_outputs import SequenceClassifierOutput, SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rewardmodel.errors import InputError
from rewardmodel.model.attention import Layout, Packing
from rewardmodel.model.families import HEADS
from rewardmodel.objectives import HeadShape


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


def last_and_means(
    hidden: torch.Tensor, last: torch.Tensor, responses: torch.Tensor, response_of: torch.Tensor
) -> torch.Tensor:
    """Return the state of the last token beside the means over the responses, (n, 3 * width) float32."""
    places = (hidden, last, responses, response_of)
    return torch.cat([last_token(*places).float(), response_means(*places)], dim=1)


POOLINGS = {"last": last_token, "responses": response_means, "last_and_responses": last_and_means}
"""What a decoder's head reads, by the recipe's `model.pooling`.

A pooling takes the hidden states of all places of a batch, (places, width), and `model.batching.readings`. A head
reads as many columns as it has weights for: there is no second response in the sequences of separate objectives.
"""

WIDTHS = {
    "last": lambda responses: 1,
    "responses": lambda responses: responses,
    "last_and_responses": lambda responses: 1 + responses,
}
"""How many times the width of the hidden states that is, by the responses of a sequence."""


class FloatLinear(torch.nn.Linear):
    """A linear layer that computes in float32, under autocast too; bitsandbytes replaces plain ones only."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return outputs (..., out_features) float32 of states (..., in_features)."""
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.float())


class TieHead(FloatLinear):
    """A scalar reward, and beside it the tie parameter, the same for every sequence: (n, 2)."""

    def __init__(self, width: int, outputs: int = 1, bias: bool = False) -> None:
        super().__init__(width, outputs, bias=bias)
        self.tie = torch.nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return rewards and the tie parameter, (n, 2), of pooled states (n, width)."""
        reward = super().forward(states)
        return torch.cat([reward, self.tie.expand_as(reward)], dim=1)


class PairTieHead(TieHead):
    """A scalar reward, and beside it a tie parameter that depends on both responses of the battle: (n, 2).

    It is tie + tie_apart . |a - b| + tie_mean . (a + b) / 2 of the states a and b of sequences that follow one another,
    the same whichever comes first.
    """

    def __init__(self, width: int, outputs: int = 1, bias: bool = False) -> None:
        super().__init__(width, outputs, bias)
        self.tie_apart = torch.nn.Parameter(torch.zeros(width))
        self.tie_mean = torch.nn.Parameter(torch.zeros(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return rewards and tie parameters, (n, 2), of pooled states (n, width), those of a battle's A and B in turn.

        An odd last one, as where only rewards are asked for, is without another: its tie parameter is `tie`.
        """
        outputs = super().forward(states)
        with torch.autocast(states.device.type, enabled=False):
            a, b = states.float()[: len(states) // 2 * 2].view(-1, 2, states.shape[1]).unbind(dim=1)
            ties = (a - b).abs() @ self.tie_apart + (a + b) @ self.tie_mean / 2
        added = torch.nn.functional.pad(ties.repeat_interleave(2), (0, len(states) % 2))
        return outputs + torch.stack([torch.zeros_like(added), added], dim=1)


def last_layer_kind(shape: HeadShape) -> type[FloatLinear]:
    """Return the class of the last layer of a head of a shape."""
    return (PairTieHead if shape.pairs else TieHead) if shape.tie else FloatLinear


class FloatHead:
    """A classifier of transformers whose own head is float32 and may carry the tie parameter.

    Mixed into transformers' own classes, so that loading, saving and PEFT work as ever. The head's last layer is
    zero unless it is loaded: it starts even-handed, not at random.

    Attributes:
        pooling: a name out of `POOLINGS`.
        shape: what the head reads and states.
        last_layer: name of the layer that gives the logits.
        new_parts: modules inside the backbone that belong to the head and that its weight files lack.
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
        heads = head_names(self)
        layers = {
            name: layer
            for name, layer in self.named_modules()  # type: ignore[attr-defined]
            if name.partition(".")[0] in heads and isinstance(layer, torch.nn.Linear)
        }
        last_layer = [name for name, layer in layers.items() if layer.out_features == self.shape.num_labels][-1]
        wider = WIDTHS[self.pooling](self.shape.responses)
        for name, layer in layers.items():
            kind = last_layer_kind(self.shape) if name == last_layer else FloatLinear
            fresh = kind(wider * layer.in_features, layer.out_features, bias=layer.bias is not None)
            self.set_submodule(name, fresh)  # type: ignore[attr-defined]
        self.last_layer = last_layer

    def _init_weights(self, module: torch.nn.Module) -> None:
        last = self.last_layer and self.get_submodule(self.last_layer)  # type: ignore[attr-defined]
        if module is not last:
            super()._init_weights(module)  # type: ignore[misc]
        if last and module in (self, last):  # some families set the weights of the last layer with those of the whole
            for weight in last.parameters():
                initialization.zeros_(weight)

    def renew(self) -> None:
        """Put a new last layer, which is zero, in the place of the one that was loaded, even a quantised one."""
        old: Any = self.get_submodule(self.last_layer)  # type: ignore[attr-defined]
        with torch.device("meta"):  # draws nothing at random
            new = type(old)(old.in_features, old.out_features, old.bias is not None)
        self.set_submodule(self.last_layer, new.to_empty(device=self.device))  # type: ignore[attr-defined]
        for weight in new.parameters():
            torch.nn.init.zeros_(weight)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Return logits (n_sequences, num_labels) float32 of `model.batching.pad`, read as upstream does."""
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[misc]
        return SequenceClassifierOutput(logits=outputs.logits.float())


class PooledHead(FloatHead):
    """A decoder classifier whose head reads a pooling of the hidden states, packed or padded."""

    def forward(  # type: ignore[override]  # a batch has the places besides
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
        """Return logits (n_sequences, num_labels) float32 of `model.batching.pack` or `pad`."""
        kwargs: dict[str, Any] = {"attention_mask": attention_mask}
        if layout is not None:
            kwargs = {"attention_mask": None, "position_ids": position_ids, "packing": Packing(layout)}
        decoder = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = decoder(input_ids, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = POOLINGS[self.pooling](hidden, last, responses, response_of)
            logits = self.score(pooled[:, : self.score.in_features])  # type: ignore[attr-defined]
        return SequenceClassifierOutputWithPast(logits=logits)


def head_names(model: Any) -> list[str]:
    """Return the names of the modules with weights that stand on the backbone, the head, and of its `new_parts`."""
    children = model.named_children()
    above = [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    return [*above, *model.new_parts]


def check_loaded(model: Any, found: dict[str, Any], folder: Path) -> None:
    """Note the parts of a head that a folder lacks inside the backbone, as `new_parts`.

    Args:
        model: the classifier.
        found: what transformers says of its loading.
        folder: of the backbone, to be named.

    Raises:
        InputError: the folder lacks weights of the backbone itself, or has others of their names.
    """
    wrong = sorted(key for key, *_ in found["mismatched_keys"] if not key.startswith(model.last_layer))
    if wrong:
        raise InputError(f"{folder}: weights of other sizes than its config.json says: {', '.join(wrong[:3])}")
    absent = [key.split(".") for key in sorted(found["missing_keys"])]
    lacking = [".".join(parts) for parts in absent if not {*parts} & {*HEADS}]
    if lacking:
        raise InputError(f"{folder}: its weight files lack {', '.join(lacking[:3])}; fetch or convert it again")
    ends = [next(place for place, part in enumerate(parts, 1) if part in HEADS) for parts in absent]
    model.new_parts = tuple(sorted({".".join(parts[:end]) for parts, end in zip(absent, ends, strict=True)}))


def classifier_class(config: Any, pooling: str, shape: HeadShape) -> Any:
    """Return the class that loads a classifier of this configuration, transformers' own with a float32 head mixed in.

    Decoders, whose head is the one layer `score`, get `PooledHead`; the others read what their class reads.

    Raises:
        InputError: transformers has no such class, or another pooling than the class's own is asked of an encoder.
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
