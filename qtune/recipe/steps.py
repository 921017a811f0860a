"""How many steps a run begins with and how many rows are held out, by its rows; and runs of so few that little can come
of them, said before one wonders why. Pure arithmetic."""

import math

from qtune.recipe.schema import Adapter, AdapterTable, Data, PromptTuning, PTuning, Training

FEW_STEPS = 30
"""Optimizer steps of a run below which that is said. Ours: no source names one. AdamW moves a number by about the
learning rate in each step, so that their number bounds how far a run can come."""
SMALLEST_BATCH = 4
"""Rows of a step that are still proposed."""
FEW_STEPS_OF_A_PROMPT = 200
"""The same for a soft prompt, which has farther to go. `tools/soft_prompt_runs.jsonl`: 288 rows of the quickstart left
prompt tuning (residual, from a text) with a held-out loss of 0.124 in 72 steps, 0.106 in 144 and 0.076 in 288; before,
with the same settings, 0.214 in 36 (NOTES.md). The built-in model, one seed, bfloat16 on a CPU."""

AIM = 100
"""Steps that few rows are seen again for, LORA_PASSES[1] times at most."""
AIM_OF_A_PROMPT = 500
LORA_PASSES = (3, 5)
FEWEST = 5
"""Rows, or steps, below which no interval is given: with fewer it is a guess about the shape of their distribution."""
LARGEST_SHARE = 0.2
"""Of few rows, that is proposed to be held out."""
SOME_ROWS, MANY_ROWS, ALL_BUT_TOO_MANY = 500, 2_000, 10_000
"""Rows from which a step takes 16 of them; from which two passes are enough; from which one is."""


def first_steps(adapter: type[AdapterTable], rows: int) -> tuple[int, int]:
    """(epochs, batch size) that a run begins with: what README.md advises for so many rows. Advice, no measurement.

    rows: that are trained on, at least one.
    """
    if issubclass(adapter, PromptTuning | PTuning):
        # Steps count more than rows: small ones, as long as an epoch is not many times what is needed.
        batch = next((size for size in (16, 8, 4) if rows >= size * AIM_OF_A_PROMPT), 2)
        return max(1, math.ceil(AIM_OF_A_PROMPT / -(-rows // batch))), batch
    if rows >= SOME_ROWS:
        return 1 if rows > ALL_BUT_TOO_MANY else 2 if rows > MANY_ROWS else 3, 16
    least, most = LORA_PASSES
    batch = 8 if least * -(-rows // 8) >= AIM else 4
    per_epoch = -(-rows // batch)
    epochs = min(most, max(least, math.ceil(AIM / per_epoch)))
    return max(epochs, math.ceil(FEW_STEPS / per_epoch)), batch


def steps_of(training: Training, rows: int) -> int:
    """Optimizer steps of a run over so many rows, packed ones where they are packed."""
    return training.steps or math.ceil(training.epochs * -(-rows // training.batch_size))


def kept_checkpoints(training: Training, rows: int) -> int:
    """How many checkpoints will lie on the disk: training.keep_checkpoints, or as many as the run makes by its steps
    and one that the clock may add. A large number is how people say that they want them all.

    rows: that are trained on.
    """
    steps, per_epoch = steps_of(training, rows), max(1, -(-rows // training.batch_size))
    every = per_epoch if training.checkpoint_every == "epoch" else training.checkpoint_every
    by_clock = 0 if training.checkpoint_minutes is None else 1
    return min(training.keep_checkpoints, -(-steps // every) + by_clock)


def held_out_rows(share: float, rows: int) -> int:
    """How many of so many rows a share sets aside for validation: one at least, and none where there is no share."""
    return max(1, round(share * rows)) if share and rows else 0


def first_share(rows: int) -> float:
    """The share of so many rows that a recipe begins to hold out with: the key's default, and more of few rows, for of
    fewer than FEWEST nothing can be told. The one row that there is cannot be held out."""
    if rows < 2:
        return 0.0
    return max(float(Data.model_fields["validation"].default), min(_share_of_fewest(rows), LARGEST_SHARE))


def _share_of_fewest(rows: int) -> float:
    """The share of so many rows that FEWEST are, in whole hundredths."""
    return math.ceil(100 * FEWEST / rows) / 100


def few_held_out(data: Data, rows: int, held_out: int) -> str | None:
    """A sentence on so few rows for validation that they tell no change from noise, with what would; None for others,
    and where there are no more to hold out: that there are few rows is then a finding of the gate.

    rows: all of data.train where a share of them is held out. held_out: that the losses are measured on.
    """
    if (
        isinstance(data.validation, float)
        and data.validation
        and rows > 1
        and (held_out == 0 or held_out > max(2 * held_out_rows(data.validation, rows), FEWEST))
    ):
        return (
            f"data: {held_out:,} of {rows:,} rows are held out where data.validation = {data.validation:g} means "
            f"{held_out_rows(data.validation, rows):,}, for rows that ask the same first stay together; a file of its "
            "own as data.validation holds out what you choose"
        )
    if not 0 < held_out < FEWEST:
        return None
    more = f"{FEWEST} are enough"
    if isinstance(data.validation, float):
        if (share := _share_of_fewest(rows)) > LARGEST_SHARE:
            return None
        more = f"data.validation = {share:g} makes {held_out_rows(share, rows)}"
    what = "1 row is" if held_out == 1 else f"{held_out} rows are"
    return f"data: {what} held out, too few to tell a change of their loss from noise; {more}"


def few_steps(training: Training, rows: int) -> str | None:
    """A sentence on a run of few steps, with values that make more of them; None for others.

    rows: that are trained on, packed ones where they are packed. Steps that the recipe names itself are meant.
    """
    per_epoch = -(-rows // training.batch_size)
    steps = math.ceil(training.epochs * per_epoch)
    if training.steps is not None or not rows or steps >= FEW_STEPS:
        return None
    epochs = math.ceil(FEW_STEPS / per_epoch)
    ways = [f"training.epochs = {epochs} makes {epochs * per_epoch}"]
    smaller = [size for size in (2**power for power in range(2, 20)) if SMALLEST_BATCH <= size < training.batch_size]
    for size in reversed(smaller):
        if (more := math.ceil(training.epochs * -(-rows // size))) >= FEW_STEPS:
            ways.insert(0, f"training.batch_size = {size} makes {more}")
            break
    what = "step is" if steps == 1 else "steps are"
    return f"training: {steps} {what} few ({rows:,} rows, {training.batch_size} in a step); {', '.join(ways)}"


def few_steps_of_a_prompt(adapter: Adapter, training: Training, rows: int) -> str | None:
    """A sentence on a soft prompt that is trained in few steps of many rows, with values that make more of the same
    rows; None for others. Steps that the recipe names count too, for their number is often taken from a LoRA's.

    rows: that are trained on.
    """
    batch = training.batch_size
    steps = steps_of(training, rows)
    if not isinstance(adapter, PromptTuning | PTuning) or not rows or batch == 1 or steps >= FEW_STEPS_OF_A_PROMPT:
        return None
    size = next((size for size in range(batch // 2, 1, -1) if steps * batch // size >= FEW_STEPS_OF_A_PROMPT), 1)
    named = f", training.steps = {steps * batch // size}" if training.steps is not None else ""
    what = "step is" if steps == 1 else "steps are"
    return (
        f"training: {steps} {what} few for a soft prompt, which may learn by steps more than by rows; with "
        f"training.batch_size = {size}{named} the same rows may take it further (the quickstart's loss on "
        "held-out rows, after as many rows each: 0.124 with 4 rows a step, 0.106 with 2, 0.076 with 1)"
    )
