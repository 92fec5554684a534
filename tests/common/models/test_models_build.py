"""Building, saving and loading models and tokenizers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.build import SIZES, ModelConfig, build, count_parameters, model_config
from common.models.hub import load_model, load_tokenizer, save_model
from common.models.tokenizer import train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog 0123456789", "def add(a, b):\n    return a + b\n"] * 3


@pytest.mark.parametrize(("name", "low", "high"), [("0.1m", 0.09e6, 0.12e6), ("0.28m", 0.27e6, 0.29e6)])
def test_sizes_are_what_their_names_say(name, low, high):
    counts = {a: count_parameters(build(f"{a}-{name}")) for a in ("llama", "qwen2")}
    assert all(low < count < high for count in counts.values()), counts
    gpt2 = build(f"gpt2-{name}")
    assert low < count_parameters(gpt2) - gpt2.transformer.wpe.weight.numel() < high


@pytest.mark.slow
def test_the_latency_model_has_30_million_parameters():
    assert 29e6 < count_parameters(build("llama-30m", vocab_size=512)) < 31e6


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_weights_follow_the_seed_and_nothing_else(architecture):
    config = ModelConfig(architecture=architecture, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (build(config, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_settings_from_a_name_a_mapping_and_overrides():
    assert model_config("qwen2-0.8m", vocab_size=99) == model_config({"name": "qwen2-0.8m", "vocab_size": 99})
    assert model_config({}, hidden_size=64).hidden_size == 64
    assert model_config(SIZES["30m"]) == SIZES["30m"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("llama-3b", "unknown model 'llama-3b'; known: llama-0.1m"),
        ("mamba-0.1m", "unknown model"),
        ({"architecture": "mamba"}, "unknown architecture 'mamba'; known: llama, qwen2, gpt2"),
        ({"layers": 3}, "unknown model setting layers; known: name, architecture"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 is not a multiple"),
        ({"num_key_value_heads": 3}, "is not a multiple of groups=3"),
        ({"architecture": "gpt2", "num_key_value_heads": 2}, "GPT-2"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        model_config(config)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_save_and_load_gives_the_same_logits(architecture, tmp_path):
    model = build(f"{architecture}-0.1m", seed=1, eos_token_id=1, pad_token_id=0)
    save_model(model, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.bin"))
    loaded = load_model(tmp_path / "model")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id) == (1, 0)
    assert not loaded.training


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*downloads"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json, \*.safetensors missing, found nothing"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"\*.safetensors missing, found config.json, pytorch_model.bin"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json, tokenizer_config.json missing"):
        load_tokenizer(tmp_path)


def test_tokenizer_round_trip(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 280, alone="0123456789+=,$", special_tokens=("<|answer|>",))
    assert len(tokenizer) == 280
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|answer|>")) == (0, 1, 2)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "the fox+4=7,*2=4$ \t\n\n  é 漢 'quoted'  .  "
    ids = tokenizer.encode(text)
    assert loaded.encode(text) == ids
    assert loaded.decode(ids) == text
    assert len(loaded.encode("+4=7,*2=4$")) == 10
    assert loaded.encode("<|answer|><|end|>") == [2, 1]


TOKENIZER = train_tokenizer(TEXTS, 270)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_tokenizer_loses_nothing(text):
    special = set(TOKENIZER.all_special_tokens)
    if not any(token in text for token in special):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_tokenizer_errors():
    with pytest.raises(ValueError, match="vocab_size must be at least 258, not 100"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(ValueError, match="the texts give only"):
        train_tokenizer(["ab"], 5000)
