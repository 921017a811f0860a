"""A few validation rows, answered at each evaluation: what a falling loss means, in words.

Answers are greedy, with the adapter as it is at that step, and nothing of the training knows of them: no random number
is drawn, no gradient taken, and the model goes back to the mode that it was in.
"""

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune.data.conversation import Conversation
from qtune.data.held_out import spread_unlike
from qtune.errors import first_line
from qtune.run.metrics import CUT, SampleAnswer
from qtune.training.callbacks import Beside
from qtune.training.inputs import Inputs
from qtune.training.trainer import release_cached_memory
from qtune.tuned.asked import answered_turn, other_turns
from qtune.tuned.evaluation import EXTRA_TOKENS, FREE_TEXT_TIMES
from qtune.tuned.generate import Generated, answers_to, find_ends, positions_left, within_reach
from qtune.tuned.precision import training_autocast
from qtune.tuned.questions import Question, to_question
from qtune.tuned.vocabulary import decoded

log = logging.getLogger(__name__)

MOST_TOKENS = 128
MOST_SECONDS = 20.0
FEWEST_POSITIONS = 512
"""Of prompts and answers at once: where rows are short a few more do no harm (64 MiB of cache for an 8B model)."""
LONGEST_TEXT = 2000
"""Characters of a question or an answer that are kept: each record is a line of metrics.jsonl."""

Tell = Callable[[TrainerState, Sequence[SampleAnswer]], None]


class SampleAnswers(TrainerCallback):
    """Asks the same rows after each evaluation. An answer that fails is said, ends no run, and is the last one."""

    def __init__(
        self,
        inputs: Inputs,
        tell: Tell,
        note: Callable[[str], None],
        beside: Beside,
        *,
        seconds: float = MOST_SECONDS,
    ) -> None:
        """tell: is given the answers. note: hears why there are none. beside: shows how far they are. seconds: for all
        answers of an evaluation."""
        self.inputs = inputs
        self.tell = tell
        self.note = note
        self.beside = beside
        self.seconds = seconds
        self.questions: list[Question] | None = None
        """None until the model, whose config knows its ends, was seen."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.questions == []:
            return
        try:
            answers = self._ask(kwargs["model"], state.global_step)
        except Exception as error:
            log.debug("no sample answers", exc_info=True)
            self.questions = []
            release_cached_memory()
            self.note(f"no sample answers from here on, which changes nothing of the training: {first_line(error)}")
            return
        if answers:
            self.tell(state, answers)

    def _ask(self, model: Any, step: int) -> list[SampleAnswer]:
        tokenizer = self.inputs.tokenizer
        ends = find_ends(model, tokenizer)
        reach = positions_left(model)
        if self.questions is None:
            rows = sampled_rows(self.inputs)
            questions = [question for row in rows if (question := to_question(row, tokenizer, ends))]
            self.questions = [one for one in questions if _most_tokens(one, reach) > 0]
        asked = self.questions
        limits = [_most_tokens(question, reach) for question in asked]
        what = f"step {step}: asking {'1 validation row' if len(asked) == 1 else f'{len(asked)} validation rows'}"
        if asked:
            self.beside(what)
        done = 0.0

        def on_rows(rows: float) -> None:
            nonlocal done
            done += rows
            self.beside(what, done / len(asked))

        with _numbers_kept(model.device), training_autocast(self.inputs.plan):
            # As many positions at once as a micro-batch has, whose activations took more than this cache will.
            room = max(FEWEST_POSITIONS, self.inputs.plan.micro_batch_size * int(self.inputs.prepared.lengths.max()))
            prompts = [question.prompt for question in asked]
            made = answers_to(model, prompts, limits, ends, seconds=self.seconds, batch_tokens=room, on_rows=on_rows)
        return [
            SampleAnswer(
                question.place,
                _shortened(question.request),
                _shortened(question.expected),
                _text(one, self),
                not one.is_whole,  # is_cut
                one.is_late,
                *other_turns(question.turns),
                last_turn=_shortened(answered_turn(question.turns)),
            )
            for question, one in zip(asked, made, strict=True)
        ]


def sampled_rows(inputs: Inputs) -> list[dict[str, Any]]:
    """As many validation rows as `training.sample_answers` says, spread evenly over all of them; what rows ask twice is
    asked once."""
    validation = inputs.prepared.examples.get("validation")
    if validation is None:
        return []

    def asked(row: int) -> str:
        return json.dumps(Conversation.from_json(validation[row]["conversation"]).prompt)

    wanted = inputs.recipe.training.sample_answers
    return [validation[row] for row in spread_unlike(len(validation), wanted, asked)]


def _most_tokens(question: Question, reach: int | None) -> int:
    """How long the answer may become: below 1 where the prompt leaves no position for one."""
    return within_reach(
        min(FREE_TEXT_TIMES * len(question.expected_ids) + EXTRA_TOKENS, MOST_TOKENS), len(question.prompt), reach
    )


def _text(answer: Generated, asking: SampleAnswers) -> str:
    text = decoded(asking.inputs.tokenizer, answer.ids, is_whole=answer.is_whole).strip()
    return _shortened(text if answer.is_whole else f"{text}{CUT}")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


@contextmanager
def _numbers_kept(device: torch.device) -> Iterator[None]:
    """Whatever a model's own code may draw while it answers, training draws what it would have drawn."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
