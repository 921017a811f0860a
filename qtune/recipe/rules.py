"""The rules between the values of a recipe that each are right alone."""

from collections.abc import Iterator

from qtune.recipe.faults import Fault
from qtune.recipe.schema import IA3, FourBit, Lora, PrefixTuning, PromptTuning, PTuning, Recipe, Unquantized


def conflicts(recipe: Recipe) -> Iterator[Fault]:
    """Pairs of values that cannot work together, each with its reason."""
    adapter, training = recipe.adapter, recipe.training
    quantized = not isinstance(recipe.quantization, Unquantized)
    if not adapter.checkpointable and training.gradient_checkpointing is True:
        yield Fault(
            ("training", "gradient_checkpointing"),
            f"{adapter.kind} hands its keys and values over in the cache, which checkpointing turns off; "
            'use false or "auto"',
        )
    if adapter.export == "alone" and recipe.output.gguf is not None:
        yield Fault(
            ("output", "gguf"),
            f"a GGUF file holds a whole model, and {adapter.kind} cannot be put into one; its adapter is exported "
            "alone. Remove the key",
        )
    if isinstance(adapter, PTuning) and adapter.encoder == "mlp" and adapter.encoder_layers is not None:
        yield Fault(("adapter", "encoder_layers"), 'only the "lstm" encoder has layers to count; remove the key')
    if isinstance(adapter, PTuning) and adapter.encoder == "mlp" and adapter.encoder_dropout:
        yield Fault(("adapter", "encoder_dropout"), 'only the "lstm" encoder has dropout; remove the key')
    if isinstance(adapter, PrefixTuning) and adapter.encoder_hidden_size is not None and not adapter.projection:
        yield Fault(("adapter", "encoder_hidden_size"), "only the projection has a width; set projection = true")
    if isinstance(adapter, PromptTuning) and (adapter.initialization == "text") != (adapter.text is not None):
        yield Fault(("adapter", "text"), 'initialization = "text" and a text belong together; give both or neither')
    if isinstance(adapter, Lora):
        if "lm_head" in adapter.target_modules and adapter.target_modules != "all-linear":
            yield Fault(
                ("adapter", "target_modules"),
                "the loss reads the LM head's weight directly, so an adapter on it would not be trained; "
                "remove lm_head",
            )
        if adapter.initialization == "pissa" and quantized:
            yield Fault(
                ("adapter", "initialization"),
                f"PiSSA moves part of the base into the adapter, and a {recipe.quantization.kind} base cannot be "
                'rewritten without rounding it again; use "loftq", "eva", or [quantization] kind = "none"',
            )
        if adapter.initialization == "loftq" and not isinstance(recipe.quantization, FourBit):
            yield Fault(
                ("adapter", "initialization"),
                'LoftQ corrects the error of a 4-bit base; use it with [quantization] kind = "nf4" or "fp4"',
            )
        if adapter.rslora and adapter.initialization == "pissa":
            yield Fault(("adapter", "rslora"), "not together with PiSSA, whose difference could not be saved")
        if adapter.dora and adapter.initialization in ("pissa", "loftq", "eva"):
            yield Fault(("adapter", "dora"), f"not together with {adapter.initialization} initialization")
    if adapter.start_from and getattr(adapter, "initialization", None) in ("pissa", "loftq", "eva", "text"):
        yield Fault(("adapter", "initialization"), "an adapter that starts from a run has its values; remove one")
    if isinstance(adapter, IA3) and adapter.feedforward_modules and not adapter.target_modules:
        yield Fault(("adapter", "feedforward_modules"), "names a part of target_modules; give target_modules too")
    if recipe.data.packing and adapter.prompt_length:
        yield Fault(
            ("data", "packing"),
            "a soft prompt stands once before each packed row, so only its first document would see it, and peft drops "
            f"the positions that keep documents apart; not with {adapter.kind}",
        )
    is_measured = training.eval_every != "never" and recipe.data.validation != 0
    for key, asks in (("patience", training.patience is not None), ("result", training.result == "best")):
        if asks and not is_measured:
            yield Fault(
                ("training", key),
                "needs a validation loss: set rows aside with data.validation, and training.eval_every",
            )
    if training.evaluate_first and not is_measured:
        yield Fault(("training", "evaluate_first"), "needs validation rows: set some aside with data.validation")
    if training.steps is not None and "epochs" in training.model_fields_set:
        yield Fault(("training", "steps"), "the run ends after steps or after epochs; give one of them")
    if isinstance(training.micro_batch_size, int) and training.batch_size % training.micro_batch_size:
        yield Fault(
            ("training", "micro_batch_size"),
            f"batch_size = {training.batch_size} must be a whole number of micro-batches",
        )
