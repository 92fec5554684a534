"""Shared by all tests: light threads, no network, no user settings."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(autouse=True)
def _two_workers_share_the_cores():
    """pytest runs in two workers: one torch thread each is faster than two that wait for each other."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def smoke_stages(tmp_path_factory):
    """(slug, the reasoners that it reads) -> a folder in which they and the paper have run, smoke, up to infer."""
    from common.run import run

    def ran(slug, *reasoners):
        folder = tmp_path_factory.mktemp("smoke")
        for name, stage in [("reasoners", stage) for stage in reasoners] + [(slug, "train"), (slug, "infer")]:
            run(name, stage, ["profile=smoke", "device=cpu"], root=folder)
        return folder

    return ran


@pytest.fixture
def missing_outputs():
    """(slug, root) -> what the paper's dvc.yaml says that `figures` writes and a smoke run under root did not."""
    from pathlib import Path

    import yaml

    def missing(slug: str, root: Path) -> list[str]:
        stage = yaml.safe_load(Path("papers", slug, "dvc.yaml").read_text())["stages"]["figures"]
        entries = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        paths = [(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]
        paths = [path.replace("${item.profile}", "smoke") for path in paths]
        assert paths
        return [path for path in paths if not (root / path).exists()]

    return missing


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint in hub format: a random Llama with a byte tokenizer that has a blank line and an end of thinking as
    single tokens, and a chat template."""
    import torch

    from common.models.build import build
    from common.models.hub import save_model
    from common.models.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    texts = [*["Four.\n\n"] * 100, "So the answer is \\boxed{4}.", "+-0123456789<user></><assistant><system>"]
    words = train_tokenizer(texts, 270, alone="+-")
    words.add_tokens(["</think>"])
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    words.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = build(sizes, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=0, seed=3)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # texts must matter to a model that nobody trained
    model.generation_config.eos_token_id = words.eos_token_id
    save_model(model, folder)
    words.save_pretrained(folder)
    return folder
