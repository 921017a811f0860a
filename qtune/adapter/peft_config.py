"""A recipe's adapter table -> peft's configuration."""

from typing import Any

from peft import (
    EvaConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
)

from qtune.recipe.schema import IA3, Adapter, Lora, PrefixTuning, PromptTuning, PTuning

LSTM_LAYERS = 2
"""Layers of the p-tuning LSTM where the recipe gives none; the paper's encoder (arXiv:2103.10385, section 3.2)."""


def peft_config(adapter: Adapter) -> PeftConfig:
    """peft's words for our adapter. Defaults of peft that matter are spelled out: they move between versions."""
    match adapter:
        case Lora():
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=adapter.target_modules
                if isinstance(adapter.target_modules, str)
                else list(adapter.target_modules),
                use_rslora=adapter.rslora,
                use_dora=adapter.dora,
                # LoftQ starts from zero and is filled in afterwards, when the base is there to compare with.
                init_lora_weights=True if adapter.initialization in ("default", "loftq") else adapter.initialization,
                # rho = 1: every layer keeps the rank of the recipe, so that its memory is the one that was predicted.
                eva_config=EvaConfig(rho=1.0) if adapter.initialization == "eva" else None,
                bias="none",
            )
        case PTuning():
            is_lstm = adapter.encoder == "lstm"
            return PromptEncoderConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=adapter.virtual_tokens,
                encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM
                if is_lstm
                else PromptEncoderReparameterizationType.MLP,
                encoder_hidden_size=adapter.encoder_hidden_size,
                # peft warns when the MLP is given another number of layers than its fixed ones, and ignores it.
                encoder_num_layers=(adapter.encoder_layers or LSTM_LAYERS) if is_lstm else 2,
                encoder_dropout=adapter.encoder_dropout,
            )
        case PromptTuning():
            # A text start is filled in afterwards: peft would want the tokenizer's path in the saved configuration.
            sample = adapter.initialization == "vocabulary"
            return PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=adapter.virtual_tokens,
                prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB if sample else PromptTuningInit.RANDOM,
            )
        case PrefixTuning():
            return PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=adapter.virtual_tokens,
                prefix_projection=adapter.projection,
                encoder_hidden_size=adapter.encoder_hidden_size,
            )
        case IA3():
            given: dict[str, Any] = {}
            if adapter.target_modules is not None:
                given["target_modules"] = list(adapter.target_modules)
                given["feedforward_modules"] = list(adapter.feedforward_modules or ())
            return IA3Config(task_type="CAUSAL_LM", **given)
