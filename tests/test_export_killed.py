"""`qtune export` killed at any moment leaves no model or a whole one, and the next export clears up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
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

# Imports once, then exports in one forked child for each moment and kills it there; prints what is left each time.
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


def test_an_export_that_is_killed_leaves_nothing_or_a_whole_model(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run.path), json.dumps(MOMENTS)], capture_output=True, text=True, check=False
    )
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
