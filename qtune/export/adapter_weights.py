"""An adapter folder in peft's format -> what it does to each parameter of the base model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from qtune.errors import Problem, RunError
from qtune.model.checkpoint import tensors_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What peft can put into a LoRA config that changes what the adapter computes, and that a merge here does not know.
# Everything else either only matters for training or is handled below.
NOT_MERGEABLE = {
    "layer_replication": "repeats layers of the base",
    "alora_invocation_tokens": "is active for a part of the tokens only",
    "target_parameters": "targets parameters outside of linear layers",
    "use_qalora": "pools its inputs",
    "use_bdlora": "uses block-diagonal matrices",
    "arrow_config": "routes between adapters",
    "kasa_config": "uses KaSA's singular values",
    "monteclora_config": "samples its weights",
    "velora_config": "compresses its activations",
    "megatron_config": "was trained with Megatron",
}


@dataclass(frozen=True)
class Update:
    """What the adapter changes in one parameter, in fp32; a parameter is [out, in], an embedding [rows, hidden].

    In this order: `replacement` takes the parameter's place (modules_to_save); the `principal` leading singular
    components leave it (PiSSA, Meng et al. 2024, arXiv:2404.02948, equation 4: training began with them in the
    factors); `factors` A [rank, in], B [out, rank] add `scaling` · B A (Hu et al. 2021, arXiv:2106.09685); `magnitude`
    [out] then sets the norm of each row (DoRA, Liu et al. 2024, arXiv:2402.09353, equation 5); `column_scale` or
    `row_scale` multiplies (IA3, Liu et al. 2022, arXiv:2205.05638); `rows` replaces single rows by index (trainable
    tokens); `appended` [new, hidden] and then `mean_rows` copies of the mean row follow the last row; `bias` is added
    (LoRA with a bias).
    """

    replacement: torch.Tensor | None = None
    principal: int = 0
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    appended: torch.Tensor | None = None
    mean_rows: int = 0
    bias: torch.Tensor | None = None

    @property
    def is_everywhere(self) -> bool:
        """Whether it changes the parameter's values a little everywhere, instead of replacing or adding rows."""
        everywhere = (self.factors, self.magnitude, self.column_scale, self.row_scale)
        return any(part is not None for part in everywhere)


@dataclass(frozen=True)
class AdapterWeights:
    """A merge's view of an adapter."""

    updates: dict[str, Update]
    """By parameter name in the base model, such as "model.layers.0.self_attn.q_proj.weight"."""
    head: Literal["as the embedding", "on its own", "if changed"] = "if changed"
    """What a tied head does: it takes the embedding's change, is untied, or is untied where one of the two changed."""


def updated(weight: torch.Tensor, update: Update, *, transposed: bool = False, in_place: bool = False) -> torch.Tensor:
    """The parameter with the adapter in it, in fp32.

    `transposed` says that the parameter is stored [in, out] (GPT-2's Conv1D); it is returned in the same orientation.
    `in_place` says that `weight` may be overwritten, which saves its copy.
    """
    if update.replacement is not None:
        weight, in_place = update.replacement, False
    result = weight.to(torch.float32, copy=not in_place)
    if transposed:
        result = result.T.contiguous()
    if update.principal:
        left, values, right = torch.linalg.svd(result, full_matrices=False)
        rank = update.principal
        result.addmm_(left[:, :rank] * values[:rank], right[:rank], alpha=-1)
    if update.factors is not None:
        a, b = update.factors
        result.addmm_(b, a, alpha=update.scaling)
    if update.magnitude is not None:
        result.mul_((update.magnitude / torch.linalg.vector_norm(result, dim=1)).unsqueeze(1))
    if update.column_scale is not None:
        result.mul_(update.column_scale)
    if update.row_scale is not None:
        result.mul_(update.row_scale if result.dim() == 1 else update.row_scale.unsqueeze(1))
    for index, row in update.rows.items():
        result[index] = row
    if update.appended is not None:
        result = torch.cat([result, update.appended])
    if update.mean_rows:
        mean = result.mean(0, keepdim=True)
        result = torch.cat([result, mean.expand(update.mean_rows, *mean.shape[1:])])
    if update.bias is not None:
        result.add_(update.bias)
    return result.T.contiguous() if transposed else result


def open_adapter(folder: Path) -> AdapterWeights:
    """Reads a LoRA or IA3 adapter.

    Raises RunError, naming what is in the way, when the folder holds no adapter or several, or one that changes the
    model in a way that a merge cannot express.
    """
    config = adapter_config(folder)
    if not isinstance(config, LoraConfig | IA3Config):
        raise RunError(Problem(str(folder), f"a {config.peft_type.value} adapter has no weights to merge"))
    problems = [Problem(str(folder), text) for text in _obstacles(config)]
    tensors = tensors_of(folder / WEIGHTS)
    modules = _by_module(tensors)
    updates: dict[str, Update] = {}
    for module, parts in modules.items():
        try:
            updates |= _ia3(module, parts, config) if isinstance(config, IA3Config) else _lora(module, parts, config)
        except KeyError as error:
            problems.append(Problem(str(folder), f"tensor {module}.{error.args[0]} is of a kind that cannot be merged"))
    if problems:
        raise RunError(problems)
    # peft trains rows of a tied embedding for the head as well.
    together = getattr(config, "ensure_weight_tying", False) or getattr(config, "trainable_token_indices", None)
    return AdapterWeights(updates, "as the embedding" if together else "if changed")


def adapter_config(folder: Path) -> PeftConfig:
    """The adapter's config; RunError when there is none, or when the folder holds several adapters."""
    if not (folder / CONFIG).exists():
        several = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        found = f"several adapters ({', '.join(several)}): name one of their folders" if several else "no adapter"
        raise RunError(Problem(str(folder), f"{found} (there is no {CONFIG})"))
    if not (folder / WEIGHTS).exists():
        raise RunError(Problem(str(folder), f"there is no {WEIGHTS}"))
    return PeftConfig.from_pretrained(str(folder))


def _obstacles(config: LoraConfig | IA3Config) -> Iterable[str]:
    for key, what in NOT_MERGEABLE.items():
        if getattr(config, key, None):
            yield f"the adapter's {key} {what}; this cannot be merged"
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and (start in ("olora", "corda", "lora_ga") or start.startswith("pissa_")):
        yield (
            f"the adapter was initialised with {start}, which changes the base weights, and was saved without "
            "converting it to plain LoRA (peft: path_initial_model_for_weight_conversion); this cannot be merged"
        )


def _by_module(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{"model.layers.0.self_attn.q_proj": {"lora_A.weight": …, "lora_B.weight": …}}."""
    parts = ("lora_", "ia3_l", "base_layer.", "token_adapter.", "modules_to_save.")
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if ".original_module." in name:
            # peft saves the untrained twin of a resized embedding beside the trained one.
            continue
        begin = min((name.find(f".{part}") for part in parts if f".{part}" in name), default=name.rfind("."))
        grouped.setdefault(name[:begin], {})[name[begin + 1 :]] = tensor
    return grouped


def _lora(module: str, parts: dict[str, torch.Tensor], config: LoraConfig) -> dict[str, Update]:
    """The updates of one module's tensors; KeyError with the name of a tensor that is not understood."""
    weight: dict[str, Any] = {}
    bias: dict[str, Any] = {}
    for name, tensor in parts.items():
        value = tensor.to(torch.float32)
        match name:
            case "weight" | "base_layer.weight" | "modules_to_save.weight":
                weight["replacement"] = value
            case "bias" | "base_layer.bias" | "modules_to_save.bias":
                bias["replacement"] = value
            case "lora_A.weight":
                weight["factors"] = (value, parts["lora_B.weight"].to(torch.float32))
            case "lora_embedding_A":
                # An embedding [rows, hidden] adds (B A)^T, with A [rank, rows] and B [hidden, rank].
                weight["factors"] = (parts["lora_embedding_B"].to(torch.float32).T, value.T)
            case "lora_magnitude_vector":
                weight["magnitude"] = value
            case "lora_B.bias":
                bias["bias"] = value * _scaling(module, parts, config)
            case "token_adapter.trainable_tokens_delta":
                weight["rows"] = dict(zip(_token_rows(module, config), value, strict=True))
            case "lora_B.weight" | "lora_embedding_B":
                pass
            case _:
                raise KeyError(name)
    if "factors" in weight:
        weight["scaling"] = _scaling(module, parts, config)
        if config.init_lora_weights == "pissa":
            weight["principal"] = weight["factors"][0].shape[0]
    updates = {}
    if weight:
        updates[f"{module}.weight"] = Update(**weight)
    if bias:
        updates[f"{module}.bias"] = Update(**bias)
    return updates


def _scaling(module: str, parts: dict[str, torch.Tensor], config: LoraConfig) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rank stabilisation (Kalajdzievski 2023, arXiv:2312.03732)."""
    rank = (parts["lora_A.weight"] if "lora_A.weight" in parts else parts["lora_embedding_A"]).shape[0]
    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha))
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _token_rows(module: str, config: LoraConfig) -> list[int]:
    """The vocabulary rows that a module trained, as the config names them."""
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        return next((rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")), [])
    return list(indices or [])


def _ia3(module: str, parts: dict[str, torch.Tensor], config: IA3Config) -> dict[str, Update]:
    """A scale on the input of a feed-forward module [1, in], on the output of the others [out, 1]."""
    updates: dict[str, Update] = {}
    for name, tensor in parts.items():
        value = tensor.to(torch.float32)
        match name:
            case "ia3_l" if value.shape[0] == 1:
                updates[f"{module}.weight"] = Update(column_scale=value.reshape(-1))
            case "ia3_l":
                scale = value.reshape(-1)
                updates[f"{module}.weight"] = Update(row_scale=scale)
                updates[f"{module}.bias"] = Update(row_scale=scale)
            case "weight" | "bias":
                updates[f"{module}.{name}"] = Update(replacement=value)
            case _:
                raise KeyError(name)
    return updates
