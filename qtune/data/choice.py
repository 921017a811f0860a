"""Which rows are used: the share that is set aside for validation, and how often each source's rows are seen."""

import numpy as np
from datasets import Dataset

from qtune.recipe.steps import LARGEST_SHARE, held_out_rows

GROUPS = ("first_prompt_hash", "row_prompt_hash")
"""By which rows are drawn: the examples of a row have either in common, and so have rows with one prompt. The second is
for rows that begin alike, as with one greeting or example: too few of them could be set aside by the first."""


def rows_set_aside(train: Dataset, share: float, seed: int) -> np.ndarray:
    """The rows set aside: those whose prompts hash lowest under the seed, as `prompts_set_aside` says.

    Equal rows hash equally, so that a duplicate never stands on both sides of the split, and what a row begins with is
    asked on the same side as the rest of it.
    """
    if not share or not len(train):
        return np.array([], dtype=np.int64)
    wanted, chosen = held_out_rows(share, len(train)), np.array([], dtype=np.int64)
    for group in GROUPS:
        # By prompt: the same question must not be in both parts, whatever its answers are.
        hashes = np.asarray(train.with_format("numpy")[group][:]).astype(np.uint64)
        order = mixed(hashes, seed)
        prompts = prompts_set_aside(*np.unique(order, return_counts=True), wanted, len(train))
        chosen = np.flatnonzero(np.isin(order, prompts))
        if len(chosen) >= wanted:
            break
    return chosen


def prompts_set_aside(
    prompts: np.ndarray, rows: np.ndarray, wanted: int, total: int, most: int | None = None
) -> np.ndarray:
    """Of prompts, as their hashes ascend, those whose rows are set aside: the first ones that `wanted` rows have.

    Rows with one prompt stay together. A prompt of so many that twice what is wanted, and a fifth of all, would be
    exceeded is left to training, and the next ones are taken: else one that nine in ten rows have ("write in my style")
    would take these rows from a run. So is one without which nothing would be left.

    rows: that each has. total: of all prompts. most: rows that may be set aside, where that is not as said.
    """
    most = max(2 * wanted, int(LARGEST_SHARE * total)) if most is None else most
    chosen, taken = [], 0
    for prompt, count in zip(prompts, rows.tolist(), strict=True):
        if taken >= wanted:
            break
        if taken + count <= most and taken + count < total:
            chosen.append(prompt)
            taken += count
    return np.array(chosen, dtype=prompts.dtype)


def mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random order of hashes under a seed. splitmix64 (Steele, Lea, Flood 2014, figure 17)."""
    order = values + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1))
    order = (order ^ (order >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    order = (order ^ (order >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return order ^ (order >> np.uint64(31))


def weighted_rows(weights: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers under weights: each row as often as the whole part says, and a random share for the rest."""
    repeats = np.floor(weights).astype(np.int64)
    generator = np.random.default_rng(seed)
    for weight in np.unique(weights % 1):
        rows = np.flatnonzero(weights % 1 == weight)
        extra = round(float(weight) * len(rows))
        repeats[generator.permutation(rows)[:extra]] += 1
    return np.repeat(np.arange(len(weights)), repeats)
