"""A GGUF file as a base model: dequantized once into the cache, then loaded like any model folder.

transformers can keep GGUF weights packed, but a packed model can be neither quantized to NF4 nor merged.
"""

import hashlib
import shutil
import struct
import tempfile
from pathlib import Path

from qtune import console
from qtune.errors import ModelError, Problem, first_line
from qtune.model.builtin import cache_folder, convert


def gguf_folder(file: Path) -> Path:
    """The model folder made from a GGUF file; made again when the file's path, size or time changes.

    Raises:
        ModelError: the file is missing or is none that transformers can read.
    """
    if not file.is_file():
        raise ModelError(Problem(str(file), "no such GGUF file"))
    state = file.stat()
    key = hashlib.sha256(f"alone {file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    console.say(f"{file.name}: dequantizing into the cache, once")
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        convert(_alone(file, work), work / "model")
        (work / "model").rename(folder)
    # What transformers 5.23 raises depends on where the file stops being GGUF.
    except (ValueError, NotImplementedError, KeyError, IndexError, struct.error) as error:
        raise ModelError(Problem(str(file), f"transformers cannot read this GGUF file: {first_line(error)}")) from error
    except OSError:
        # Another process was faster: a folder that is there is complete, for it came by a rename.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _alone(file: Path, work: Path) -> Path:
    """The file under its name in a folder of its own.

    transformers 5.23 prefers a tokenizer that lies beside a GGUF file, and then loses the file's own chat template and
    end of text; an exported folder has both beside each other.
    """
    linked = work / "alone" / file.name
    linked.parent.mkdir()
    try:
        linked.symlink_to(file.resolve())
    except OSError:  # a file system or a Windows account without symbolic links
        linked.hardlink_to(file.resolve())
    return linked
