"""What is known of GGUF files in and beside an exported folder whose every byte was just compared with its manifest."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from qtune import manifest
from qtune.export.llama_cpp import ADAPTER_FILE
from qtune.export.verification import read_proof
from qtune.run.folder import EXPORTED


def said_of_gguf_files(folder: Path, run: Path) -> Iterator[str]:
    """A sentence for each. One that stands in the manifest is, byte for byte, what its export read back and compared;
    reading it again would say the same. One that was removed can be made again. Of others nothing is known, and this
    program compares none that it has not written.

    run: the folder of the one that was exported.

    Raises:
        RunError: the folder's verify.json cannot be read.
    """
    saved = manifest.files_of(folder) if manifest.is_ours(folder) else frozenset()
    proofs = {proof.file: proof for proof in read_proof(folder).gguf.values()}
    for file in sorted(folder.glob("*.gguf")):
        proof = proofs.get(file.name)
        if file.name in saved and proof is not None and not proof.failures:
            closeness = proof.closeness
            yield (
                f"{file.name}: byte for byte what was read back and compared when it was written (KL divergence "
                f"{closeness.kl:.2e}, same likeliest token {closeness.top1:.2%})"
            )
        elif file.name in saved and file.name == ADAPTER_FILE:
            yield f"{file.name}: byte for byte what was written of the adapter; what it answers was not compared"
        else:
            yield f"{file.name}: {_UNKNOWN}"
    for proof in proofs.values():
        if not (folder / proof.file).exists():
            where = [] if folder.resolve() == (run / EXPORTED).resolve() else ["--output", str(folder)]
            command = shlex.join(["qtune", "export", str(run), *where, "--gguf", proof.kind])
            yield f"{proof.file} is no longer there, with which nothing of the model is lost; made again by: {command}"
    around = folder.absolute().parent
    if beside := sorted(around.glob("*.gguf")):
        yield f"{beside[0] if len(beside) == 1 else f'the {len(beside)} GGUF files in {around}'}: {_UNKNOWN}"


_UNKNOWN = "not looked at, for it is no file of this export; llama.cpp compares two: llama-perplexity --kl-divergence"
