"""Save and load models and tokenizers in hub format: a folder with config.json and safetensors; no code, no pickles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def save_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes config.json, generation_config.json and safetensors weights into `folder` (made if absent)."""
    with no_bars():
        model.save_pretrained(folder)


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", network: bool = False
) -> PreTrainedModel:
    """A causal language model from a folder in hub format, or from a hub id if `network` is true; evaluation mode, CPU.

    Raises FileNotFoundError that names what is missing: the folder, config.json or the safetensors weights (weights
    in other formats are never read), and says how a hub id is allowed.
    """
    from transformers import AutoModelForCausalLM

    check_source(source, network, ["config.json"], "*.safetensors")
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=not network,
        )
    return model.eval()


def load_tokenizer(source: str | Path, *, network: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder in hub format, or from a hub id if `network` is true; errors as `load_model`."""
    from transformers import AutoTokenizer

    check_source(source, network, ["tokenizer.json", "tokenizer_config.json"])
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=not network)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars that `transformers` shows for every file, however small."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_source(source: str | Path, network: bool, files: list[str], weights: str | None = None) -> None:
    folder = Path(source)
    if not folder.is_dir():
        if network and isinstance(source, str):
            return  # a hub id
        hint = "" if network else "; a hub id needs a profile that allows downloads"
        raise FileNotFoundError(f"no folder {str(source)!r} in hub format{hint}")
    missing = [name for name in files if not (folder / name).is_file()]
    if weights and not any(folder.glob(weights)):
        missing.append(weights)
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} is not in hub format: {', '.join(missing)} missing, found {found}")
