"""Benchmarks of lm-evaluation-harness, where it is installed: the base and the tuned model on the same tasks.

The harness renders, asks and scores as it always does, without a chat template, so that its figures are those that
others publish; only the two models are ours. Tasks are names that it knows or YAML files of one's own
(github.com/EleutherAI/lm-evaluation-harness, docs/new_task_guide.md).
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftModel

from qtune import console
from qtune.device.present import one_sentence
from qtune.errors import InputError, Problem, RunError, first_line
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.identity import write_of_run
from qtune.run.measured_adapter import adapter_name
from qtune.tuned.generate import mend_generate
from qtune.tuned.load import LoadedRun, load_untuned, with_adapter
from qtune.tuned.precision import training_autocast
from qtune.tuned.task_scores import TaskScore, TaskScores, read_tasks

ROOM = (
    "As many questions are asked at once as training had rows (training.micro_batch_size); close what else takes memory"
)


def require_harness() -> None:
    """Asked before a model is loaded.

    Raises:
        InputError: lm-evaluation-harness is not installed.
    """
    if find_spec("lm_eval") is None:
        message = "needs lm-evaluation-harness, which is not installed: pip install 'qtune[tasks]' (or lm-eval)"
        raise InputError(Problem("--tasks", message))


def evaluate_tasks(
    run_dir: RunDir,
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    accepted: Sequence[str] = (),
) -> TaskScores:
    """Asks both models all of the tasks, and writes tasks.json into the run.

    fewshot: solved questions before each; None: as each task says. accepted: kinds of drift that it goes on with.

    Raises:
        InputError: the harness is missing, or a task is not known or cannot be had.
        RunError: the run has not ended, or is not what was trained.
    """
    require_harness()
    import lm_eval

    # Its own progress is shown; what it says of itself is not.
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    whole_adapter(run_dir)
    loaded = _loaded_tasks(tasks)
    run = load_untuned(run_dir, accepted=accepted)
    base = _asked(run, "base", loaded, fewshot, limit)
    adapted = with_adapter(run)
    if isinstance(adapted.model, PeftModel) and adapted.model.active_peft_config.is_prompt_learning:
        mend_generate(adapted.model)  # tasks that are answered in free text call it
    tuned = _asked(adapted, "tuned", loaded, fewshot, limit)
    result = TaskScores(lm_eval.__version__, fewshot, limit, tuple(_scores(base, tuned)), adapter_name(run_dir))
    run_dir.require_there()
    kept = None
    with suppress(RunError):  # what is damaged is replaced
        kept = read_tasks(run_dir)
    write_of_run(run_dir, run_dir.tasks_file, result)
    if kept is not None and result.loses(kept):
        console.say(f"{run_dir.tasks_file} had {kept.in_words}, and has {result.in_words} from now on")
    return result


def _loaded_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The harness's tasks, before a weight is read: a name that is wrong, or rows that cannot be had, end it here."""
    from lm_eval.tasks import TaskManager

    files = [str(Path(name).parent) for name in names if name.endswith((".yaml", ".yml"))]
    missing = [name for name in names if name.endswith((".yaml", ".yml")) and not Path(name).is_file()]
    if missing:
        raise InputError([Problem("--tasks", f"{name}: no such file") for name in missing])
    manager = TaskManager(include_path=files or None)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # the harness, datasets and the hub each say it in their own way
            message = f"{name}: cannot be had: {first_line(error)}"
            raise InputError(Problem("--tasks", message)) from error
    return found


def _asked(
    run: LoadedRun, name: str, tasks: Mapping[str, Any], fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Pads would stand between virtual tokens and the text (peft 0.21): with a soft prompt one question at a time.
    at_once = 1 if run.recipe.adapter.prompt_length else run.plan.micro_batch_size
    with console.progress(f"{name} model, {', '.join(tasks)}"), one_sentence(ROOM), training_autocast(run.plan):
        model = HFLM(pretrained=run.model, tokenizer=run.tokenizer, batch_size=at_once)
        found: dict[str, Any] = simple_evaluate(
            model, tasks=list(tasks.values()), num_fewshot=fewshot, limit=limit, bootstrap_iters=0
        )
    return found


def _scores(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in base["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            after = tuned["results"][task].get(key)
            is_figure = isinstance(value, float | int) and isinstance(after, float | int)
            if metric == "sample_len" or metric.endswith("_stderr") or not is_figure:
                continue
            rows = [_rows(one, task, metric, kind) for one in (base, tuned)]
            is_mean = all(_is_mean(of, given) for of, given in zip(rows, (value, after), strict=True))
            name = metric if kind in ("", "none") else f"{metric} ({kind})"
            scores.append(TaskScore(task, name, value, after, *(rows if is_mean else [])))
    return scores


def _rows(found: Mapping[str, Any], task: str, metric: str, kind: str) -> tuple[float, ...]:
    """The questions' values of a metric, in their order; none where they are no numbers."""
    samples = [one for one in found.get("samples", {}).get(task, []) if one.get("filter", kind) == kind]
    values = [one.get(metric) for one in sorted(samples, key=lambda one: one["doc_id"])]
    return tuple(map(float, values)) if all(isinstance(value, float | int) for value in values) else ()


def _is_mean(rows: Sequence[float], value: float) -> bool:
    return bool(rows) and abs(sum(rows) / len(rows) - value) < 1e-9
