"""How requests become vLLM's and its answers ours, with stand-ins of the interfaces of vllm.LLM and its classes."""

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from common.generation import vllm as back
from common.generation.sampler import Generation
from common.generation.sampler import generate as own
from common.generation.steps import needs_transformers
from common.models.build import build
from common.models.hub import save_model


@dataclass
class SamplingParams:
    """The fields of vllm.SamplingParams that are used, with its defaults; another keyword is a TypeError, as there."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


class Engine:
    """Answers as vllm.LLM does: token i of an answer is (last token of the prompt + i) % 10; 9 is the end token."""

    def __init__(self, **settings):
        self.settings, self.asked = settings, []

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        self.asked += list(zip(prompts, sampling_params, strict=True))
        return [
            SimpleNamespace(outputs=[self._answer(p["prompt_token_ids"], s)]) for p, s in self.asked[-len(prompts) :]
        ]

    def _answer(self, ids, params):
        tokens = []
        while len(tokens) < params.max_tokens:
            tokens.append((ids[-1] + len(tokens) + 1) % 10)
            if tokens[-1] in (params.stop_token_ids or ()) or (tokens[-1] == 9 and not params.ignore_eos):
                return SimpleNamespace(token_ids=tuple(tokens), finish_reason="stop", stop_reason=None)
        return SimpleNamespace(token_ids=tuple(tokens), finish_reason="length", stop_reason=None)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SamplingParams, LLM=Engine))
    return Engine()


def test_a_request_says_what_ours_says(engine):
    back.generate(
        engine, [[1, 2], torch.tensor([3])], [4, 5], do_sample=True, temperature=0.7, top_k=3, top_p=0.9, seed=1,
        streams=[7, 8], stop_tokens=[[5], {6, 4}],
    )  # fmt: skip
    (first, a), (second, b) = engine.asked
    assert (first, second) == ({"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]})
    for params in (a, b):
        assert (params.n, params.temperature, params.top_k, params.top_p, params.logprobs) == (1, 0.7, 3, 0.9, None)
        assert params.ignore_eos
        assert not params.detokenize
        assert 0 <= params.seed < 2**63
    assert (a.max_tokens, b.max_tokens) == (4, 5)
    assert (a.stop_token_ids, b.stop_token_ids) == ([5], [4, 6])


def test_seeds_follow_seed_and_stream_and_nothing_else(engine):
    def seeds(**settings):
        engine.asked.clear()
        back.generate(engine, [[1], [2], [3]], 2, do_sample=True, **settings)
        return [params.seed for _, params in engine.asked]

    assert seeds(seed=3) == seeds(seed=3, streams=[0, 1, 2])
    assert seeds(seed=3, streams=[2, 1, 0]) == seeds(seed=3)[::-1]
    assert len({*seeds(seed=3), *seeds(seed=4)}) == 6


def test_greedy_asks_for_temperature_zero_and_no_seed(engine):
    back.generate(engine, [[1]], 2)
    (_, params) = engine.asked[0]
    assert (params.temperature, params.seed, params.top_k, params.top_p) == (0.0, None, 0, 1.0)


def test_stop_tokens_mean_what_they_mean_in_our_sampler(engine):
    assert back.generate(engine, [[7]], 5).tokens[0].tolist() == [8, 9]  # None: the model's own end token
    assert back.generate(engine, [[7]], 5, stop_tokens=()).tokens[0].tolist() == [8, 9, 0, 1, 2]  # () is none
    out = back.generate(engine, [[7], [0]], 5, stop_tokens=[3])
    assert [row.tolist() for row in out.tokens] == [[8, 9, 0, 1, 2], [1, 2, 3]]
    assert out.stopped == [False, True]


def test_the_answer_is_a_generation_with_its_costs(engine):
    out = back.generate(engine, [[1, 2, 3], [7]], 4)
    assert isinstance(out, Generation)
    assert [row.tolist() for row in out.tokens] == [[4, 5, 6, 7], [8, 9]]
    assert all(row.dtype == torch.long for row in out.tokens)
    assert out.stopped == [False, True]
    assert (out.ledger.prompt_tokens, out.ledger.generated_tokens) == (4, 6)
    assert out.ledger.seconds > 0
    assert back.generate(engine, [], 4).tokens == []


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([[]], 2), {}, "prompt 0 must be a non-empty list"),
        (([[1]], 0), {}, "max_new_tokens must be at least 1, not 0"),
        (([[1]], [1, 2]), {}, "max_new_tokens has 2 entries for 1 prompts"),
        (([[1]], 2), {"streams": []}, "0 streams for 1 prompts"),
        (([[1]], 2), {"temperature": 0}, "temperature must be positive, not 0"),
        (([[1]], 2), {"top_p": 0}, r"top_p in \(0, 1\], not 0 and 0"),
        (([[1]], 2), {"stop_tokens": [[1], [2]]}, "2 collections of stop tokens for 1 prompts"),
    ],
)
def test_bad_input(engine, arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        back.generate(engine, *arguments, **settings)
    assert not engine.asked


def test_the_back_end_is_chosen_by_name(engine, tmp_path, monkeypatch):
    model = build("llama-0.28m", vocab_size=16, seed=0).eval()
    save_model(model, tmp_path)
    chosen = back.backend("transformers", str(tmp_path))([[1, 2, 3]], 4, stop_tokens=())
    assert chosen.tokens[0].tolist() == own(model, [[1, 2, 3]], 4, stop_tokens=()).tokens[0].tolist()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bound = back.backend("vllm", tmp_path, dtype=torch.float16, tensor_parallel_size=2)
    asked = {"model": str(tmp_path), "dtype": "float16", "trust_remote_code": False, "tensor_parallel_size": 2}
    assert bound.args[0].settings == asked
    assert bound([[7]], 5).tokens[0].tolist() == [8, 9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        back.backend("vllm", str(tmp_path))
    with pytest.raises(ValueError, match="unknown back end 'sglang'; known: transformers, vllm"):
        back.backend("sglang", str(tmp_path))
    with pytest.raises(ValueError, match="tensor_parallel_size: settings of the vllm back end"):
        back.backend("transformers", str(tmp_path), tensor_parallel_size=2)
    half = back.backend("transformers", tmp_path, dtype=torch.bfloat16)
    assert half.args[0].dtype == torch.bfloat16


def test_work_on_the_cache_refuses_other_back_ends():
    needs_transformers("transformers", "search")
    with pytest.raises(ValueError, match="search works on the KV cache and needs backend=transformers, not vllm"):
        needs_transformers("vllm", "search")


def test_without_vllm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install \.\[gpu\]"):
        back.generate(Engine(), [[1]], 2)


def test_importing_the_back_end_imports_no_vllm():
    code = "import sys, common.generation.vllm; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
