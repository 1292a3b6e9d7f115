"""What a recipe holds: one dataclass a section, every default in one place.

`model` keeps the names of TRL's ModelConfig and `trainer` takes the keys of TRL's RewardConfig as they are.
A field is documented once, under the field; the command line's help is made from there.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewardmodel.config.trainer import TRAINER_DEFAULTS, TRAINER_REFUSED
from rewardmodel.errors import InputError


@dataclass
class Source:
    """One file or hub data set of battles, and how to read it."""

    path: str
    """A file (.csv, .jsonl, .json, .parquet, .zip), a hub data set's id, or `sample`."""
    format: str | None = None
    """A name out of rewardmodel.data.formats.FORMATS; none: told by the columns."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """The file's own names for our columns, like {prompt: question}; null: do as if the file had no such column."""
    weight: float = 1.0
    """Weight of its battles in the loss, times their own."""
    limit: int | None = None
    """Use only about this many of its battles, drawn as whole prompt groups."""
    validation: bool = True
    """Whether its battles may be held out; false: they only train, but for those that share a held-out prompt."""
    teacher: str | None = None
    """A teacher's predictions of these battles, a .parquet of `rewardmodel predict` by runs that did not train on them:
    what the distillation objective learns from, and the outcome of battles without one, which then only train."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set; none: train, or test for data.test."""
    revision: str = "main"
    """Branch, tag or commit of a hub data set."""


@dataclass
class DataConfig:
    """Which battles to learn from and to predict."""

    train: str | Source | list[str | Source] = "sample"
    """Labelled battles: a file, a hub data set's id, `sample` for the demonstration set inside the package, or a list
    of such, each with its own weight, limit and columns."""
    test: str | Source | None = None
    """Battles to predict for submission.csv, unlabelled or not; none: no submission."""
    sample_submission: str | None = None
    """A submission file whose columns and ids submission.csv must repeat."""
    limit: int | None = None
    """Use only about this many labelled battles, drawn as whole prompt groups."""
    folds: int = 5
    """Into how many folds the labelled battles are dealt, by prompt group, outcomes and sources alike."""
    fold: int = 0
    """The fold that is held out for validation, from 0."""
    calibration: float = 0.0
    """Share of the battles that is in no fold and is kept to fit calibration on."""
    holdout: float = 0.0
    """Share of the battles that is in no fold: never trained on or validated on, and predicted only by name."""
    swap_augmentation: Literal["none", "random", "both"] = "random"
    """Training order of A and B: as given, thrown by a coin once for each battle, or every battle in both orders.
    Separate objectives know no order."""
    seed: int = 0
    """Seed of folds, limits, swaps, and of who stands first in chosen/rejected data; trainer.seed is training's."""

    def __post_init__(self) -> None:
        self.test = Source(**self.test) if isinstance(self.test, dict) else self.test
        given = self.train if isinstance(self.train, list) else [self.train]
        sources = [Source(**one) if isinstance(one, dict) else one for one in given]
        self.train = sources if isinstance(self.train, list) else sources[0]


@dataclass
class PromptConfig:
    """How a battle becomes text, and text becomes a bounded number of tokens."""

    template: str | None = None
    """Text around the turns: a name out of prompt.template.TEMPLATES, `chat` for the tokenizer's own, a .jinja
    file, or Jinja itself; none: `instruction` for objectives that compare both responses in one sequence, `chat` for
    those that score each alone; `encoder` and `encoder_response` where the tokenizer has a separator, as those of
    encoders do."""
    max_length: int = 1024
    """Most tokens of a sequence. Longer battles lose text; none is dropped."""
    truncation: Literal["balanced", "head", "tail", "head_tail"] = "balanced"
    """What stays of a long battle, recent rounds first: `balanced` shortens the longer response and keeps head and
    tail of each text; the others shorten texts in proportion and keep that part of each."""


@dataclass
class ModelConfig:
    """Backbone, quantisation and LoRA; the names are those of TRL's ModelConfig."""

    model_name_or_path: str = "smollm2-135m-instruct"
    """A hub id, a local folder, a .gguf file, or a packaged name (rewardmodel.model.weights.PACKAGED)."""
    model_revision: str = "main"
    """Branch, tag or commit of a hub id."""
    num_hidden_layers: int | None = None
    """Use so many layers of the backbone, from below, and leave the others out; none: all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is a device."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute precision; `auto` asks the hardware. Head and trainable weights are always float32."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name; none: the best that the family allows."""
    pooling: Literal["last", "responses", "last_and_responses"] = "last"
    """What a decoder's head reads: the last token, as plain transformers does; the mean over each response of the
    sequence, side by side, which small backbones learn from much sooner; or both (only rewardmodel loads such heads).
    An encoder keeps the head of its class in transformers, which reads the first token or what else it was made for."""
    pair_ties: bool = False
    """Let P(tie) depend on what the head reads of both responses, on how far they are apart and on their mean, and not
    on their rewards and one number alone (separate objectives; only rewardmodel loads such a head)."""
    keep_head: bool = False
    """Start from the classification head that the backbone comes with, as a published reward model does, and refuse one
    that has none of the objective's width; false: the head's last layer is new, and starts even-handed."""
    head_init: Literal["zero", "fitted"] = "zero"
    """Start of a new head's last layer: zero, which is even-handed, or fitted to what the untouched backbone reads, as
    with freeze_backbone, before anything else trains (linear probing first: Kumar et al. 2022)."""
    load_in_4bit: bool = False
    """Quantise the backbone to 4 bits with bitsandbytes; the head is left out."""
    load_in_8bit: bool = False
    """Quantise the backbone to 8 bits with bitsandbytes; the head is left out."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    use_bnb_nested_quant: bool = True
    """Quantise the quantisation constants too (double quantisation)."""
    use_peft: bool = True
    """Train LoRA adapters and the head; false: all weights."""
    freeze_backbone: bool = False
    """Train the last layer of the head alone. What it reads of each battle is computed once and kept in the cache, and
    the head is then fitted exactly: no lora_* key is read, and of `trainer` only where to, the seed and processes."""
    lora_r: int = 16
    """LoRA rank."""
    lora_alpha: int = 32
    """LoRA scale: updates are multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Dropout before LoRA."""
    lora_target_modules: list[str] | None = None
    """Names of linear layers that get LoRA; none: the family's, all of attention and MLP."""
    lora_first_layer: int = 0
    """Layers before this one keep no LoRA, and backpropagation stops there."""
    lora_init: Literal["default", "pissa"] = "default"
    """Start of LoRA: zero update, or the principal singular vectors (PiSSA; needs an unquantised backbone)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Learn magnitude and direction apart (DoRA)."""

    @property
    def plain_head(self) -> bool:
        """Whether plain transformers computes what the head was trained to."""
        return self.pooling == "last" and not self.pair_ties


@dataclass
class ObjectiveConfig:
    """What the model is trained to state."""

    name: str = "cross_entropy"
    """A name out of rewardmodel.objectives.OBJECTIVES."""
    label_smoothing: float = 0.0
    """Share of probability moved from the outcome to all outcomes evenly, in training only."""
    margin: float = 0.0
    """Reward difference that the preferred response is asked for (bradley_terry)."""
    center_rewards: float = 0.0
    """Weight of the squared sum of a battle's two rewards, which keeps rewards around 0 (separate objectives)."""
    temperature: float = 1.0
    """Temperature at which teacher and student are compared (distillation)."""
    weight_votes: float = 1.0
    """Weight of the cross-entropy with the votes (distillation)."""
    weight_teacher: float = 1.0
    """Weight of the divergence from the teacher's probabilities (distillation)."""
    weight_cosine: float = 0.0
    """Weight of one less the cosine of teacher's and student's probabilities (distillation)."""


@dataclass
class InferenceConfig:
    """How trained models predict."""

    swap_tta: Literal["none", "both"] = "both"
    """Predict each battle as given, or in both orders and average."""
    calibrate: bool = True
    """Apply the run's calibrator, where its evaluation found one that helps beyond noise."""
    blend: bool = False
    """Mix in the predictions of the baseline `tfidf`, which is fitted to the run's training battles, where that beats
    the other calibrators beyond noise: p ∝ exp(a log p_model + b log p_baseline + c for the tie), a and b from 0. It
    takes the place of the calibrator: a run that has it predicts uncalibrated where this, or `calibrate`, is false."""
    batch_tokens: int | None = None
    """Tokens of a batch; none: as many as fit into free memory."""
    tie_if_same: float | None = None
    """P(tie) where both responses are the same text, in the place of the model's; A and B share the rest; none: off.
    A run's own metrics are without rules; `rewardmodel evaluate RUN --data FILE` has them."""
    win_if_other_empty: float | None = None
    """P(win) of a response beside one of white space alone; the other and the tie share the rest; none: off."""

    def __post_init__(self) -> None:
        for key in ("tie_if_same", "win_if_other_empty"):
            chance = getattr(self, key)
            if chance is not None and not 0 <= chance <= 1:
                raise InputError(f"recipe: inference.{key}: {chance:g}; give a probability from 0 to 1, or null")


@dataclass
class Recipe:
    """All that makes a run; a run folder carries its own, resolved, as recipe.yaml.

    Raises:
        InputError: `trainer` has a key out of `TRAINER_REFUSED`.
    """

    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Keys of trl.RewardConfig, over `TRAINER_DEFAULTS`; trainer.output_dir is the run folder."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        for key in self.trainer:
            if key in TRAINER_REFUSED:
                raise InputError(f"recipe: trainer.{key} is not taken: {TRAINER_REFUSED[key]}")
        self.trainer = {**TRAINER_DEFAULTS, **self.trainer}

    @property
    def run_folder(self) -> Path:
        """The folder that the run is written to."""
        return Path(self.trainer["output_dir"])
