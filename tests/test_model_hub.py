"""A hub that cannot be reached, or does not give a model, is one sentence at once with the ways that are left."""

import socket

import pytest
from conftest import run_qtune, run_warm_qtune
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from qtune.errors import ModelError
from qtune.model import hub
from qtune.model.load import load_config, load_tokenizer
from qtune.recipe.schema import Model

GATED = Model(base="owner/gated")
WAYS = 'model.base can also be a local folder, a GGUF file or "builtin:smollm2-135m-instruct"'


@pytest.fixture(autouse=True)
def asked_anew():
    """The answer is kept for a process, and a test is none."""
    hub.is_reachable.cache_clear()
    yield
    hub.is_reachable.cache_clear()


@pytest.fixture
def online(monkeypatch):
    """A hub at an address of this computer; without proxies."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_hub_that_takes_a_connection_is_reachable_and_one_that_does_not_is_not(online):
    assert hub.is_reachable()
    hub.is_reachable.cache_clear()
    online.close()
    assert not hub.is_reachable()
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(GATED)
        assert str(caught.value) == f"owner/gated: is not on this computer, and the hub cannot be reached; {WAYS}"


def test_a_proxy_is_asked_in_the_hubs_place(online, monkeypatch):
    monkeypatch.setenv("http_proxy", constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    assert hub.is_reachable()


def test_offline_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.create_connection", lambda *_: pytest.fail("the network was asked"))
    assert not hub.is_reachable()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "is given only to who accepts its licence: accept it on the model's page, and log in with"),
        (RepositoryNotFoundError, "there is no such model on the hub, or it is private: check the name, or hf auth"),
        (RevisionNotFoundError, "has no revision None on the hub"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(kind, message):
    said = kind.__new__(kind)  # its constructor wants a whole answer of the network
    try:
        raise OSError("You are trying to access a gated repo.\nMake sure …") from said
    except OSError as error:
        refusal = hub.hub_refusal(GATED, error)
    assert str(refusal).startswith(f"owner/gated: {message}")
    assert hub.hub_refusal(GATED, OSError("something else")) is None


@pytest.mark.parametrize("base", ["builtin:x", "./folder", "model.gguf", "/tmp/x", "a/b/c", "x:y", "a--b"])
def test_other_names_are_no_hub_ids(base):
    assert not hub.is_hub_id(base)


@pytest.mark.parametrize("base", ["builtn:smollm2-135m-instruct", "owner/two words", "a--b"])
@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_what_cannot_be_a_name_on_the_hub_is_one_sentence_with_the_ways_that_are_left(base, load):
    with pytest.raises(ModelError) as caught:
        load(Model(base=base))
    assert str(caught.value) == f"{base}: cannot be the name of a model on the hub; {WAYS}"


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_built_in_model_without_its_prefix_is_answered_with_it(load):
    with pytest.raises(ModelError, match=r'; did you mean "builtin:smollm2-135m-instruct"\?$'):
        load(Model(base="SmolLM2-135M-instruct"))


@pytest.mark.slow
def test_a_run_without_a_network_says_so_in_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nbase = "owner/gated"\n[data]\ntrain = "rows.jsonl"\n')
    process = run_warm_qtune("run", recipe, "--set", f"output.directory={tmp_path / 'runs'}")
    assert process.returncode == 2
    # What names the model is said once, though configuration and tokenizer both need it.
    told = f'{recipe}:2: model.base = "owner/gated": is not on this computer, and HF_HUB_OFFLINE is set'
    assert process.stderr == f"error: {told}; {WAYS}\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_check_says_the_memory_of_a_known_model_before_what_is_missing(tmp_path):
    process = run_qtune("check", "llama_lora", "--set", "data.max_length=64")
    assert process.returncode == 2
    assert "GiB" in process.stdout
    assert "its sizes are those that come with qtune" in process.stderr
    assert "error: " in process.stderr
