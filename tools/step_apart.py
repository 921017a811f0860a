"""A trainer of TRL's or Unsloth's in a process of its own, which takes one step whenever it is asked for one.

    python tools/step_apart.py       # what tools/bench_step.py starts; a job and then requests come through stdin

Unsloth patches transformers, peft and TRL for the whole process as it is imported, and asks for older ones than qtune
does. So it has a process of its own, and may have a Python of its own: this file imports nothing of qtune, and the
libraries only when the job has said which. Several such processes take turns on one device; while one takes its step
the others wait for their next line and do nothing. Seconds are taken inside the process, so that the way of a request
is no part of them, from transformers' own `on_step_begin` to its `on_step_end`: one whole step of the real loop.

Requests and answers are lines of JSON. First the job goes in, and {"ready": …} or {"refused": "why"} comes out. Then a
step is taken for each empty line, and what it took comes out. The process ends when its stdin is closed.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of a Llama, by the names that Unsloth wants."""
NAMED = ("torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth")


@dataclass(frozen=True)
class Job:
    """What to train, and how. Every row has the same length, and all of them are one step."""

    trainer: str
    """ "TRL" or "Unsloth"."""
    base: str
    """A folder in Hugging Face's format, in 16 or 32 bits: each trainer quantizes it itself."""
    rows: str
    """A JSON file: input_ids and labels, each [rows, length]."""
    folder: str
    """Where the trainer may write."""
    device: str
    """ "cpu" or "cuda:0"."""
    dtype: str
    adapter_dtype: str | None
    """None: as the trainer makes it."""
    checkpointing: bool
    rank: int
    alpha: float
    learning_rate: float
    seed: int
    threads: int


@dataclass(frozen=True)
class Taken:
    """What one step took."""

    loss: float
    """Mean over the scored tokens, before the step's update."""
    seconds: float
    """By the clock, until the device has done all of it."""
    worked_seconds: float
    """Of the processor, all threads of the process together."""
    peak_bytes: int | None
    """The most that tensors took on a card; on a CPU, the most memory that the process had. None: cannot be told."""


class RefusedError(Exception):
    """The trainer cannot be had; its text says why."""


# --- the end that asks ---------------------------------------------------------------------------------------------


class Apart:
    """A trainer in another process; `step` waits for what its step took."""

    def __init__(self, python: Path, job: Job) -> None:
        """Starts it and waits until its model is there.

        Raises:
            RefusedError: there is no such Python, or no such trainer in it or on this device.
        """
        folder = Path(job.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._said = folder / "said.txt"
        with self._said.open("w") as said:
            try:
                # Unsloth writes what it has compiled to the folder that it is started in.
                self._process = subprocess.Popen(
                    [python, Path(__file__).resolve()],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, cwd=folder,
                )  # fmt: skip
            except OSError as error:
                raise RefusedError(f"{python} cannot be started: {error.strerror}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        answer = self._ask(json.dumps(asdict(job)))
        if "refused" in answer:
            self.close()
            raise RefusedError(answer["refused"])
        self.versions: dict[str, str] = answer["ready"]

    def step(self) -> Taken:
        """One step.

        Raises:
            RefusedError: the process has ended instead.
        """
        return Taken(**self._ask(""))

    def close(self) -> None:
        """Ends the process, and its hold on the device."""
        with suppress(BrokenPipeError):  # it has ended already, with a request that it did not read
            self._requests.close()
        self._answers.close()
        self._process.wait()

    def _ask(self, request: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it has ended: it has no answer either
            self._requests.write(request + "\n")
            self._requests.flush()
        answer = self._answers.readline()
        if not answer:
            self.close()
            code = self._process.returncode
            last = "\n".join(self._said.read_text(errors="replace").splitlines()[-8:])
            raise RefusedError(f"its process ended with exit code {code}; its last words:\n{last}")
        return json.loads(answer)


# --- the end that trains -------------------------------------------------------------------------------------------


def main() -> None:
    """Takes a job and then steps until stdin is closed."""
    # Libraries print; the answers keep the real stdout for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


def serve(requests: TextIO, answers: TextIO) -> None:
    """The protocol, on any two streams."""
    job = Job(**json.loads(requests.readline()))
    try:
        trainer = MAKERS[job.trainer](job)
    except RefusedError as refusal:
        answer(answers, {"refused": str(refusal)})
        return
    trainer.add_callback(turns(requests, answers))
    answer(answers, {"ready": versions()})
    trainer.train()


def answer(answers: TextIO, what: dict[str, Any]) -> None:
    """One line, at once."""
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def versions() -> dict[str, str]:
    """Of the libraries that have to do with it, those that this Python has."""
    return {name: importlib.metadata.version(name) for name in NAMED if installed(name)}


def installed(name: str) -> bool:
    """Whether there is a distribution of this name."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def turns(requests: TextIO, answers: TextIO) -> Any:
    """A callback that lets the trainer's loop take a step for each line of `requests`, and says what it took."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not requests.readline():
                raise SystemExit  # nobody asks any more; a step would follow if training were only told to stop
            self.meter = Meter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.taken = self.meter.read()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:  # of the step that has just ended: every one is logged
                answer(answers, asdict(Taken(float(logs["loss"]), *self.taken)))

    return Turns()


class Meter:
    """Time and memory from its making to `read`."""

    def __init__(self) -> None:
        import torch

        self._on_card = torch.cuda.is_available()
        if self._on_card:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_resident_peak()
        self._began, self._began_work = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float, int | None]:
        """Seconds by the clock, seconds of the processor, bytes at the peak."""
        import torch

        if self._on_card:
            torch.cuda.synchronize()
        seconds, worked = time.perf_counter() - self._began, time.process_time() - self._began_work
        return seconds, worked, torch.cuda.max_memory_allocated() if self._on_card else resident_peak()


def forget_resident_peak() -> None:
    """Linux counts the peak of the process from here on; elsewhere `resident_peak` has none.

    Source: proc_pid_clear_refs(5).
    """
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int | None:
    """Bytes of the process' own and its libraries' memory at the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


# --- the trainers --------------------------------------------------------------------------------------------------


def trl_trainer(job: Job) -> Any:
    """TRL's SFTTrainer as it comes, on a base in NF4 with double quantization, LoRA on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype_of(job)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.base, dtype=dtype, quantization_config=quantization, device_map={"": job.device}, attn_implementation="sdpa"
    )
    torch.manual_seed(job.seed)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=job.rank, lora_alpha=job.alpha, target_modules="all-linear")
    trainer = sft_trainer(job, get_peft_model(model, adapter))
    if job.adapter_dtype is not None:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, job.adapter_dtype))
    return trainer


def unsloth_trainer(job: Job) -> Any:
    """Unsloth's model, called as its own notebooks do, in TRL's SFTTrainer as it has patched it.

    Raises:
        RefusedError: it is not installed, or does not run on this device.
    """
    if importlib.util.find_spec("unsloth") is None:
        raise RefusedError(
            f"not installed for {sys.executable}. It asks for older transformers and TRL than qtune, so give it an "
            "environment of its own and name that one's Python with --unsloth-python"
        )
    try:
        unsloth = importlib.import_module("unsloth")  # before the libraries that it patches
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            job.base, max_seq_length=length_of(job), load_in_4bit=True, dtype=dtype_of(job),
            local_files_only=True,
        )  # fmt: skip
        model = unsloth.FastLanguageModel.get_peft_model(
            model, r=job.rank, target_modules=LINEAR, lora_alpha=job.alpha, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth" if job.checkpointing else False, random_state=job.seed,
        )  # fmt: skip
        return sft_trainer(job, model)
    except (ImportError, NotImplementedError, RuntimeError, AttributeError) as error:
        without = "" if job.device.startswith("cuda") else "it is made for CUDA cards, and none is here. "
        raise RefusedError(f"{without}It says: {type(error).__name__}: {error}") from error


def sft_trainer(job: Job, model: Any) -> Any:
    """TRL's trainer of whatever TRL has been imported, for one step after the other on the same rows."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = rows_of(job)
    config = SFTConfig(
        output_dir=job.folder,
        per_device_train_batch_size=len(rows["input_ids"]),
        max_steps=1_000_000,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=job.device == "cpu",
        bf16=job.dtype == "bfloat16",
        fp16=job.dtype == "float16",
        gradient_checkpointing=job.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=length_of(job),
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=job.seed,
    )
    return SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer,
        data_collator=collate,
    )  # fmt: skip


def dtype_of(job: Job) -> Any:
    """torch's."""
    import torch

    return getattr(torch, job.dtype)


def rows_of(job: Job) -> dict[str, list[list[int]]]:
    """input_ids and labels."""
    return json.loads(Path(job.rows).read_text())


def length_of(job: Job) -> int:
    """Tokens of each row."""
    return len(rows_of(job)["input_ids"][0])


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one length as tensors, with the mask that a padding collator gives them."""
    import torch

    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


MAKERS: dict[str, Callable[[Job], Any]] = {"TRL": trl_trainer, "Unsloth": unsloth_trainer}


if __name__ == "__main__":
    main()
