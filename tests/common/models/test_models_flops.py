"""The closed-form FLOP count against torch's counter, with eager attention: it does not see the CPU's fused kernel."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.models.build import build
from common.models.flops import forward_flops

CONFIGS = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"num_key_value_heads": 4},
    "gpt2": {},
}


def tiny(architecture: str) -> torch.nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return build({"architecture": architecture, **sizes, **CONFIGS[architecture]}, attention="eager")


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("batch", "past", "new", "logits"), [(1, 0, 7, 7), (3, 7, 1, 1), (2, 9, 5, 2)])
def test_exact_against_the_counter(architecture, batch, past, new, logits):
    model = tiny(architecture)
    cache = None
    if past:
        cache = model(torch.ones(batch, past, dtype=torch.long), use_cache=True).past_key_values
    positions = torch.arange(past, past + new).expand(batch, -1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            torch.ones(batch, new, dtype=torch.long),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits,
        )
    assert counter.get_total_flops() == forward_flops(model.config, new, past, batch, logits)


def test_unknown_architecture_and_negative_counts():
    config = tiny("gpt2").config
    with pytest.raises(ValueError, match="new_tokens=-1"):
        forward_flops(config, -1)
    config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba'; known: llama, qwen2, gpt2"):
        forward_flops(config, 1)
