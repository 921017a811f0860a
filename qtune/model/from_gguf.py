"""A GGUF file as a base model: dequantized once into the cache, then loaded like any model folder.

transformers can keep GGUF weights packed, but a packed model can be neither quantized to NF4 nor merged.
"""

import errno
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from qtune import console
from qtune.cache import cache_folder, not_writable
from qtune.errors import ModelError, Problem, first_line
from qtune.manifest import IF_CHANGED, file_fault, sampled, seal
from qtune.model.as_made import fault_of_kept, say_made_again
from qtune.model.builtin import convert
from qtune.model.gguf_header import require_gguf
from qtune.whole import whole


def gguf_folder(file: Path) -> Path:
    """The model folder made from a GGUF file; made again when the file's path, size or time changes, when blocks of it
    hold other bytes, and when the folder is not what was made.

    Raises:
        ModelError: the file is missing or is none that transformers can read.
    """
    if not file.is_file():
        raise ModelError(Problem(str(file), "no such GGUF file"))
    try:
        state = file.stat()
        key = _key(file.resolve(), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ModelError(Problem(str(file), f"cannot be read: {error.strerror}")) from error
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    said = fault_of_kept(folder) if folder.is_dir() else None
    if folder.is_dir() and said is None:
        return folder
    try:
        if said is not None:
            say_made_again(folder, said)
            shutil.rmtree(folder, ignore_errors=True)  # another process may do the same
            if folder.exists():
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(folder.parent, error) from error
    require_gguf(file)
    if (said := file_fault(file)) is not None:
        raise ModelError(Problem(str(file), f"{said}; {IF_CHANGED}"))
    console.say(f"{file.name}: dequantizing into the cache, once")
    try:
        with (
            whole(folder, keep_existing=True) as partial,
            tempfile.TemporaryDirectory(prefix=".alone-", dir=folder.parent) as alone,
        ):
            convert(_alone(file, Path(alone)), partial)
            seal(partial, name=folder.name)
            for made in partial.iterdir():
                made.chmod(0o644)  # safetensors writes 0600; a cache may serve several users
    except OSError as error:
        raise not_writable(folder.parent, error) from error
    # What transformers 5.23 raises depends on what it does not know; what its tokenizers raise is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(Problem(str(file), f"transformers cannot read this GGUF file: {first_line(error)}")) from error
    return folder


@functools.cache
def _key(file: Path, nbytes: int, modified: int) -> str:
    """What a file is known by: its place, size and time, and what is in it."""
    return hashlib.sha256(f"alone {file} {nbytes} {modified} {sampled(file)}".encode()).hexdigest()[:12]


def _alone(file: Path, folder: Path) -> Path:
    """The file under its name in a folder of its own.

    transformers 5.23 prefers a tokenizer that lies beside a GGUF file, and then loses the file's own chat template and
    end of text; an exported folder has both beside each other.
    """
    linked = folder / file.name
    try:
        linked.symlink_to(file.resolve())
    except OSError:  # a file system or a Windows account without symbolic links
        linked.hardlink_to(file.resolve())
    return linked
