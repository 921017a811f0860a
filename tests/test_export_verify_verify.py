"""The proof has teeth: an export broken in any of the ways that happen is caught, and what is wrong is said."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_models import tiny_run
from safetensors.torch import load_file, save_file

from qtune.data.conversation import Conversation
from qtune.errors import VerificationError
from qtune.export.export import Options, export_run, prove
from qtune.export.merge import Weights
from qtune.export.merged_folder import Target, open_merge
from qtune.export.opened_run import OpenedRun, open_for_export
from qtune.export.soft_prompt import open_soft_prompt
from qtune.export.verification import Answer, read_proof
from qtune.export.verify.rows import rows_for
from qtune.export.verify.verify import verify
from qtune.run.folder import RunDir
from qtune.screens.export import why_answers_part
from qtune.tuned.asked import AskedTurn

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Trained in either dtype: the noise of 16-bit activations hides nothing and refuses nothing."""
    quantization = f'kind = "nf4"\ncompute_dtype = "{request.param}"\nminimum_share = 0.0'
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        return tiny_run(tmp_path_factory.mktemp("verify"), quantization=quantization, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def good(run: RunDir) -> Path:
    return export_run(run, Options(verify=False))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def again(source: OpenedRun, folder: Path, weights: str = "dequantized", scale: float = 1.0) -> None:
    """The weights of another merge in place of the right ones."""
    merge = open_merge(source, Target(folder, torch.float16, weights))  # type: ignore[arg-type]
    from dataclasses import replace

    from qtune.export.merge import write_merge

    updates = {name: replace(update, scaling=update.scaling * scale) for name, update in merge.adapter.updates.items()}
    write_merge(replace(merge, adapter=replace(merge.adapter, updates=updates)), folder, lambda _: None)


def adapter_dropped(source: OpenedRun, folder: Path) -> None:
    again(source, folder, scale=0)


def wrong_scale(source: OpenedRun, folder: Path) -> None:
    again(source, folder, scale=0.5)


def wrong_basis(source: OpenedRun, folder: Path) -> None:
    again(source, folder, weights="original")


def one_layer_swapped(source: OpenedRun, folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_weights(folder, swap)


def one_weight_lost(source: OpenedRun, folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def tied_head_untied(source: OpenedRun, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    edit_weights(
        folder,
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])}),
    )


def template_lost(source: OpenedRun, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def template_changed(source: OpenedRun, folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("message['content'] +", "message['content'] + ' ' +"))


def shard_truncated(source: OpenedRun, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def config_changed(source: OpenedRun, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config))


BREAKS = {
    adapter_dropped: "KL divergence",
    wrong_scale: "KL divergence",
    wrong_basis: "KL divergence",
    one_layer_swapped: "tensor model.layers.0.self_attn.o_proj.weight differs by up to",
    one_weight_lost: "missing keys when loading: model.layers.1.mlp.up_proj.weight",
    tied_head_untied: "tensor lm_head.weight is not part of the merge",
    template_lost: "the chat template is lost",
    template_changed: "the chat template renders 'several turns' to other tokens than training did",
    shard_truncated: "cannot be loaded",
    config_changed: "KL divergence",
}


@pytest.mark.slow
@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_a_broken_export_is_caught(
    break_it: Callable[[OpenedRun, Path], None], run: RunDir, good: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    source = open_for_export(run)
    break_it(source, folder)
    with pytest.raises(VerificationError) as caught:
        prove(
            source,
            folder,
            verify(source, folder, rows_for(source), merge=open_merge(source, Target(folder, torch.float16))),
        )
    assert BREAKS[break_it] in str(caught.value)
    assert caught.value.exit_code == 1
    assert json.loads((folder / "verify.json").read_text())["verified"] is False


def test_the_same_folder_unbroken_passes(run: RunDir, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    source = open_for_export(run)
    verification = verify(source, folder, rows_for(source))
    assert prove(source, folder, verification) == folder
    assert verification.failures == ()


def test_a_failed_export_is_marked_in_its_card(run: RunDir, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    source = open_for_export(run)
    adapter_dropped(source, folder)
    with pytest.raises(VerificationError, match="is not the trained model; it is kept, marked as unverified"):
        prove(source, folder, verify(source, folder, rows_for(source)))
    assert "**NOT VERIFIED" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["dequantized", "original"])
def test_models_too_large_for_the_memory_are_compared_module_by_module(
    weights: Weights, run: RunDir, good: Path, tmp_path: Path
) -> None:
    """The figures are those of whole models; nothing of the comparison differs but where the weights wait."""
    folder = good
    source = open_for_export(run)
    if weights == "original":
        folder = tmp_path / "model"
        shutil.copytree(good, folder)
        again(source, folder, weights="original")
    rows = rows_for(source)
    whole = verify(source, folder, rows, weights, streamed=False)
    streamed = verify(source, folder, rows, weights, streamed=True)
    assert streamed.streamed
    assert streamed.verified is whole.verified is True
    for name in ("trained", "exported", "bare base"):
        assert streamed.perplexity[name] == pytest.approx(whole.perplexity[name], rel=1e-5)
    assert streamed.bare_base.kl == pytest.approx(whole.bare_base.kl, rel=1e-4)
    assert streamed.cost[weights].kl == pytest.approx(whole.cost[weights].kl, rel=0.05, abs=1e-8)


def test_a_broken_export_is_caught_module_by_module_too(run: RunDir, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    source = open_for_export(run)
    adapter_dropped(source, folder)
    found = verify(source, folder, rows_for(source), streamed=True)
    assert not found.verified
    assert found.exported.kl == pytest.approx(found.bare_base.kl, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "kind", "dtype"),
    [
        ('kind = "lora"\nrank = 4\ndora = true', "nf4", "bfloat16"),
        ('kind = "lora"\nrank = 4', "int8", "float32"),
        ('kind = "ia3"', "fp4", "bfloat16"),
        ('kind = "p-tuning"\nvirtual_tokens = 4\nencoder_hidden_size = 16', "nf4", "bfloat16"),
    ],
)
def test_every_adapter_and_base_is_compared_module_by_module_with_the_figures_of_whole_models(
    adapter: str, kind: str, dtype: str, tmp_path: Path
) -> None:
    quantization = f'kind = "{kind}"\ncompute_dtype = "{dtype}"\nminimum_share = 0.0'
    source = open_for_export(tiny_run(tmp_path, adapter, quantization=quantization))
    folder = export_run(source.run, Options(verify=False))
    prompt = open_soft_prompt(source) if source.recipe.adapter.export == "bake" else None
    ids = () if prompt is None else prompt.ids
    whole, streamed = (
        verify(source, folder, rows_for(source), virtual_ids=ids, streamed=streamed) for streamed in (False, True)
    )
    assert (whole.failures, streamed.failures) == ((), ())
    assert streamed.bare_base.kl == pytest.approx(whole.bare_base.kl, rel=1e-3)
    assert streamed.exported.kl == pytest.approx(whole.exported.kl, rel=0.05, abs=1e-8)


def test_the_noise_of_the_live_model_is_shown_beside_and_is_none_of_the_exports(run: RunDir, good: Path) -> None:
    source = open_for_export(run)
    verification = verify(source, good, rows_for(source))
    if verification.compute_dtype == "float32":
        assert verification.live is None
    else:
        assert verification.live is not None
        assert verification.live.kl > verification.exported.kl


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_that_changes_nothing_is_exported_from_every_compute_dtype(dtype: str, tmp_path: Path) -> None:
    """A run of one step at rate 0, or one that is stopped early, is a right export of an unchanged model."""
    quantization = f'kind = "nf4"\ncompute_dtype = "{dtype}"\nminimum_share = 0.0'
    run = tiny_run(tmp_path, quantization=quantization)
    file = run.adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    folder = export_run(run, Options())
    assert json.loads((folder / "verify.json").read_text())["verified"] is True


def test_the_cost_of_the_other_weights_is_told_when_asked_for(run: RunDir, good: Path) -> None:
    source = open_for_export(run)
    cost = verify(source, good, rows_for(source), compare_bases=True).cost
    assert cost["original"].kl > 10 * cost["dequantized"].kl


TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 and 2?"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "And 3 and 4?"},
    {"role": "assistant", "content": "It is 7."},
)


def test_an_answer_keeps_all_that_stood_before_it(run: RunDir, good: Path) -> None:
    source = open_for_export(run)
    rows = rows_for(source)
    row = replace(rows.rows[0], conversation=Conversation(TALK, place="rows:1"))
    (answer,) = verify(source, good, replace(rows, rows=(row,))).answers
    assert answer.request == "And 3 and 4?"
    assert answer.turns == tuple(AskedTurn(one["role"], one["content"]) for one in TALK[:-1])
    text = why_answers_part(replace(verify(source, good, rows), answers=(replace(answer, trained="7", exported="8"),)))
    assert text.splitlines()[1] == "  “And 3 and 4?” (with 2 earlier turns): from the first word: “7” and “8”"


def test_a_pass_with_other_answers_says_what_that_means_and_where_they_part(run: RunDir, good: Path) -> None:
    source = open_for_export(run)
    verification = verify(source, good, rows_for(source))
    answers = (
        Answer("What is red?", "It means stop, always.", "It means stop, mostly."),
        Answer("And green?", "Go.", "Walk."),
        Answer("Blue?", "Sky.", "Sky."),
    )
    text = why_answers_part(replace(verification, answers=answers, answers_equal=1))
    assert text.splitlines()[1:] == [
        "  “What is red?”: the same up to “It means stop,”, then “always.” and “mostly.”",
        "  “And green?”: from the first word: “Go.” and “Walk.”",
    ]


@pytest.mark.slow
def test_an_export_that_overflows_where_it_computes_as_it_is_stored_is_not_verified(tmp_path: Path) -> None:
    """Norms as large as Gemma's, which float16 holds; what they make of an activation it does not."""
    run = tiny_run(tmp_path, family="gemma3_text")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {
        name: torch.full_like(tensor, 30_000) if "post_feedforward_layernorm" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"no numbers where it computes in float16, .* --dtype bfloat16 keeps"):
        export_run(run, Options())
    folder = export_run(run, Options(dtype="bfloat16", force=True))
    assert read_proof(folder).verified
