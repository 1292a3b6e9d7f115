"""Token sequences -> logits of a head that reads the mean hidden state of each response, for plain transformers.

rewardmodel writes this file next to a model's weights, so that they load without rewardmodel:

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    model.predict_battles(tokenizer, ["What is 2 + 2?"], ["4"], ["5"])  # (1, 3): A wins, B wins, tie
    model(**model.encode(tokenizer, ["What is 2 + 2?"], ["4"])).logits  # of one response: a reward first

`reward_head` in config.json says what the head reads and returns, and how sequences are made of texts.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

Texts = Sequence[str | Sequence[str]]
"""Of each conversation one text, or a text for each round: ["What is 2 + 2?", ["Hello", "And 3 + 3?"]]."""


class ResponsesHead(nn.Module):
    """The last layer, computed in float32.

    Args:
        width: of what it reads.
        settings: `reward_head` of the configuration. With a `tie`, each sequence has a reward and a tie parameter;
            with `pair_ties`, that parameter is tie + tie_apart . |a - b| + tie_mean . (a + b) / 2, where a and b are
            what is read of a battle's two responses.
    """

    def __init__(self, width: int, settings: dict[str, Any]) -> None:
        super().__init__()
        self.tie = settings["tie"]
        self.weight = nn.Parameter(torch.zeros(3 if self.tie is None else 1, width))
        if settings["pair_ties"]:
            self.tie_apart, self.tie_mean = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """Return logits (n, 3), or reward and tie parameter (n, 2), of states (n, width): A and B in turn."""
        states = states.float()
        outputs = states @ self.weight.float().T
        if self.tie is None:
            return outputs
        ties = torch.full_like(outputs[:, 0], self.tie)
        if hasattr(self, "tie_apart"):
            paired = len(states) // 2 * 2  # an odd last sequence is in no pair
            a, b = states[:paired:2], states[1:paired:2]
            pairs = (a - b).abs() @ self.tie_apart.float() + (a + b) @ self.tie_mean.float() / 2
            ties[:paired] += pairs.repeat_interleave(2)
        return torch.stack([outputs[:, 0], ties], dim=1)


class ResponsesForSequenceClassification(LlamaForSequenceClassification):
    """The backbone's classifier with `ResponsesHead`."""

    _keep_in_fp32_modules_strict = (r"^score\.",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = self.settings = config.reward_head
        parts = (settings["pooling"] != "responses") + (settings["pooling"] != "last") * len(settings["responses"])
        self.score = ResponsesHead(parts * config.get_text_config().hidden_size, settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return the logits of sequences.

        Args:
            input_ids: (n, length); where ties depend on pairs, A and B of each battle in turn.
            attention_mask: (n, length), 0 where there is padding; default: no padding.
            segment_ids: (n, length), 1 for tokens of the first response, 2 of the second, else 0 (see `encode`).

        Raises:
            ValueError: no `segment_ids`, which the mean of a response needs.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        decoder = getattr(self, self.base_model_prefix)
        hidden = decoder(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        read = []
        if self.settings["pooling"] != "responses":
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            last = (places * attention_mask).argmax(dim=1)
            read.append(hidden[torch.arange(len(hidden), device=hidden.device), last].float())
        if self.settings["pooling"] != "last":
            if segment_ids is None:
                raise ValueError(
                    "segment_ids: this head reads the mean of each response; make its inputs with model.encode"
                )
            for number in range(1, 1 + len(self.settings["responses"])):
                own = (segment_ids == number)[..., None]
                total = hidden.float().masked_fill(~own, 0).sum(dim=1)
                read.append(total / own.sum(dim=1).clamp(min=1))
        return SequenceClassifierOutputWithPast(logits=self.score(torch.cat(read, dim=1)))

    @torch.no_grad()
    def predict_battles(self, tokenizer: Any, prompts: Texts, responses_a: Texts, responses_b: Texts) -> Tensor:
        """Return the probabilities of battles, (n, 3): A wins, B wins, tie; uncalibrated.

        A model that reads both responses in one sequence predicts both orders, and the mean is returned.
        """
        if self.score.tie is None:
            orders = (responses_a, responses_b), (responses_b, responses_a)
            first, second = (self(**self.encode(tokenizer, prompts, *order)).logits.softmax(dim=1) for order in orders)
            return (first + second[:, [1, 0, 2]]) / 2
        twice = [prompt for prompt in prompts for _ in range(2)]
        both = [response for pair in zip(responses_a, responses_b, strict=True) for response in pair]
        rewards, ties = self(**self.encode(tokenizer, twice, both)).logits.view(-1, 2, 2).unbind(dim=2)
        lead, tie = rewards[:, 0] - rewards[:, 1], ties.mean(dim=1)
        if self.settings["objective"] == "rao_kupper":  # Rao & Kupper 1967
            threshold = nn.functional.softplus(tie)
            a, b = (lead - threshold).sigmoid(), (-lead - threshold).sigmoid()
            return torch.stack([a, b, a * b * tie.exp() * (2 + tie.exp())], dim=1)
        return torch.stack([lead / 2, -lead / 2, tie], dim=1).softmax(dim=1)  # Davidson 1970

    def encode(self, tokenizer: Any, prompts: Texts, *responses: Texts) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and segment_ids, (n, length) each, padded on the right.

        Args:
            tokenizer: of this folder.
            prompts: of each conversation.
            responses: one argument, or two (A and B) for a model that reads both in one sequence.

        Raises:
            ValueError: another number of responses or rounds, or a sequence longer than those of training.
        """
        names = self.settings["responses"]
        if len(responses) != len(names):
            raise ValueError(f"{len(responses)} responses for a model that reads {' and '.join(names)} in a sequence")
        made = []
        for number, texts in enumerate(zip(prompts, *responses, strict=True), 1):
            rounds = list(zip(*([text] if isinstance(text, str) else text for text in texts), strict=True))
            ids, segments = self._encode_one(tokenizer, rounds)
            if len(ids) > self.settings["max_length"]:
                raise ValueError(
                    f"conversation {number}: {len(ids)} tokens, and the head learnt from at most "
                    f"{self.settings['max_length']}; shorten its texts, or predict with rewardmodel, which does that"
                )
            made.append([torch.tensor(ids), torch.ones(len(ids), dtype=torch.long), torch.tensor(segments)])
        padding = (tokenizer.pad_token_id, 0, 0)
        padded = [
            pad_sequence(list(rows), batch_first=True, padding_value=value).to(self.device)
            for rows, value in zip(zip(*made, strict=True), padding, strict=True)
        ]
        return dict(zip(("input_ids", "attention_mask", "segment_ids"), padded, strict=True))

    def _encode_one(self, tokenizer: Any, rounds: list[tuple[str, ...]]) -> tuple[list[int], list[int]]:
        """Return ids and segments of a conversation; the template's text and each turn are tokenised separately."""
        ids: list[int] = []
        segments: list[int] = []
        pieces = re.split("\ue000Turn (\\d+) tEXT (\\d)\ue001", self._render(tokenizer, len(rounds)))
        for before, number, text in zip(pieces[:-1:3], pieces[1::3], pieces[2::3], strict=True):
            ids += tokenizer(before, add_special_tokens=False)["input_ids"]
            # what looks like the template in a turn is broken by a space, and special tokens are plain text there
            plain = re.sub(
                self.settings["markers"],
                lambda found: re.sub(r"(?<=\S)(?=\S)", " ", found[0], count=1),
                rounds[int(number)][int(text)],
                flags=re.IGNORECASE,
            )
            ids += tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            segments += [int(text)] * (len(ids) - len(segments))
        ids += tokenizer(pieces[-1], add_special_tokens=False)["input_ids"]

        # what the tokenizer itself puts around a text, unless the template has it
        bare, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        start = next(place for place in range(len(framed)) if framed[place : place + len(bare)] == bare)
        begin, end = framed[:start], framed[start + len(bare) :]
        if ids[: len(begin)] != begin:
            ids, segments = begin + ids, [0] * len(begin) + segments
        if end and ids[-len(end) :] != end:
            ids += end
        return ids, segments + [0] * (len(ids) - len(segments))

    def _render(self, tokenizer: Any, rounds: int) -> str:
        """Return the template with a placeholder for each turn."""
        names = ("prompt", *self.settings["responses"])
        turns = [
            {name: f"\ue000Turn {number} tEXT {text}\ue001" for text, name in enumerate(names)}
            for number in range(rounds)
        ]
        if self.settings["template"] == "chat":
            roles = {"prompt": "user", "response": "assistant"}
            messages = [{"role": roles[name], "content": text} for turn in turns for name, text in turn.items()]
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self.settings["template"])
        return template.render(rounds=turns, sep=tokenizer.sep_token or "")
