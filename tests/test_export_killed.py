"""`qtune export` killed at any moment leaves no model or a whole one, and the next export clears up."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run_warm
from export_models import tiny_run
from safetensors.torch import load_file

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# What must be there when the kill comes: the folder in the making, its weights, its last file; the model, the proof.
MOMENTS = [
    ".model.partial-*",
    ".model.partial-*/model.safetensors",
    ".model.partial-*/config.json",
    "*model*/README.md",
    "model/verify.json",
]

# Exports in one forked child for each moment and kills it there; prints what is left each time.
SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
import qtune.export.export
from qtune import cli

run, moments = Path(sys.argv[1]), json.loads(sys.argv[2])

def export():
    torch.set_num_threads(1)
    sys.argv = ["qtune", "export", str(run)]
    try:
        cli.main()
    finally:
        os._exit(1)

for moment in moments:
    child = os.fork()
    if not child:
        export()
    while not any(run.glob(moment)):
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the export ended before it came to " + moment)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    left = {str(file.relative_to(run)) for file in run.rglob("*model*/*")}
    kept = run.parent / f"killed-{moments.index(moment)}"
    if (run / "model").exists():
        shutil.move(run / "model", kept)
    print(json.dumps([os.WTERMSIG(status), sorted(left)]), flush=True)
"""


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_nothing_or_a_whole_model(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    done = run_warm(SCRIPT, run.path, json.dumps(MOMENTS))
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert [signal for signal, _ in ended] == [9] * len(MOMENTS)
    assert not any(name.startswith("model/") for name in ended[0][1]), "no model when it was just begun"
    assert any(name.startswith(".model.partial-") for name in ended[0][1] + ended[1][1])
    whole = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "verify.json", "README.md"}
    for number in range(len(MOMENTS)):
        folder = tmp_path / f"killed-{number}"
        if folder.exists():
            assert whole <= {file.name for file in folder.iterdir()}
            assert "model.embed_tokens.weight" in load_file(folder / "model.safetensors")
            assert "verified" in json.loads((folder / "verify.json").read_text())
    assert (tmp_path / f"killed-{len(MOMENTS) - 1}").exists()

    from qtune.export.export import Options, export_run

    assert export_run(run, Options(verify=False)) == run.path / "model"
    assert not list(run.path.glob(".model.partial-*"))


# A file system of its own for the output, too small for the weights; the check before writing is told that it is not.
FULL_DISK = """
import ctypes, os, subprocess, sys
from pathlib import Path
import torch
from qtune.export import staged
from qtune.export.export import Options, export_run
from qtune.errors import ExportError, InputError
from qtune.run.folder import RunDir

torch.set_num_threads(1)
disk = Path(sys.argv[2])
# As `unshare --map-root-user --mount` does it.
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
user, group = os.getuid(), os.getgid()
assert ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS | NEW_USER) == 0, os.strerror(ctypes.get_errno())
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"0 {user} 1")
Path("/proc/self/gid_map").write_text(f"0 {group} 1")
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], check=True)
if sys.argv[3] == "while writing":
    staged.refuse_small_disk = lambda folder, needed_bytes: None
try:
    export_run(RunDir(Path(sys.argv[1])), Options(output=disk / "model", verify=False))
except (ExportError, InputError) as error:
    print(error)
print([str(path) for path in disk.rglob("*")])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("before writing", r"needs 0\.06 GiB, the disk has 100\.0 KiB free"),
        ("while writing", "the disk is full; nothing was left behind"),
    ],
)
def test_a_full_disk_is_one_clear_error_and_nothing_is_left(when: str, message: str, tmp_path: Path) -> None:
    # A user namespace may mount a small tmpfs without any rights; where that is forbidden there is nothing to show.
    (tmp_path / "disk").mkdir()
    alone = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*alone, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    run = tiny_run(tmp_path)
    done = run_warm(FULL_DISK, run.path, tmp_path / "disk", when)
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()[-2:]
    assert re.search(message, error), error
    assert left == "[]"
