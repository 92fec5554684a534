"""The shared stages in the smoke profile, on their own configuration files."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from common.data import corpus
from common.generation.sampler import generate
from common.models.hub import load_model, load_tokenizer
from common.shared import experiment

CONF = Path(experiment.__file__).parent / "conf" / "profile"


def configuration(profile: str, folder: Path, stage: str):
    """The profile over cpu.yaml, which must have its keys, and the keys that common.run adds."""
    own = OmegaConf.load(CONF / f"{profile}.yaml")
    own.pop("defaults", None)
    cpu = OmegaConf.load(CONF / "cpu.yaml")
    OmegaConf.set_struct(cpu, True)
    cfg = OmegaConf.merge(cpu, own)
    OmegaConf.set_struct(cfg, False)
    (folder / stage).mkdir()
    paths = {"shared": str(folder), "out": str(folder / stage), "checkpoints": str(folder / "checkpoints")}
    return OmegaConf.merge(cfg, {"seed": 0, "stage": stage, "device": "cpu", "profile": profile, **paths})


@pytest.fixture
def few_files(monkeypatch):
    documents = {split: corpus.stdlib_sources(split)[:40] for split in corpus.SPLITS}
    monkeypatch.setattr(corpus, "stdlib_sources", documents.__getitem__)


def run(profile: str, folder: Path, stage: str) -> Path:
    getattr(experiment, stage)(configuration(profile, folder, stage))
    return folder / stage


@pytest.mark.slow
def test_smoke_profile_gives_models_in_hub_format(tmp_path, few_files):
    tokenizer = load_tokenizer(run("smoke", tmp_path, "tokenizer"))
    assert len(tokenizer) == 400
    for stage, kind in (("lm_llama", "llama"), ("lm_qwen2", "qwen2"), ("lm_gpt2", "gpt2")):
        folder = run("smoke", tmp_path, stage)
        model = load_model(folder, dtype=torch.float64)
        assert model.config.model_type == kind
        assert model.config.eos_token_id == load_tokenizer(folder).eos_token_id == 1
        metrics = json.loads((folder / "metrics.json").read_text())
        assert {"parameters", "held_out_loss", "multihop_verbatim", "chain"} <= set(metrics)
        assert len(generate(model, [tokenizer.encode("3+4=")], 4).tokens) == 1


def test_paper_profile_records_the_checkpoint(tmp_path):
    for stage in ("tokenizer", "lm_llama", "lm_qwen2", "lm_gpt2"):
        folder = run("paper", tmp_path, stage)
        assert json.loads((folder / "model.json").read_text()) == {"hub_id": "meta-llama/Llama-2-7b-chat-hf"}
        assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("profile", ["smoke", "gpu", "paper"])
def test_profiles_only_override_what_cpu_has(profile, tmp_path):
    cfg = configuration(profile, tmp_path, "tokenizer")
    assert cfg.steps.keys() == {"lm_llama", "lm_qwen2", "lm_gpt2"}
