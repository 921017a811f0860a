"""A base model as it came out of its quantization, kept in the cache: the next start reads a quarter of the bytes.

The folder's name is a hash of everything that decides what is in it: the weights (sampled, as for a run's lock), the
configuration, the quantization, the type of what stays in 16 bits, the kind of device that has quantized, and the
libraries. A copy is compared with the checksums of its files before it is read, and made again if it differs.
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from qtune import console, manifest
from qtune.cache import cache_folder, mark_used, remove_unused
from qtune.disk import free_bytes, refusal_of
from qtune.errors import ModelError, RunError
from qtune.model.as_made import damage_of, say_made_again
from qtune.model.config import read_config
from qtune.model.contents import checksums_of, contents_of
from qtune.model.folder import weight_files
from qtune.model.weights import load_weights
from qtune.plan import Plan
from qtune.recipe.schema import EightBit, FourBit, Quantization
from qtune.records import read_record, write_record
from qtune.sizes import MIB, gib_text
from qtune.startup.launched import launched
from qtune.whole import whole

VERSION = 2
LIBRARIES = ("bitsandbytes", "torch", "transformers")

FROM_BYTES = 128 * MIB
"""Of weights on disk: smaller models are quantized in no time."""
ROOM = 4
"""Times the copy's bytes that have to be free on the cache's disk."""
SHARD = "1GB"
"""Of host memory that writing takes at a time."""


MADE_OF = "made_of.json"


@dataclass(frozen=True)
class MadeOf:
    """What a copy was made of. The base's own files are not read where the copy is, and may have changed since."""

    checksums: dict[str, str]


@dataclass(frozen=True)
class QuantizedCopy:
    """Where the quantized copy of one base is, or would be."""

    folder: Path
    source: str
    """What transformers would have loaded, a folder or a hub id; the model is called so, and its adapters name it."""
    base: Path
    """The folder of the weights that are quantized."""

    def load(self, places: Mapping[str, str], **options: Any) -> PreTrainedModel | None:
        """The model, as `load_weights` would have quantized it; None where there is no copy, or none that is whole.

        places: transformers' device map.
        """
        if (fault := self._fault()) is not None:
            if self.folder.is_dir():
                self._remove(fault)
            return None
        try:
            config = read_config(str(self.folder))
            _allow_the_host(config, places)
            network = load_weights(str(self.folder), config, device_map=dict(places), **options)
        except ModelError as error:
            self._remove(error.problems[0].message)
            return None
        mark_used(self.folder / manifest.NAME)
        network.config.name_or_path = network.name_or_path = self.source
        return network

    def checksums(self) -> dict[str, str] | None:
        """`contents.checksums_of` the base when the copy was made; None where there is none that is whole."""
        if self._fault() is not None:
            return None
        found = read_record(self.folder / MADE_OF, MadeOf)
        return None if found is None else found.checksums

    def keep(self, network: PreTrainedModel) -> None:
        """Keeps a model that was quantized just now, where there is room for it."""
        if not launched().is_leader:  # of several processes with the same base, one writes
            return
        nbytes = sum(parameter.nbytes for parameter in network.parameters())
        what = f"the quantized model ({gib_text(nbytes)})"
        if (free := free_bytes(self.folder)) < ROOM * nbytes:
            console.say(f"{what} is not kept for the next start: {gib_text(free)} are free")
            return
        console.say(f"keeping {what} for the next start in {self.folder}")
        try:
            self._write(network)
        except Exception as error:  # a cache that cannot take it is no reason to stop
            if (reason := refusal_of(error)) is None:
                raise
            console.say(f"{what} is not kept for the next start: {reason}")

    def _write(self, network: PreTrainedModel) -> None:
        remove_unused(self.folder.parent, manifest.NAME)
        with whole(self.folder, keep_existing=True) as partial:
            network.save_pretrained(partial, max_shard_size=SHARD)
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors writes 0600; a cache may serve several users
            write_record(partial / MADE_OF, MadeOf(checksums_of(self.base)))
            manifest.seal(partial, name=self.folder.name)

    def _fault(self) -> str | None:
        """What is wrong with the copy, in words that follow its name."""
        if not manifest.is_ours(self.folder):
            return f"its {manifest.NAME} is missing"
        try:
            return damage_of(self.folder, whole=True)
        except RunError as error:  # another user's, and his alone
            return error.problems[0].message

    def _remove(self, said: str) -> None:
        say_made_again(self.folder, said)
        shutil.rmtree(self.folder, ignore_errors=True)


def copy_of(
    source: str, on_disk: Path | None, quantization: Quantization, plan: Plan, config: PretrainedConfig
) -> QuantizedCopy | None:
    """The place of a base's quantized copy; None where none is kept.

    source: a folder or a hub id, as transformers loads it. on_disk: its folder, None where its weights are still to
    be fetched.
    """
    if on_disk is None or not isinstance(quantization, (FourBit, EightBit)) or not quantization.keep_copy:
        return None
    try:
        nbytes = sum(file.stat().st_size for file in weight_files(on_disk))
        if nbytes < FROM_BYTES:
            return None
        contents = contents_of(on_disk, None)
    except (OSError, ModelError):
        return None  # loading says what is wrong with the base
    decides = {
        "version": VERSION,
        "weights": {name: asdict(file) for name, file in contents.weights.items()},
        "config": config.to_dict() | {"_name_or_path": None},
        "generation": contents.generation,
        "quantization": quantization.model_dump(exclude={"keep_copy", "minimum_share", "compute_dtype"}),
        "dtype": plan.compute_dtype,
        "on": plan.device.kind if plan.layers == "device" else "cpu",
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    key = hashlib.blake2b(json.dumps(decides, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    return QuantizedCopy(cache_folder() / "quantized" / key, source, on_disk)


def _allow_the_host(config: PretrainedConfig, places: Mapping[str, str]) -> None:
    """transformers' consent to weights on the host; what is quantized stays on the card."""
    stored: Any = getattr(config, "quantization_config", None)
    if len(places) > 1 and isinstance(stored, dict):
        stored["llm_int8_enable_fp32_cpu_offload"] = True
