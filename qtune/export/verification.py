"""verify.json: what an exported folder says of its own proof; written, read, and added to by a GGUF file's."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qtune import manifest
from qtune.errors import Problem, RunError, first_line
from qtune.model import as_made
from qtune.records import NotARecord, plain, record_of, require_intact, sealed
from qtune.run.identity import identity_of, manifest_in, of_another, saved_by
from qtune.tuned.asked import AskedTurn
from qtune.whole import write_text

# The proof beside the weights; a folder without one, or that was killed on the way to it, is not verified.
VERIFICATION = "verify.json"


@dataclass(frozen=True)
class Closeness:
    """What one model's next-token distributions are to a reference's, over `tokens` positions.

    `kl` is the mean of KL(reference || other) in nats per token, `kl_largest` its largest value; `top1` the share of
    positions with the same likeliest token, or one that ties with it (`closeness.TIE`);
    `gap` the largest difference between two logits of the same token;
    `new_tokens` the mean probability of the tokens that the reference does not have (a baked soft prompt's).
    """

    tokens: int
    kl: float
    kl_largest: float
    top1: float
    gap: float
    new_tokens: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The values that an export must keep, and in words where they come from."""

    kl: float
    top1: float
    reason: str


@dataclass(frozen=True)
class Answer:
    """One held-out request and the greedy answers to it."""

    request: str
    """The last words of the user."""
    trained: str
    exported: str
    turns: tuple[AskedTurn, ...] = ()
    """All that stood before the answer, `request` among it; none in files of older versions."""


@dataclass(frozen=True)
class Verification:
    """The figures of a comparison. An export is verified when `failures` is empty."""

    verified: bool
    failures: tuple[str, ...]
    weights: str
    rows: int
    rows_from: str
    exported: Closeness
    """The exported model against its reference: the trained 4-bit model, or the adapter on the original weights."""
    bare_base: Closeness
    """The base without the adapter against the same reference: what losing the adapter would cost."""
    cost: dict[str, Closeness]
    """By basis, that basis with the adapter against the model that was trained."""
    limits: Limits
    perplexity: dict[str, float]
    """Of the scored tokens: "trained", "exported", "bare base"."""
    answers: tuple[Answer, ...]
    answers_equal: int
    compute_dtype: str
    """What the live model computes in; "int8 products" where its products round their inputs to 8 bits."""
    streamed: bool
    """Whether the models were too large for the memory and read module by module; no answers are generated then."""
    seconds: float
    live: Closeness | None = None
    """The live model, computing as it was trained (16-bit activations, int8 products), against its exact self: noise
    of that precision, and none of the export's. None where it computes in float32, or is streamed."""


@dataclass(frozen=True)
class GgufProof:
    """What reading the file back gave."""

    file: str
    kind: Literal["f16", "bf16", "q8_0"]
    closeness: Closeness
    tokens_compared: bool
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Proof:
    """What verify.json says of a folder."""

    verified: bool
    failures: tuple[str, ...]
    weights: str | None = None
    """What the adapter was merged into: "dequantized" or "original"; None in files of older versions."""
    figures: Verification | None = None
    """None where the models were not compared."""
    gguf: dict[str, GgufProof] = field(default_factory=dict)
    """By type, the proof of each GGUF file that was made of the folder."""
    folder: str | None = None
    """`folder_name` of what was compared; None in files of older versions, and where nothing was."""


def write_verification(folder: Path, figures: Verification) -> None:
    """Notes how a comparison has ended; what is known of GGUF files stays."""
    proof = Proof(figures.verified, figures.failures, figures.weights, figures, _before(folder).gguf)
    _write(folder, replace(proof, folder=folder_name(folder)))


def mark_unverified(folder: Path, reason: str, weights: str | None = None) -> None:
    """Notes that nothing was proven about a folder; what is known of its GGUF files and its weights stays.

    weights: what the adapter was merged into, where the folder does not say so yet.
    """
    before = _before(folder)
    _write(folder, Proof(False, (reason,), weights or before.weights, gguf=before.gguf))


def add_gguf(folder: Path, proof: GgufProof) -> None:
    """Notes the proof of a GGUF file beside that of the folder."""
    before = _before(folder)
    _write(folder, replace(before, gguf={**before.gguf, proof.kind: proof}))


def read_proof(folder: Path) -> Proof:
    """What is known about a folder; nothing is verified where it says nothing.

    Raises:
        RunError: its verify.json is damaged.
    """
    file = folder / VERIFICATION
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        require_intact(values)
        figures = record_of(Verification, values) if "exported" in values else None
        return replace(record_of(Proof, {**values, "figures": None}), figures=figures)
    except FileNotFoundError:
        return Proof(False, ())
    except NotARecord as error:
        raise RunError(Problem(str(file), f"cannot be read: {error}")) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(Problem(str(file), f"cannot be read: {first_line(error)}")) from error


def folder_name(folder: Path) -> str | None:
    """Changes with what an exported folder computes, by the SHA-256 of its files as its manifest has them; None where
    it has none. Files that are made of it later, such as a GGUF file, do not count."""
    found = manifest_in(folder)
    if found is None:
        return None
    counted = {name: one.sha256 for name, one in found.files.items() if Path(name).suffix in (".safetensors", ".json")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:32]


def seal_export(folder: Path, run: Path) -> None:
    """Notes what is in a folder that is complete, and that it was made of the run in `run`. verify.json comes and goes,
    and has a checksum of its own."""
    manifest.seal(folder, left_out=(VERIFICATION,), by=saved_by(run))


def damage_of(folder: Path) -> str | None:
    """`model.as_made.damage_of` of every byte, in a sentence."""
    said = as_made.damage_of(folder, whole=True)
    return None if said is None else f"it is not what was exported: {said}"


def proof_today(folder: Path, run: Path) -> Proof:
    """What is known about a folder inside a run, if its files are still those that were exported of that run.

    Raises:
        RunError: as `read_proof`.
    """
    proof, said = read_proof(folder), damage_of(folder) or of_another_run(folder, run)
    if said is None and None not in (proof.folder, name := folder_name(folder)) and proof.folder != name:
        said = f"its {VERIFICATION} is of another folder than this one"
    return proof if said is None else replace(proof, verified=False, failures=(said, *proof.failures))


def of_another_run(folder: Path, run: Path) -> str | None:
    """Of an export, which carries its adapter, that of an ancestor is another's too."""
    identity, found = identity_of(run), manifest_in(folder)
    if identity is None or found is None or (found.by is not None and found.by.run_id == identity.run_id):
        return None
    return f"it {of_another(None if found.by is None else found.by.run_id, identity)}"


def proven_folders(run: Path) -> list[Path]:
    """The folders inside a run that have a verify.json."""
    return sorted(file.parent for file in run.glob(f"*/{VERIFICATION}"))


def _before(folder: Path) -> Proof:
    """What is known so far; nothing where that is damaged, for it is about to be written anew."""
    try:
        return read_proof(folder)
    except RunError:
        return Proof(False, ())


def proof_in_public(folder: Path) -> str | None:
    """What verify.json says, without the answers in it, which quote rows that nobody else has seen; None: there is
    none.

    Raises:
        RunError: it is damaged.
    """
    if not (folder / VERIFICATION).is_file():
        return None
    proof = read_proof(folder)
    figures = None if proof.figures is None else replace(proof.figures, answers=())
    return _text(replace(proof, figures=figures))


def _write(folder: Path, proof: Proof) -> None:
    write_text(folder / VERIFICATION, _text(proof))


def _text(proof: Proof) -> str:
    """The figures stand at the top, as they always have."""
    own = {name: value for name, value in plain(proof).items() if name != "figures" and value not in (None, {})}
    values = {**own, **(plain(proof.figures) if proof.figures else {})}
    return json.dumps(sealed(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
