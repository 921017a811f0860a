"""Hashes of large files by what the file system says of them, so that these are not read for them each time."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from qtune.cache import mark_used
from qtune.data.files import DataFile
from qtune.data.sources import content_digest
from qtune.data.store import written_whole


class Seen:
    """Content hashes that were computed before.

    A file whose size, times of change and place on the disk are what they were is taken for what it was; the system
    sets one of these times itself, whatever changes in a file. Each block is compared once more when it is read.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def digest(self, file: DataFile) -> bytes:
        """`content_digest`, read from the file where it is not known yet."""
        about, place = file.path.stat(), str(file.path.resolve())
        mark = json.dumps([place, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev])
        kept = self.cache / f"{hashlib.blake2b(mark.encode(), digest_size=16).hexdigest()}.seen"
        with suppress(OSError):
            found = kept.read_bytes()
            if found == _sealed(digest := found[: hashlib.blake2b().digest_size], mark):
                mark_used(kept)
                return digest
            kept.unlink()
        digest = content_digest(file)
        with suppress(FileExistsError), written_whole(kept) as temporary:
            temporary.write_bytes(_sealed(digest, mark))
        return digest


def _sealed(digest: bytes, mark: str) -> bytes:
    """A digest, and behind it what tells whether it is still that, and of this file."""
    return digest + hashlib.blake2b(mark.encode() + digest, digest_size=16).digest()
