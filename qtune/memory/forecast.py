"""What a recipe will need on a device: the plan that a run makes there, and its step, traced."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qtune.errors import first_line
from qtune.memory.budget import budget_bytes, settled
from qtune.memory.cached import predicted
from qtune.memory.kept_dequantized import plan_at_first
from qtune.run.memory import PICTURED

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from qtune.device.present import Device
    from qtune.memory.allowance import Verdict
    from qtune.memory.longest import Rows
    from qtune.memory.predict import Prediction
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    """What a recipe will need on a device: the plan that `qtune run` makes there, and its step, traced."""

    plan: Plan
    rows: Rows
    prediction: Prediction
    budget_bytes: int
    """What may be spent: [memory] budget, or what was free when the question was asked."""

    @property
    def fits(self) -> bool:
        """Whether the step is sure to stay inside the budget."""
        return self.prediction.need.fits(self.budget_bytes)

    @property
    def verdict(self) -> Verdict:
        """Whether the step fits the budget, does not, or comes too close to say."""
        return self.prediction.need.verdict(self.budget_bytes)

    def to_json(self) -> dict[str, Any]:
        """The prediction of a run as it stands in memory.json, sizes in bytes."""
        plain = asdict(self.prediction)
        return {
            "device": self.plan.device.name,
            "micro_batch_size": self.plan.micro_batch_size,
            "longest": asdict(self.rows.longest),
            "known_from": self.rows.known_from,
            "needed_bytes": self.prediction.need.total_bytes,
            "verdict": self.verdict,
            "budget_bytes": self.budget_bytes,
            **{name: plain[name] for name in ("peak", "by_phase", "need", "paged_bytes", "phases", "timeline")},
        }

    def figures(self) -> dict[str, Any]:
        """For other programs: without the timeline, which is for pictures, and with whether it fits."""
        found = {name: value for name, value in self.to_json().items() if name not in PICTURED}
        return {**found, "fits": self.fits}


def forecast(
    config: PretrainedConfig,
    recipe: Recipe,
    device: Device,
    rows: Rows,
    tell: Callable[[str], None] = lambda words: None,
) -> Forecast:
    """The plan of `qtune run`, `profile` and `check`: on a card what it leaves open follows from memory, by tracing.

    tell: hears what is traced next.

    Raises:
        ModelError: no model can be built from the configuration, or the adapter does not fit it.
    """
    plan = plan_at_first(recipe, device, config, rows.longest.most)
    open_keys = (recipe.training.gradient_checkpointing, recipe.training.micro_batch_size)
    if device.kind == "cuda" or "auto" in open_keys:
        plan = settled(config, recipe, plan, rows.longest, tell)
    tell(f"{plan.micro_batch_size} x {rows.longest.length} tokens")
    prediction = predicted(config, recipe, plan, rows.longest)
    return Forecast(plan, rows, prediction, budget_bytes(recipe, plan))


def attempted(
    config: PretrainedConfig,
    recipe: Recipe,
    device: Device,
    rows: Rows,
    tell: Callable[[str], None] = lambda words: None,
) -> Forecast | str:
    """`forecast`; where the step cannot be traced, in words why: a run may fit all the same."""
    try:
        return forecast(config, recipe, device, rows, tell)
    except Exception as error:
        log.debug("the step could not be traced", exc_info=True)
        name, said = type(error).__name__, first_line(error)
        return name if said == name else f"{name}: {said}"
