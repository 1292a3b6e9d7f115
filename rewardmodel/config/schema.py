"""What a recipe holds: one dataclass for each section, with every default in one place.

`model` uses the names of TRL's ModelConfig, and `trainer` takes the keys of TRL's RewardConfig unchanged. A field is
documented once, in the docstring under it, which `--help` and `rewardmodel schema` print.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewardmodel.config.trainer import TRAINER_DEFAULTS, TRAINER_REFUSED
from rewardmodel.errors import InputError


@dataclass
class Source:
    """One file or Hugging Face data set of battles, and how to read it."""

    path: str
    """A file (.csv, .tsv, .jsonl, .json, .parquet, .zip, or one of these as .gz, .bz2, .xz, .zst), a folder of such
    files or of a saved data set, a data set's id on the hub, or `sample`."""
    format: str | None = None
    """competition, conversations, preference, or several answers a prompt: answers, responses, completions,
    ultrafeedback or nemo; default: detected from the column names."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Our column name -> the file's, like {prompt: question}; null ignores the file's column of that name."""
    outcomes: dict[str, str] = field(default_factory=dict)
    """What the values of its `winner` column mean, like {"1": model_a, "0": model_b, "2": tie}; default: they are words
    like model_a, A>B or tie."""
    pairs: Literal["all", "adjacent", "best"] = "all"
    """Which of several answers to a prompt meet: each pair, neighbours in the ranking, or the best and each other. The
    battles of a prompt share the weight of one."""
    score_scale: float | None = None
    """Make soft outcomes of how far two scores are apart: P(the better one wins) = 1 / (1 + exp(-difference /
    score_scale)), as Bradley and Terry's model has it; equal scores stay ties. Default: the better one wins."""
    weight: float = 1.0
    """Weight of its battles in the loss, multiplied by their own weights."""
    limit: int | None = None
    """Use about this many of its battles, drawn as whole prompt groups; default: all."""
    validation: bool = True
    """Whether its battles may be held out; false: training only, except those that share a prompt with a held-out
    battle, which are not used."""
    teacher: str | None = None
    """Predictions of these battles by a teacher that did not train on them (the .parquet of `rewardmodel predict`).
    The distillation and the separate objectives learn from them; battles without an outcome take theirs from here, for
    training only."""
    subset: str | None = None
    """Configuration of a data set on the hub."""
    split: str | None = None
    """Split of a data set on the hub or in a folder; default: train, or test for data.test."""
    revision: str = "main"
    """Branch, tag or commit of a data set on the hub."""

    def __post_init__(self) -> None:
        self.outcomes = {str(value): outcome for value, outcome in self.outcomes.items()}  # YAML's 1 is a number


@dataclass
class DataConfig:
    """Which battles to train on and which to predict."""

    train: str | Source | list[str | Source] = "sample"
    """Labelled battles: a file, a data set's id on the hub, `sample` for the demonstration set of the package, a
    mapping of `path` and how to read it, or a list of these."""
    test: str | Source | None = None
    """Battles to predict into submission.csv, labelled or not; default: none."""
    sample_submission: str | None = None
    """A submission file; submission.csv must have the same columns and ids."""
    limit: int | None = None
    """Use about this many labelled battles, drawn as whole prompt groups; default: all."""
    folds: int = 5
    """Number of folds. Battles of one prompt group are in one fold; outcomes and sources are balanced between folds."""
    fold: int = 0
    """The fold that is held out for validation, counted from 0."""
    calibration: float = 0.0
    """Share of the battles set aside, outside the folds, to fit the calibrator on."""
    holdout: float = 0.0
    """Share of the battles set aside, outside the folds, and never used in training or validation: predict them with
    `rewardmodel predict RUN holdout`."""
    swap_augmentation: Literal["none", "random", "both"] = "random"
    """Order of A and B in training: as given, exchanged at random once per battle, or each battle in both orders.
    Separate objectives have no order and ignore this."""
    seed: int = 0
    """Seed of folds, limits and swaps, and of the order of chosen and rejected in preference data. Training has
    trainer.seed."""

    def __post_init__(self) -> None:
        self.test = Source(**self.test) if isinstance(self.test, dict) else self.test
        given = self.train if isinstance(self.train, list) else [self.train]
        sources = [Source(**one) if isinstance(one, dict) else one for one in given]
        self.train = sources if isinstance(self.train, list) else sources[0]


@dataclass
class PromptConfig:
    """How a battle becomes text, and text a limited number of tokens."""

    template: str | None = None
    """Text around the turns: `instruction` or `encoder` (both responses in one sequence), `response`,
    `encoder_response` or `chat` (one response; `chat` is the tokenizer's chat template), a .jinja file, or Jinja
    source. Default: `instruction` for joint objectives and `chat` for separate ones; for encoders `encoder` and
    `encoder_response`."""
    max_length: int = 1024
    """Maximum tokens of a sequence. Longer battles are truncated, never dropped."""
    truncation: Literal["balanced", "head", "tail", "head_tail"] = "balanced"
    """What is kept of a long battle; recent rounds come first. `balanced` shortens the longer response and keeps the
    beginning and the end of each text; the others shorten all texts in proportion and keep that part of each."""


@dataclass
class ModelConfig:
    """Backbone, quantisation and LoRA; names as in TRL's ModelConfig."""

    model_name_or_path: str = "smollm2-135m-instruct"
    """A model's id on the hub, a local folder, a .gguf file, or a model in a pip package: smollm2-135m-instruct,
    gemma3-270m or all-minilm-l6-v2."""
    model_revision: str = "main"
    """Branch, tag or commit of a model on the hub."""
    num_hidden_layers: int | None = None
    """Keep this many layers of the backbone, counted from the embeddings; default: all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` uses CUDA if there is a device."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute precision; `auto` chooses by hardware. The head and all trainable weights are float32 in any case."""
    attn_implementation: str | None = None
    """Attention implementation: varlen (torch's), sdpa, flash_attention_2, flex_attention or eager; default: the first
    of them that computes the backbone's family and works on the device."""
    use_liger_kernel: bool | None = None
    """Compute norms, rotary embeddings and gated MLPs by the kernels of the package liger-kernel; default: on GPUs of
    compute capability 8.0 (Ampere) and later, where it is installed, and neither FSDP, trainer.torch_compile nor
    use_peft: false is set."""
    pooling: Literal["last", "responses", "last_and_responses"] = "last"
    """What a decoder's head reads: the hidden state of the last token, as in plain transformers; the mean over each
    response, concatenated, from which small backbones learn much faster; or both. Plain transformers loads the latter
    two once exported, with `trust_remote_code`. Encoders keep the pooling of their class in transformers."""
    pair_ties: bool = False
    """Separate objectives: let P(tie) depend on the hidden states of both responses (their distance and mean), in
    addition to the rewards. Exported, plain transformers loads it with `trust_remote_code`."""
    keep_head: bool = False
    """Start from the classification head of the backbone's checkpoint, such as a published reward model, which must
    have the objective's number of outputs; false: a new last layer."""
    head_init: Literal["zero", "fitted", "answer"] = "zero"
    """Initial value of a new last layer: zero, which predicts equal probabilities; fitted to the features of the
    untrained backbone before anything else trains (linear probing first: Kumar et al. 2022); or answer, for joint
    objectives: the language model's output rows for A, B and tie, scaled and shifted to fit 256 battles."""
    load_in_4bit: bool = False
    """Quantise the backbone, not the head, to 4 bits with bitsandbytes."""
    load_in_8bit: bool = False
    """Quantise the backbone, not the head, to 8 bits with bitsandbytes."""
    load_in_fp8: bool = False
    """Hold the linear layers of the backbone's MLPs in 8-bit floating point (e4m3, a scale per row), and round their
    inputs to it; attention and head stay as they are. For GPUs of compute capability 8.9 and later (L4, RTX 4090, L40S,
    H100), which multiply it faster than 16 bits; more than twice as large as 4 bits; emulated on a CPU."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    use_bnb_nested_quant: bool = True
    """Quantise the quantisation constants as well (double quantisation)."""
    use_peft: bool = True
    """Train LoRA adapters and the head; false: train all weights."""
    freeze_backbone: bool = False
    """Train only the last layer of the head. The backbone's features of each battle are computed once and cached, and
    the layer is fitted to convergence. The lora_* keys are not used, and of `trainer` only output_dir, seed and
    dataset_num_proc."""
    lora_r: int = 16
    """Rank of LoRA."""
    lora_alpha: int = 32
    """Scale of LoRA: updates are multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA."""
    lora_target_modules: list[str] | Literal["all-linear"] | None = None
    """Names of the linear layers that get LoRA, or `all-linear`; default: all of attention and MLP, by the backbone's
    family."""
    lora_first_layer: int = 0
    """Index of the first layer with LoRA. Backpropagation stops there."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Learn magnitude and direction separately (DoRA)."""

    @property
    def plain_head(self) -> bool:
        """Whether plain transformers computes the same outputs from the saved head."""
        return self.pooling == "last" and not self.pair_ties


@dataclass
class ObjectiveConfig:
    """The loss, and how outputs become probabilities."""

    name: str = "cross_entropy"
    """cross_entropy or distillation (joint: both responses in one sequence); bradley_terry, rao_kupper or davidson
    (separate: one reward per response)."""
    label_smoothing: float = 0.0
    """Share of the outcome's probability spread evenly over all outcomes, in training only."""
    margin: float = 0.0
    """Reward difference required of the preferred response (bradley_terry)."""
    center_rewards: float = 0.0
    """Weight of the squared sum of a battle's two rewards, which keeps rewards around 0 (separate objectives)."""
    temperature: float = 1.0
    """Softmax temperature of teacher and student (distillation)."""
    weight_votes: float = 1.0
    """Weight of the cross-entropy with the votes (distillation; separate objectives where a battle has a teacher)."""
    weight_teacher: float = 1.0
    """Weight of the Kullback-Leibler divergence from the teacher's probabilities (distillation), or of the
    cross-entropy with them (separate objectives)."""
    weight_cosine: float = 0.0
    """Weight of 1 - cosine similarity between the teacher's and the student's probabilities (distillation)."""


@dataclass
class InferenceConfig:
    """How a trained model predicts."""

    swap_tta: Literal["none", "both"] = "both"
    """Predict each battle as given, or in both orders of A and B and average."""
    calibrate: bool = True
    """Apply the run's calibrator, if its evaluation found one that helps beyond noise."""
    blend: bool = False
    """Combine with the baseline `tfidf`, fitted to the run's training battles, if that beats other calibrators beyond
    noise: p ∝ exp(a log p_model + b log p_baseline + c for the tie), a, b ≥ 0. The blend replaces the calibrator: such
    a run predicts uncalibrated if this key or `calibrate` is set to false."""
    batch_tokens: int | None = None
    """Tokens of a batch; default: as many as fit into free memory."""
    tie_if_same: float | None = None
    """P(tie) for battles with two identical responses, instead of the model's; A and B share the rest. Default: off. A
    run's own metrics are computed without rules, those of `rewardmodel evaluate RUN --data FILE` with them."""
    win_if_other_empty: float | None = None
    """P(win) of a response if the other one is only white space; the other and the tie share the rest. Default: off."""

    def __post_init__(self) -> None:
        for key in ("tie_if_same", "win_if_other_empty"):
            chance = getattr(self, key)
            if chance is not None and not 0 <= chance <= 1:
                raise InputError(f"recipe: inference.{key}: {chance:g}; give a probability from 0 to 1, or null")


@dataclass
class Recipe:
    """All settings of a run. A run folder contains its own recipe, with every default filled in, as recipe.yaml.

    Raises:
        InputError: `trainer` has a key of `TRAINER_REFUSED`.
    """

    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Keys of trl.RewardConfig, on top of `TRAINER_DEFAULTS`; trainer.output_dir is the run folder."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        for key in self.trainer:
            if key in TRAINER_REFUSED:
                raise InputError(f"recipe: trainer.{key} is not accepted: {TRAINER_REFUSED[key]}")
        self.trainer = {**TRAINER_DEFAULTS, **self.trainer}

    @property
    def run_folder(self) -> Path:
        """The folder of the run, `trainer.output_dir`."""
        return Path(self.trainer["output_dir"])


SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "prompt": PromptConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "inference": InferenceConfig,
}
"""The sections that are dataclasses; the sixth, `trainer`, has the keys of `trainer.trainer_keys`."""

REMOVED_KEYS = {"model.lora_init": "LoRA always starts from a zero update; delete the line"}
"""Keys of earlier versions, and what to do: ignored in the recipe of a saved run, refused in any other."""
