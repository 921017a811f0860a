"""What earlier versions of transformers and TRL hold in memory where the installed ones hold something else.

The versions were read in the released wheels: transformers 4.45.2, 4.46.3, 4.47.1, 4.48.3, 4.49.0, 4.53.3,
4.54.1, 4.57.6, 5.0.0 and TRL 0.14.0, 0.15.2. For traces alone: nothing here computes a model's numbers.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import sdpa_attention

Version = tuple[int, ...]

OWN_TYPE_UNTIL: dict[str, Version] = {"gpt2": (4, 48), "opt": (4, 48), "stablelm": (4, 48), "gpt_neox": (4, 49)}
"""Before: these score a shifted copy of the logits in the model's own type (models/gpt2/modeling_gpt2.py)."""
FP32_LOGITS_UNTIL: Version = (4, 46)
"""Before: the model itself makes its logits fp32 and scores a shifted copy of them (4.45.2, modeling_llama.py)."""
FP32_LOGITS_LATER: dict[str, Version] = {"mistral": (4, 48), "granite": (4, 48), "starcoder2": (4, 47)}
"""Before, in these classes (4.47.1, modeling_mistral.py, `MistralForCausalLM.forward`)."""
SHIFTED_LOGITS_UNTIL: Version = (4, 49)
"""Before: the loss copies the logits without their last position; since, labels are shifted (loss/loss_utils.py)."""
GQA_SINCE: Version = (4, 54)
"""Before: keys and values are repeated for every query head (integrations/sdpa_attention.py)."""
FUSED_EXPERTS_SINCE: Version = (5, 0)
"""Before: each expert is a few linear layers, which bitsandbytes quantizes (models/mixtral/modeling_mixtral.py)."""
PLAIN_CHECKPOINTS_SINCE: Version = (5, 0)
"""Before: gradient checkpointing is re-entrant unless told otherwise (modeling_utils.py)."""
ACCURACY_SINCE: Version = (0, 15)
"""TRL's SFTTrainer copies the logits once more, for the token accuracy (trainer/sft_trainer.py, `compute_loss`)."""

EXPERTS = {"mixtral": "MixtralExperts", "qwen2_moe": "Qwen2MoeExperts", "qwen3_moe": "Qwen3MoeExperts",
           "olmoe": "OlmoeExperts"}  # fmt: skip
"""model_type -> the class that holds its experts in the installed version."""


class LinearExperts(nn.Module):
    """Experts as linear layers, in a loop, tokens spread evenly among them.

    forward: hidden [tokens, hidden], top_k_index and top_k_weights [tokens, top_k] -> [tokens, hidden].
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        names = ("w1", "w3", "w2") if config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        count = getattr(config, "num_local_experts", None) or config.num_experts
        self.names, self.activate = names, [ACT2FN[config.hidden_act]]  # in a list: no child among the experts
        for number in range(count):
            expert = nn.Module()
            for name, sizes in zip(names, ((hidden, width), (hidden, width), (width, hidden)), strict=True):
                expert.add_module(name, nn.Linear(*sizes, bias=False))
            self.add_module(str(number), expert)

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        experts = list(self.children())
        share = hidden.shape[0] * top_k_index.shape[-1] // len(experts)
        for expert in experts:
            rows = torch.arange(min(share, hidden.shape[0]), device=hidden.device)
            gate, up, down = (getattr(expert, name) for name in self.names)
            current = hidden[rows]
            current = down(self.activate[0](gate(current)) * up(current)) * top_k_weights[rows, 0, None]
            result.index_add_(0, rows, current.to(hidden.dtype))
        return result


@contextlib.contextmanager
def as_in(version: Version, config: PretrainedConfig, attention: str) -> Iterator[None]:
    """Models built and run inside hold what those of that version do.

    attention: as the record names it. FlashAttention has never repeated keys and values, whatever the version.
    """
    patched: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    if attention == "flash_attention_2":
        patch(sdpa_attention, "use_gqa_in_sdpa", lambda *_: True)
    elif version < GQA_SINCE:
        patch(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False)
    if version < FUSED_EXPERTS_SINCE and config.model_type in EXPERTS:
        name = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
        __import__(name)
        patch(sys.modules[name], EXPERTS[config.model_type], LinearExperts)
    try:
        yield
    finally:
        for owner, name, value in reversed(patched):
            setattr(owner, name, value)


def install_loss_of(version: Version, model: Any) -> None:
    """Give a causal LM the loss of that version, computed inside its forward while hidden states and logits live."""
    kind = model.config.model_type
    if version < OWN_TYPE_UNTIL.get(kind, ()):
        model.loss_function = shifted_cross_entropy
        return
    if version < FP32_LOGITS_LATER.get(kind, FP32_LOGITS_UNTIL):
        model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits.float())
    if version < SHIFTED_LOGITS_UNTIL:
        model.loss_function = upcast_cross_entropy


def shifted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Mean cross-entropy of logits [rows, length, vocab], copied without their last position."""
    shifted = logits[..., :-1, :].contiguous()
    targets = labels[..., 1:].contiguous()
    return nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1))


def upcast_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The same in fp32; the caller still holds its logits."""
    logits = logits.float()
    return shifted_cross_entropy(logits, labels)


class TrainerLoss:
    """One call of the model by transformers.Trainer.

    widened: outputs are cast to fp32, as accelerate does under autocast (`convert_outputs_to_fp32`).
    accuracy: TRL's token accuracy is taken from a copy of the logits.
    """

    def __init__(self, widened: bool, accuracy: bool) -> None:
        self.widened, self.accuracy = widened, accuracy

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = model(**batch, use_cache=False)
        if self.widened:
            wide = outputs.logits.float()
            outputs["logits"] = wide
        if self.accuracy:
            shifted = outputs.logits[..., :-1, :].contiguous()
            shifted.argmax(dim=-1)
        return outputs.loss


class KeepsOutputs:
    """A training loop that holds the model's outputs, logits and cache included, until the step is over."""

    def __init__(self) -> None:
        self.outputs: Any = None

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.outputs = None
        outputs = model(**batch, use_cache=True)
        self.outputs = {key: value for key, value in outputs.items() if key != "loss"}
        return outputs.loss
