"""The rules between the values of a recipe that each are right alone."""

from collections.abc import Iterator

from qtune.recipe.faults import Fault
from qtune.recipe.schema import (
    IA3,
    OWN_STARTS,
    Adapter,
    Data,
    FourBit,
    HubSource,
    Lora,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Quantization,
    Recipe,
    Training,
    Unquantized,
)


def conflicts(recipe: Recipe) -> Iterator[Fault]:
    """Pairs of values that cannot work together, each with its reason."""
    yield from _within_adapter(recipe.adapter)
    if isinstance(recipe.adapter, Lora):
        yield from _of_lora(recipe.adapter, recipe.quantization)
    yield from _of_adapter_and_run(recipe)
    yield from conflicts_of_run(recipe)
    yield from _of_layers(recipe)
    yield from _of_dequantized(recipe)


def conflicts_of_run(recipe: Recipe) -> Iterator[Fault]:
    """Those that no base, quantization or adapter has a part in."""
    yield from _of_streaming(recipe.data)
    yield from _of_validation(recipe.data, recipe.training)
    yield from _within_training(recipe.training)


def _within_adapter(adapter: Adapter) -> Iterator[Fault]:
    if isinstance(adapter, PTuning) and adapter.encoder == "mlp" and adapter.encoder_layers is not None:
        yield Fault(("adapter", "encoder_layers"), 'only the "lstm" encoder has layers to count; remove the key')
    if isinstance(adapter, PTuning) and adapter.encoder == "mlp" and adapter.encoder_dropout:
        yield Fault(("adapter", "encoder_dropout"), 'only the "lstm" encoder has dropout; remove the key')
    if isinstance(adapter, PrefixTuning) and adapter.encoder_hidden_size is not None and not adapter.projection:
        yield Fault(("adapter", "encoder_hidden_size"), "only the projection has a width; set projection = true")
    if isinstance(adapter, PrefixTuning) and adapter.projection and adapter.initialization != "random":
        yield Fault(
            ("adapter", "initialization"),
            "the projection computes something else from what it starts with; set projection = false or remove the key",
        )
    text, initialization = getattr(adapter, "text", None), getattr(adapter, "initialization", None)
    if adapter.start_from:
        given = {"initialization": initialization in OWN_STARTS, "text": text is not None}
        for key in (key for key, is_given in given.items() if is_given):
            yield Fault(
                ("adapter", key), "an adapter that starts from a run has the values of that one; remove the key"
            )
    elif (initialization == "text") != (text is not None):
        yield Fault(("adapter", "text"), 'initialization = "text" and a text belong together; give both or neither')
    elif text is not None and not text.replace("\0", "").strip():
        yield Fault(("adapter", "text"), "says nothing; give a sentence that says what is wanted")
    if isinstance(adapter, PromptTuning | PTuning):
        yield from _within_soft_prompt(adapter)
    if isinstance(adapter, IA3) and adapter.feedforward_modules and not adapter.target_modules:
        yield Fault(("adapter", "feedforward_modules"), "names a part of target_modules; give target_modules too")


def _within_soft_prompt(adapter: PromptTuning | PTuning) -> Iterator[Fault]:
    if adapter.residual:
        return
    if adapter.vector_rate != 1:
        yield Fault(
            ("adapter", "vector_rate"),
            "without residual there is one rate, training.learning_rate; set residual = true or remove the key",
        )
    if adapter.vector_scale != 1:
        yield Fault(("adapter", "vector_scale"), "only vectors of a residual have a size; set residual = true")
    if isinstance(adapter, PTuning) and adapter.initialization != "random":
        yield Fault(
            ("adapter", "initialization"),
            "the encoder computes something else from the vectors that it is given, so that they would not start as "
            "words; set residual = true or remove the key",
        )
    if isinstance(adapter, PromptTuning) and adapter.encoder_hidden_size is not None:
        yield Fault(("adapter", "encoder_hidden_size"), "only residual has a width; set residual = true")


def _of_lora(adapter: Lora, quantization: Quantization) -> Iterator[Fault]:
    """How it starts and what it is put on decide what is possible."""
    if "lm_head" in adapter.target_modules and adapter.target_modules != "all-linear":
        yield Fault(
            ("adapter", "target_modules"),
            "the loss reads the LM head's weight directly, so an adapter on it would not be trained; remove lm_head",
        )
    if adapter.initialization == "pissa" and not isinstance(quantization, Unquantized):
        yield Fault(
            ("adapter", "initialization"),
            f"PiSSA moves part of the base into the adapter, and a {quantization.kind} base cannot be "
            'rewritten without rounding it again; use "loftq", "eva", or [quantization] kind = "none"',
        )
    if adapter.initialization == "loftq" and not isinstance(quantization, FourBit):
        yield Fault(
            ("adapter", "initialization"),
            'LoftQ corrects the error of a 4-bit base; use it with [quantization] kind = "nf4" or "fp4"',
        )
    if adapter.rslora and adapter.initialization == "pissa":
        yield Fault(("adapter", "rslora"), "not together with PiSSA, whose difference could not be saved")
    if adapter.dora and adapter.initialization in ("pissa", "loftq", "eva"):
        yield Fault(("adapter", "dora"), f"not together with {adapter.initialization} initialization")


def _of_adapter_and_run(recipe: Recipe) -> Iterator[Fault]:
    """What the kind of adapter rules out elsewhere."""
    adapter, training = recipe.adapter, recipe.training
    rate = adapter.usual_rate[0] if training.learning_rate == "auto" else training.learning_rate
    if rate * training.weight_decay >= 1:
        yield Fault(
            ("training", "weight_decay"),
            f"each step takes learning_rate x weight_decay = {rate * training.weight_decay:g} of a weight away, which "
            "must be below 1",
        )
    if adapter.export == "alone" and recipe.output.gguf is not None:
        yield Fault(
            ("output", "gguf"),
            f"a GGUF file holds a whole model, and {adapter.kind} cannot be put into one; its adapter is exported "
            "alone. Remove the key",
        )
    if recipe.data.packing and adapter.prompt_length:
        yield Fault(
            ("data", "packing"),
            "a soft prompt stands once before each packed row, so only its first document would see it, and peft drops "
            f"the positions that keep documents apart; not with {adapter.kind}",
        )


def _of_layers(recipe: Recipe) -> Iterator[Fault]:
    """Only what is read through a layer's own product may wait elsewhere."""
    where = recipe.memory.layers
    if where == "device":
        return
    if not isinstance(recipe.quantization, FourBit):
        yield Fault(
            ("memory", "layers"),
            f'only 4-bit layers wait in another place, and these are {recipe.quantization.kind}; use "device"',
        )
    if isinstance(recipe.adapter, Lora) and recipe.adapter.dora:
        yield Fault(("memory", "layers"), 'DoRA reads the base\'s weights beside their products; use "device"')


def _of_dequantized(recipe: Recipe) -> Iterator[Fault]:
    """Where layers wait elsewhere, or stay peft's, the key has no effect, and the plan says why: a run that went on so
    would otherwise be refused for what it had settled by itself."""
    if recipe.memory.keep_dequantized not in ("auto", False) and not isinstance(recipe.quantization, FourBit):
        words = (
            f"only 4-bit weights are dequantized, and quantization.kind is {recipe.quantization.kind}; remove the key"
        )
        yield Fault(("memory", "keep_dequantized"), words)


def _of_streaming(data: Data) -> Iterator[Fault]:
    """What needs all rows at once."""
    if data.streaming is not True:
        return
    if data.packing:
        yield Fault(
            ("data", "streaming"),
            "packing fits rows together by the lengths of all of them; set packing = false or streaming = false",
        )
    entries = data.train if isinstance(data.train, tuple) else (data.train,)
    if any(getattr(entry, "weight", 1.0) != 1.0 for entry in entries):
        yield Fault(("data", "streaming"), "a stream gives each row once an epoch; remove weight from the sources")
    if any(isinstance(entry, HubSource) or str(entry).startswith("hub:") for entry in entries):
        yield Fault(
            ("data", "streaming"),
            "a hub dataset is fetched to this disk whole; name files, or remove the key",
        )


def _of_validation(data: Data, training: Training) -> Iterator[Fault]:
    if data.validation_seed is not None and not (isinstance(data.validation, float) and data.validation):
        yield Fault(("data", "validation_seed"), "only a share of the training rows is drawn; remove the key")
    is_measured = training.eval_every != "never" and data.validation != 0
    for key, asks in (("patience", training.patience is not None), ("result", training.result == "best")):
        if asks and not is_measured:
            yield Fault(
                ("training", key),
                "needs a validation loss: set rows aside with data.validation, and training.eval_every",
            )
    if training.evaluate_first and not is_measured:
        yield Fault(("training", "evaluate_first"), "needs validation rows: set some aside with data.validation")


def _within_training(training: Training) -> Iterator[Fault]:
    if training.steps is not None and "epochs" in training.model_fields_set:
        yield Fault(("training", "steps"), "the run ends after steps or after epochs; give one of them")
    if training.skip_outlier_steps and training.log_every != 1:
        yield Fault(
            ("training", "skip_outlier_steps"),
            "a step is compared with each of those before it, which are read from the metrics; set log_every = 1",
        )
    if isinstance(training.micro_batch_size, int) and training.batch_size % training.micro_batch_size:
        yield Fault(
            ("training", "micro_batch_size"),
            f"batch_size = {training.batch_size} must be a whole number of micro-batches",
        )
