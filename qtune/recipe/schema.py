"""The recipe: the tables and keys of a TOML file as immutable values.

The schema is the single source: defaults and docstrings stand here once; help, errors, `qtune init` and the JSON
Schema take them from here. What must hold between two values is in `rules.py`.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
)
from pydantic_core import PydanticCustomError

from qtune.control_characters import visible

KeyPath = tuple[str | int, ...]

Auto = Literal["auto"]
Dtype = Literal["float32", "float16", "bfloat16"]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# Bounds of numbers. Each is far beyond what has been published or could be of use, and below what would spin, overflow
# or fill memory: what lies outside is a slip of the pen.
Steps = Annotated[int, Field(gt=0, le=1_000_000_000)]
"""Optimizer steps: at a millisecond each, 10^9 take eleven days."""
Rows = Annotated[int, Field(gt=0, le=1_048_576)]
"""Rows that are taken together: PaLM's largest batch had 2,048 (arXiv:2204.02311, section 5)."""
Width = Annotated[int, Field(gt=0, le=65_536)]
"""Of matrices and prompts: the widest published models have hidden sizes of about 20,000."""
Tokens = Annotated[int, Field(gt=0, le=16_777_216)]
"""Of one example: the longest published contexts are of 10^7."""
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
"""What float32 holds. A rate that is merely too large diverges, which is said when it does."""
Factor = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]
"""Of a soft prompt's vectors, which are multiplied and divided by it: in float32, without becoming zero or infinite."""
Norm = Annotated[float, Field(ge=1e-6, le=1e30, allow_inf_nan=False)]
"""Of gradients: AdamW's epsilon, 1e-8, would swallow smaller ones; more than float32 holds would be infinite."""
Decay = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Layers = Annotated[int, Field(gt=0, le=1024)]
"""Of a model: DeepNet has 1,000 (arXiv:2203.00555)."""
Epochs = Annotated[float, Field(ge=1e-6, le=1_000_000, allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
"""How often a row is seen in an epoch: each time takes eight bytes."""
Minutes = Annotated[float, Field(gt=0, le=525_600, allow_inf_nan=False)]
"""Up to a year."""


def _one_line(text: str) -> str:
    """No file, model or module has a control character in its name; a zero byte ends names in the system's calls."""
    shown = visible(text)
    if shown != text or "\n" in text or "\t" in text:
        raise PydanticCustomError("control_character", "must be one line without control characters")
    return text


Line = Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_one_line)]
"""A path, name or pattern: Linux takes paths of 4,096 bytes."""
Words = Annotated[str, StringConstraints(min_length=1, max_length=1_048_576)]
"""Text that becomes tokens."""
Names = Annotated[tuple[Line, ...], Field(max_length=10_000)]
Columns = Annotated[dict[Line, Line], Field(max_length=1000)]


def _sensible(size: str) -> str:
    """A number below 1 MiB or beyond a petabyte is a slip of the pen."""
    mebibytes = float(size.upper().rstrip("GMIB \t")) * (1024 if "G" in size.upper() else 1)
    if mebibytes < 1:
        raise PydanticCustomError("size", 'must be at least "1MiB"')
    if mebibytes > LARGEST_MIB:
        raise PydanticCustomError("size", 'must be at most "1048576GiB"')
    return size


LARGEST_MIB = 2**30
"""1 PiB: more than any machine has."""
Size = Annotated[
    str, Field(pattern=r"^[0-9]+(\.[0-9]+)?\s?[GgMm]([Ii]?[Bb])?$", max_length=40), AfterValidator(_sensible)
]


class Table(BaseModel):
    """A TOML table: immutable, no unknown keys, no coercion ("16" is not 16)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Model(Table):
    """The base model, which is never changed."""

    base: Line
    """Hub id, local folder, GGUF file, or a built-in name such as "builtin:smollm2-135m-instruct"."""
    revision: Line | None = None
    """Branch, tag or commit of a hub id; the commit that was used is kept in the run's lock.json."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: a model is data."""
    attention: Auto | Literal["sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; "auto" is sdpa, which every device has."""


class FourBit(Table):
    """Blocks of 64 weights as 4-bit codes and one absmax. QLoRA (arXiv:2305.14314), section 3."""

    kind: Literal["nf4", "fp4"] = "nf4"
    """Code book: NF4 is optimal for normally distributed weights; FP4 is a 4-bit float."""
    double_quantization: bool = True
    """Quantize the absmax values too: 4.5 -> 4.127 bits per weight."""
    compute_dtype: Auto | Dtype = "auto"
    """Type that weights are dequantized to and products computed in; "auto" follows the device."""
    minimum_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Refuse to train if a smaller share of the parameters than this ends up quantized."""
    keep_copy: bool = True
    """Keep the quantized model in the cache, so that the next start reads a quarter of the bytes and quantizes nothing:
    of bases from 128 MiB on, where four times the copy is free."""


class EightBit(Table):
    """Row-wise absmax int8 with outlier columns in 16 bits. LLM.int8() (arXiv:2208.07339)."""

    kind: Literal["int8"]
    """LLM.int8()."""
    compute_dtype: Auto | Dtype = "auto"
    """Type of everything that is not quantized; "auto" follows the device."""
    minimum_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Refuse to train if a smaller share of the parameters than this ends up quantized."""
    keep_copy: bool = True
    """Keep the quantized model in the cache, so that the next start reads a quarter of the bytes and quantizes nothing:
    of bases from 128 MiB on, where four times the copy is free."""


class Unquantized(Table):
    """The base model in its compute dtype."""

    kind: Literal["none"]
    """No quantization."""
    compute_dtype: Auto | Dtype = "auto"
    """Type of the weights; "auto" follows the device."""


Quantization = FourBit | EightBit | Unquantized


class AdapterTable(Table):
    """What every kind of adapter has: two keys, and the facts of its kind that the stages ask for."""

    in_words: ClassVar[str]
    """As a model card names it."""
    export: ClassVar[Literal["merge", "bake", "alone"]]
    """How it leaves its run: merged into the weights, baked into the vocabulary, or as an adapter beside its base."""
    auto_learning_rate: ClassVar[tuple[float, str]]
    """What training.learning_rate = "auto" means, and why."""
    peft_checkpoints: ClassVar[bool] = True
    """Whether peft's own way of training it can compute activations twice; ours always can."""
    predicts_first_token: ClassVar[bool] = False
    """Whether something of it stands before a row's first token, so that this one can be scored too."""

    @property
    def usual_rate(self) -> tuple[float, str]:
        """`auto_learning_rate`, where none of the adapter's own keys makes it another one."""
        return self.auto_learning_rate

    first_keys: ClassVar[tuple[str, ...]] = ("kind",)
    """The keys worth a first look, which a new recipe shows."""
    first_values: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What a new recipe begins with where that is known to learn better than the defaults, which older recipes mean."""
    first_warmup: ClassVar[float | None] = None
    """The training.warmup of a new recipe, where `first_values` were measured with another than the default."""

    kind: str
    """Which kind of adapter: each is a table of its own."""
    dtype: Auto | Dtype = "auto"
    """Type of what is trained; "auto" is float32, so that small updates are not rounded away."""
    start_from: Line | None = None
    """Run whose adapter this one starts as, with the same kind and sizes; a path from the folder in which qtune is
    called. Optimizer and learning rate begin anew."""

    @property
    def prompt_length(self) -> int:
        """Positions that it takes before every row; 0 where it is no soft prompt."""
        return int(getattr(self, "virtual_tokens", 0))


OWN_STARTS = ("pissa", "loftq", "eva", "text", "rows")
"""Values of `initialization` that are made of the base, of a text or of rows: none goes with `start_from`."""


class Lora(AdapterTable):
    """LoRA: h = W x + (alpha / rank) B A x. Hu et al. 2021 (arXiv:2106.09685), section 4.1."""

    in_words = "a LoRA adapter"
    export = "merge"
    auto_learning_rate = (2e-4, "QLoRA's rate for models up to 13B (arXiv:2305.14314, table 9)")
    first_keys = ("kind", "rank", "alpha", "target_modules")

    kind: Literal["lora"] = "lora"
    """Low-rank updates next to the linear layers."""
    rank: Width = 16
    """Inner dimension of A [rank, in] and B [out, rank]; adapter memory grows linearly with it."""
    alpha: Width = 32
    """Numerator of the scale alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: Names | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter; "all-linear" is every one but the LM head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which stays stable for large ranks. arXiv:2312.03732."""
    dora: bool = False
    """Learn magnitude and direction apart: better at small ranks, slower. arXiv:2402.09353."""
    initialization: Literal["default", "gaussian", "pissa", "loftq", "eva"] = "default"
    """Start of A and B: loftq (arXiv:2310.08659) from the error of a 4-bit base, eva (arXiv:2410.07170) from
    activations of the training rows, pissa (arXiv:2404.02948) from the weights of an unquantized base."""


RESIDUAL_RATE = (3e-3, "what an encoder that is added to its vectors learned best with (docs/quickstart.md)")


BEST_PROMPT = MappingProxyType({"residual": True, "vector_rate": 30.0, "vector_scale": 100.0, "initialization": "rows"})
"""How a soft prompt learned best (docs/quickstart.md), but for its start: a new recipe knows no text, and of single
runs from rows, from words of the vocabulary and from a text none was clearly ahead (NOTES.md)."""


class PTuning(AdapterTable):
    """Virtual tokens computed by a trained prompt encoder. Liu et al. 2021 (arXiv:2103.10385), section 3."""

    in_words = "a soft prompt (p-tuning)"
    export = "bake"
    auto_learning_rate = (5e-3, "prompt encoders need a rate well above LoRA's")
    predicts_first_token = True
    first_keys = ("kind", "virtual_tokens", *BEST_PROMPT)
    first_values = BEST_PROMPT
    first_warmup = 0.1

    kind: Literal["p-tuning"]
    """Virtual tokens before the prompt, from an encoder."""
    virtual_tokens: Width = 16
    """Length of the soft prompt; it spends context that data.max_length does not count."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """Prompt encoder: a three-layer MLP or a bidirectional LSTM with two linear layers."""
    encoder_hidden_size: Width | None = None
    """Width of the encoder; left out, the model's hidden size."""
    encoder_layers: Annotated[int, Field(gt=0, le=128)] | None = None
    """Layers of the LSTM; left out, 2. The MLP always has three."""
    encoder_dropout: Fraction = 0.0
    """Dropout between the LSTM's layers."""
    residual: bool = False
    """Add what the encoder computes to the vectors that it reads (arXiv:2305.03937), which can then start at words."""
    vector_rate: Factor = 1.0
    """Rate of those vectors as a multiple of training.learning_rate, which is the encoder's. Needs residual."""
    vector_scale: Factor = 1.0
    """Size at which the vectors begin, as a multiple of the words'; large ones reach every layer nearly as they are.
    Needs residual."""
    initialization: Literal["random", "vocabulary", "text", "rows"] = "random"
    """Start of those vectors: normal noise, rows of the embedding table, the embeddings of `text`, or those of training
    rows as the template renders them (arXiv:2507.04221). All but noise need residual."""
    text: Words | None = None
    """Text whose tokens start the virtual tokens; it is repeated or cut to their number."""

    @property
    def usual_rate(self) -> tuple[float, str]:
        """With `residual` it is the encoder's, and `vector_rate` times as much the vectors'."""
        return RESIDUAL_RATE if self.residual else self.auto_learning_rate


class PromptTuning(AdapterTable):
    """Virtual tokens trained directly. Lester et al. 2021 (arXiv:2104.08691), section 2."""

    in_words = "a soft prompt (prompt tuning)"
    export = "bake"
    auto_learning_rate = (3e-2, "free vectors, and few of them, need a large rate")
    predicts_first_token = True
    first_keys = ("kind", "virtual_tokens", *BEST_PROMPT)
    first_values = BEST_PROMPT
    first_warmup = 0.1

    kind: Literal["prompt-tuning"]
    """Virtual tokens before the prompt, each a free vector."""
    virtual_tokens: Width = 16
    """Length of the soft prompt; it spends context that data.max_length does not count."""
    initialization: Literal["random", "vocabulary", "text", "rows"] = "vocabulary"
    """Start of the vectors: normal noise, rows of the embedding table, the embeddings of `text`, or those of training
    rows as the template renders them (arXiv:2507.04221)."""
    text: Words | None = None
    """Text whose tokens start the virtual tokens; it is repeated or cut to their number."""
    residual: bool = False
    """Add to each vector what one hidden layer, shared by all of them, computes from it (arXiv:2305.03937)."""
    encoder_hidden_size: Width | None = None
    """Width of that layer; left out, the model's hidden size. Needs residual."""
    vector_rate: Factor = 1.0
    """Rate of the vectors as a multiple of training.learning_rate, which is that layer's. Needs residual."""
    vector_scale: Factor = 1.0
    """Size at which the vectors begin, as a multiple of the words'; large ones reach every layer nearly as they are.
    Needs residual."""

    @property
    def usual_rate(self) -> tuple[float, str]:
        """With `residual` it is the encoder's, and `vector_rate` times as much the vectors'."""
        return RESIDUAL_RATE if self.residual else self.auto_learning_rate


class PrefixTuning(AdapterTable):
    """Trained keys and values before every layer's own. Li & Liang 2021 (arXiv:2101.00190), section 4."""

    in_words = "a prefix (prefix tuning)"
    export = "alone"
    auto_learning_rate = (1e-2, "free vectors, and few of them, need a large rate")
    peft_checkpoints = False  # keys and values are handed over in the cache, which transformers takes from such layers
    first_keys = ("kind", "virtual_tokens", "initialization")
    first_values: ClassVar[Mapping[str, Any]] = MappingProxyType({"initialization": "rows"})
    first_warmup = 0.1

    kind: Literal["prefix-tuning"]
    """Virtual keys and values in every layer."""
    virtual_tokens: Width = 16
    """Length of the prefix; it spends context that data.max_length does not count."""
    projection: bool = False
    """Compute the prefix with an MLP from a small embedding, as in the paper; easier to train, larger."""
    initialization: Literal["random", "text", "rows"] = "random"
    """Start of the prefix: normal noise, or what the base keeps of `text` or of training rows as the template renders
    them (arXiv:2507.04221). All but noise need projection = false."""
    text: Words | None = None
    """Text that the prefix starts as; it is repeated or cut to the number of virtual tokens."""
    encoder_hidden_size: Width | None = None
    """Width of that MLP; left out, the model's hidden size."""


class IA3(AdapterTable):
    """Trained scales on keys, values and feed-forward activations. Liu et al. 2022 (arXiv:2205.05638), section 3.3."""

    in_words = "an IA3 adapter"
    export = "merge"
    auto_learning_rate = (5e-3, "scales start at 1 and have far to go (arXiv:2205.05638, section 3.3, uses 3e-3)")

    kind: Literal["ia3"]
    """Learned scales, the smallest adapter."""
    target_modules: Names | None = None
    """Layers whose output (or input, if feed-forward) is scaled; left out, peft's list for the model family."""
    feedforward_modules: Names | None = None
    """Which of them are feed-forward layers, scaled at their input."""


Adapter = Lora | PTuning | PromptTuning | PrefixTuning | IA3


RowFormat = Literal["messages", "sharegpt", "prompt-completion", "alpaca", "question-answer", "text"]
# What the gate may find and a recipe may waive; qtune/data/findings.py says what each means.
Waivable = Literal[
    "empty-mask",
    "no-end-of-turn",
    "answer-changed",
    "tool-call-lost",
    "tools-lost",
    "reasoning-lost",
    "message-lost",
    "unused-input",
    "label-text",
    "generation-prompt",
    "rewritten-turn",
    "double-bos",
    "missing-bos",
    "control-token",
    "too-long",
    "out-of-vocabulary",
]


class FileSource(Table):
    """Rows in files."""

    path: Line
    """A file, a folder of files, or a pattern such as "data/*.jsonl.gz"."""
    weight: Weight = 1.0
    """How often each row is seen in an epoch: 2.0 is twice, 0.5 a random half of the rows."""
    format: Auto | RowFormat = "auto"
    """Shape of the rows of this source."""
    columns: Columns = Field(default_factory=dict)
    """Our name of a column = its name in this source."""


class HubSource(Table):
    """Rows of a hub dataset."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", max_length=200)
    """The dataset's id, owner/name."""
    config: Line | None = None
    """Configuration, where the dataset has several."""
    split: Line = "train"
    """Split; slices such as "train[:1000]" work."""
    revision: Line | None = None
    """Branch, tag or commit."""
    weight: Weight = 1.0
    """How often each row is seen in an epoch: 2.0 is twice, 0.5 a random half of the rows."""
    format: Auto | RowFormat = "auto"
    """Shape of the rows of this source."""
    columns: Columns = Field(default_factory=dict)
    """Our name of a column = its name in this source."""


def _kind_of_source(value: Any) -> str:
    if isinstance(value, str):
        return "name"
    is_hub = isinstance(value, HubSource) or (isinstance(value, Mapping) and "hub" in value)
    return "hub source" if is_hub else "file source"


Source = Annotated[
    Annotated[Line, Tag("name")] | Annotated[FileSource, Tag("file source")] | Annotated[HubSource, Tag("hub source")],
    Discriminator(_kind_of_source),
]
Sources = Annotated[
    Annotated[Line, Tag("one source")]
    | Annotated[Annotated[tuple[Source, ...], Field(min_length=1, max_length=10_000)], Tag("several sources")],
    Discriminator(lambda value: "several sources" if isinstance(value, (list, tuple)) else "one source"),
]
SourcesOrShare = Annotated[
    Annotated[Sources, Tag("sources")] | Annotated[Fraction, Tag("share")],
    Discriminator(lambda value: "share" if isinstance(value, (int, float)) else "sources"),
]


class Data(Table):
    """What is learned from, and how rows become tokens."""

    train: Sources
    """Training rows: a file, folder, pattern or "hub:owner/name", or a list of those and of tables with a weight."""
    validation: SourcesOrShare = 0.05
    """Rows for the eval loss during training: sources, or the share of the training rows to set aside (0: none)."""
    validation_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed by which a share is drawn; left out, training.seed. Runs with several seeds need one, to be compared."""
    test: Sources | None = None
    """Rows for `qtune eval`; left out, it takes the validation rows."""
    format: Auto | RowFormat = "auto"
    """Shape of the rows; "auto" recognizes it by the columns of each source's first row."""
    columns: Columns = Field(default_factory=dict)
    """Columns that have other names in the files, as { instruction = "query", output = "reply" }."""
    system: Literal["keep", "drop", "merge"] = "keep"
    """System messages: as they are, removed, or put into the first user message (for templates without that role)."""
    system_prompt: Words | None = None
    """System message of the rows that have none."""
    chat_template: Line | None = None
    """A jinja file, or a built-in template: "chatml", "alpaca" or "plain". Left out, the tokenizer's own."""
    loss_on: Literal["all-answers", "last-answer"] = "all-answers"
    """Which assistant turns are scored."""
    on_rewritten_turn: Literal["split", "last", "error"] = "split"
    """Templates that render earlier turns differently: an example for each answer, the last answer only, or refuse."""
    max_length: Tokens = 2048
    """Longest example in tokens; raw text is cut into pieces of this length."""
    on_long_row: Literal["error", "drop", "cut-left", "cut-right"] = "error"
    """Rows that are longer: refuse them, leave them out, or cut them at the start or the end."""
    packing: bool = False
    """Put several short rows into one of max_length; they do not see each other."""
    streaming: Auto | bool = "auto"
    """Read the training rows (JSON lines, Parquet) from their files while they are trained on, after a pass that checks
    them. "auto": where what is kept of prepared rows would take more than half of the cache's free disk."""
    shuffle_rows: Annotated[int, Field(ge=0, le=1_048_576)] = 10_000
    """Streamed rows that are shuffled among each other, and wait in memory; 0 leaves the order of the files."""
    on_turn_order: Literal["error", "merge", "drop"] = "error"
    """Rows with two turns of one role in a row, an answer at the start or a question at the end: refuse them, join such
    turns (a first answer stays as context, a last question goes), or leave the rows out."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Rows that cannot be used: stop and name them, or count and list what is skipped."""
    allow: tuple[Waivable, ...] = ()
    """Findings of the gate that do not stop this run."""


class Training(Table):
    """The optimization."""

    epochs: Epochs = 1.0
    """Passes over the training rows."""
    steps: Steps | None = None
    """Optimizer steps; given, it replaces epochs."""
    batch_size: Rows = 16
    """Rows per optimizer step. The effective one: it never changes behind your back."""
    micro_batch_size: Auto | Rows = "auto"
    """Rows that are in memory at once; batch_size is made of such micro-batches. "auto" follows from memory."""
    learning_rate: Auto | Rate = "auto"
    """Peak learning rate; "auto" follows the adapter's kind."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Decay = 0.0
    """AdamW's decoupled weight decay."""
    max_gradient_norm: Norm = 1.0
    """Gradients are scaled down to this norm."""
    optimizer: Auto | Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "auto"
    """AdamW (arXiv:1711.05101) with fp32 or 8-bit state (arXiv:2110.02861), paged to the host when the card is full."""
    gradient_checkpointing: Auto | bool | Layers = "auto"
    """Keep one activation per layer and compute the rest again in the backward pass (arXiv:1604.06174): in all layers,
    in none, or in so many of the first. "auto": in as few as memory allows, where that is the fastest step."""
    lean_step: Auto | bool = "auto"
    """Compute LoRA layers, gated MLPs, norms and rotations by qtune's own functions: the same loss and gradients to
    rounding, in less time and memory. "auto": where a small layer has peft's gradients on this device; true: the run
    stops where it has not; false: peft's and transformers' own."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the adapter's start, the order of rows and dropout."""
    log_every: Steps = 1
    """Optimizer steps between two lines of metrics."""
    eval_every: Steps | Literal["epoch", "never"] = "epoch"
    """Optimizer steps between two measurements of the validation loss."""
    evaluate_first: bool = False
    """Also measure the validation loss before the first step: what the run begins with."""
    sample_answers: Annotated[int, Field(ge=0, le=32)] = 3
    """Validation rows that the model answers at each evaluation, to be read beside the curves: greedily, at most 128
    tokens each and 20 seconds in all. They change nothing of the training; 0: none."""
    result: Literal["best-beyond-noise", "best", "last"] = "best-beyond-noise"
    """Which state becomes the adapter: the "best" by validation loss, the "last", or the best only where it is better
    than the last by more than noise."""
    patience: Steps | None = None
    """End the run when so many evaluations in a row have found no lower validation loss."""
    checkpoint_every: Steps | Literal["epoch"] = "epoch"
    """Optimizer steps between two checkpoints."""
    checkpoint_minutes: Minutes | None = 30.0
    """Also save a checkpoint when the last one is this old."""
    keep_checkpoints: Annotated[int, Field(gt=0, le=10_000)] = 2
    """How many checkpoints stay on disk."""
    rehearse: bool | None = None
    """Before the first step, do once what comes later: the heaviest micro-batch, an evaluation, a checkpoint, an
    answer; nothing of it is left. Left out, runs of 50 steps or more do."""
    skip_outlier_steps: bool = False
    """Leave out the update of a step whose loss or gradient norm is more than six standard deviations above the mean of
    the last 128; such steps are marked in any case (arXiv:2501.00656). Needs log_every = 1."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers to report to; each must be installed. None by default: nothing leaves the machine."""


class Memory(Table):
    """What the device may spend."""

    budget: Auto | Size = "auto"
    """Memory that a step may use, as "8GiB"; "auto" is what the card has free."""
    embeddings: Auto | Literal["device", "host", "int8", "nf4"] = "auto"
    """Where the frozen embeddings and LM head are. "host": rows are looked up there, and the head crosses the bus in
    blocks, twice for a micro-batch and once for each token of an answer; the same results, slower. "int8" and "nf4": on
    the card in 8.5 or 4.5 bits a weight, which changes the model a little. "auto" is the card, or the host where a
    single row would not fit otherwise."""
    activations: Literal["device", "host"] = "device"
    """Where activations wait for the backward pass. "host": they cross the bus out and back (with gradient
    checkpointing one hidden state a layer); the same results bit for bit, slower."""
    layers: Literal["device", "host", "disk", "sharded"] = "device"
    """Where the frozen 4-bit layers wait. "host" and "disk": two of them are on the device, and each comes there
    twice a step for all micro-batches together, whose hidden states wait beside one another; the same gradients. A step
    takes at least as long as the layers need to come. "sharded": each of several processes holds a part of every layer,
    and they bring it together where it is computed; one process has all of it."""
    keep_dequantized: Auto | bool | Layers = "auto"
    """Whether frozen 4-bit weights stay dequantized from one product to the next; a number: those of so many of the
    first layers. The same results bit for bit, sooner, for a number of the compute dtype a weight. "auto" is on a card
    as many layers as are left room for where nothing is computed twice, on a processor all where memory is ample."""
    loss_tile: Size = "64MiB"
    """Logits that the loss holds at once; half as many take a little longer, the results are the same."""


RUN_NAME = r"^[\w][\w.+-]*$"
LONGEST_NAME = 200
"""Bytes: with what stands around it while it is written, a name must fit the 255 bytes of a folder's."""


def is_run_name(text: str) -> bool:
    """Whether a run can be called so: a folder's name without spaces and signs that shells take for their own."""
    return len(text.encode(errors="replace")) <= LONGEST_NAME and re.fullmatch(RUN_NAME, text) is not None


def _short_enough(name: str) -> str:
    if len(name.encode(errors="replace")) > LONGEST_NAME:
        raise PydanticCustomError("long_name", f"must be at most {LONGEST_NAME} bytes long")
    return name


class Output(Table):
    """Where the run goes."""

    directory: Line = "runs"
    """Folder of runs, from the folder in which qtune is called."""
    name: Annotated[str, Field(pattern=RUN_NAME), AfterValidator(_short_enough)] | None = None
    """Folder of this run; left out, the recipe's file name. A taken name gets -2, -3, …"""
    gguf: Literal["f16", "bf16", "q8_0"] | None = None
    """Type of a GGUF file that `qtune export` also writes; a model that can have none is refused before training."""


class Recipe(Table):
    """A whole recipe."""

    model: Model
    quantization: Quantization = Field(default_factory=FourBit, discriminator="kind")
    adapter: Adapter = Field(default_factory=Lora, discriminator="kind")
    data: Data
    training: Training = Field(default_factory=Training)
    memory: Memory = Field(default_factory=Memory)
    output: Output = Field(default_factory=Output)


# A table that leaves its kind out means this one; pydantic cannot pick a union member without it.
DEFAULT_KINDS = {"quantization": "nf4", "adapter": "lora"}


def kinds_of(table: type[Table]) -> tuple[str, ...]:
    """The values of `kind` that mean this table."""
    return tuple(get_args(table.model_fields["kind"].annotation))


QUANTIZATIONS: dict[str, type[Table]] = {kind: table for table in get_args(Quantization) for kind in kinds_of(table)}
ADAPTERS: dict[str, type[AdapterTable]] = {kind: table for table in get_args(Adapter) for kind in kinds_of(table)}
"""The table that each kind means."""
KINDS: dict[str, Mapping[str, type[Table]]] = {"adapter": ADAPTERS, "quantization": QUANTIZATIONS}
"""Those of each table that has kinds."""
