"""What must import where: the folder `kernels` beside transformers, and the packages without Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.run import ROOT

HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_llama_loads_from_the_repository_root_although_kernels_is_importable(tmp_path):
    """transformers imports a package of the hub that is also called `kernels`; ours must not be taken for it."""
    program = f"""
import kernels, torch
assert kernels.__file__ == {str(ROOT / "kernels" / "__init__.py")!r}, kernels.__file__
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
AutoModelForCausalLM.from_config(config).save_pretrained({str(tmp_path)!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(model(torch.arange(4)[None]).logits.shape, model.generate(torch.arange(4)[None], max_new_tokens=2).shape)
from transformers.utils import is_kernels_available
print("kernels:", is_kernels_available())
"""
    said = python(program)
    assert "torch.Size([1, 4, 32])" in said
    assert "kernels: False" in said


@pytest.mark.slow
def test_everything_imports_without_triton():
    """As on macOS: each module of common and kernels, except those that are only there to be run."""
    program = f"""
{HIDE}
import importlib, pkgutil
import common, kernels
names = [m.name for p in (common, kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in ["common", "kernels", *names]:
    importlib.import_module(name)
assert "triton" not in sys.modules
print(len(names), "modules")
"""
    count = int(python(program).split()[0])
    assert count > 30


def test_importing_the_packages_is_cheap():
    """DVC starts a process a stage: what the packages and the runner import by themselves is paid each time."""
    heavy = ("torch", "pandas", "transformers", "matplotlib")
    said = python(f"import common.run, kernels, papers, sys; print([m for m in {heavy} if m in sys.modules])")
    assert said.strip() == "[]"
