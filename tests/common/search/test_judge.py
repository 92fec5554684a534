"""A chat model as process reward model, and the workbench on checkpoints in hub format (tiny ones, no network)."""

import numpy as np
import pytest
import torch

from common.generation.steps import State
from common.models.hub import load_model, load_tokenizer
from common.run import compose, run
from common.search.judge import StepJudge
from common.search.particles import particle_filter


def state(words, problem, *steps):
    tokens, ends = [], []
    for step in steps:
        tokens += words.encode(step)
        ends.append(len(tokens))
    return State(problem, tuple(tokens), tuple(ends))


def test_a_step_judge_reads_the_whole_conversation(checkpoint):
    model, words = load_model(checkpoint, dtype=torch.float64), load_tokenizer(checkpoint)
    judge = StepJudge(model, words, ["1+1?", "What is 2+2, and why?"], words.decode, batch=2)
    states = [state(words, 0, "It is 2.\n\n"), state(words, 1, "2 and 2\n\n", "are 4.\n\n"), state(words, 1, "5\n\n")]
    text = "<user>What is 2+2, and why? 2 and 2</><assistant>+</><user>are 4.</><assistant>"
    with torch.no_grad():
        logits = model(torch.tensor([words.encode(text)])).logits[0, -1]
    marks = [words.encode("+")[-1], words.encode("-")[-1]]
    scores = judge(states)
    assert scores[1] == pytest.approx(float(logits[marks].softmax(-1)[0]), abs=1e-9)
    assert len(np.unique(scores.round(9))) == 3
    np.testing.assert_allclose([judge([s])[0] for s in states], scores, atol=1e-9)
    assert judge.ledger.forwards == 2 + 3


def test_a_step_judge_needs_a_chat_model_and_two_marks(checkpoint):
    model, words = load_model(checkpoint), load_tokenizer(checkpoint)
    with pytest.raises(ValueError, match=r"marks '\+' and '\+' are the same token"):
        StepJudge(model, words, ["?"], words.decode, good="+", bad="+")
    words.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        StepJudge(model, words, ["?"], words.decode)


@pytest.mark.slow
def test_the_paper_profile_searches_with_checkpoints_of_the_hub(checkpoint, tmp_path, monkeypatch):
    from common.reasoners import workbench
    from common.tasks import benchmark

    row = {"problem": "What is $2+2$?", "solution": "It is\n\n\\boxed{4}.", "answer": "4", "level": 1}
    monkeypatch.setattr(benchmark, "rows", lambda name, root, network: [row, row | {"problem": "$3+1$?"}])
    monkeypatch.setitem(workbench.STEP_LIMITS, "math500", (8, 3))
    common = ["profile=paper", "device=cpu"]
    for stage in ("reasoner_base", "prm"):
        run("reasoners", stage, [*common, f"hub_ids.{stage}={checkpoint}"], root=tmp_path)
    cfg = compose("reasoners", "prm", [*common, f"root={tmp_path}"])
    cfg.data_root, cfg.network = None, False
    assert workbench.gate(cfg, "base", "chain_hard") is None
    bench = workbench.load(cfg, "math500", 2)
    assert all("\n\n" in bench.words.decode([i]) for i in bench.step_ends)
    out = bench.run(lambda p, propose, score: particle_filter(p, propose, score, n=4), seed=0, stream="pf", width=4)
    assert all(len(pool) == 4 for pool in out.pool)
    assert all(0 < s < 1 for pool in out.pool for s_ in pool for s in s_.scores)
    gold = bench.words.encode("So\n\nthe answer is \\boxed{4}.")
    assert bench.correct(State(0, tuple(gold), (len(gold),), True))
    assert bench.answer(State(0, tuple(gold), (len(gold),), True)) == "4"


HUMANEVAL = [
    {
        "prompt": f'def add{i}(x):\n    """Adds {i}."""\n', "canonical_solution": f"    return x + {i}\n",
        "test": f"def check(f):\n    assert f(1) == {1 + i}\n", "entry_point": f"add{i}",
    }
    for i in range(2)
]  # fmt: skip


@pytest.mark.slow
def test_programs_are_searched_for_only_where_they_may_be_run(checkpoint, tmp_path, monkeypatch):
    from common.reasoners import workbench
    from common.search.sampling import best_of_n
    from common.tasks import benchmark
    from common.tasks.sandbox import CodeExecutionNotAllowed

    monkeypatch.setattr(benchmark, "rows", lambda name, root, network: HUMANEVAL)
    monkeypatch.setitem(workbench.STEP_LIMITS, "humaneval", (12, 1))
    common = ["profile=paper", "device=cpu"]
    for stage in ("reasoner_base", "prm"):
        run("reasoners", stage, [*common, f"hub_ids.{stage}={checkpoint}"], root=tmp_path)

    def configured(*words):
        cfg = compose("reasoners", "prm", [*common, f"root={tmp_path}", *words])
        cfg.data_root, cfg.network = None, False
        return cfg

    with monkeypatch.context() as nothing_is_loaded:
        nothing_is_loaded.setattr("common.models.hub.load_model", None)
        with pytest.raises(CodeExecutionNotAllowed, match="allow_code_execution=true"):
            workbench.load(configured(), "humaneval", 2)
        with pytest.raises(ValueError, match="humaneval needs at least 1 problem, not 0"):
            workbench.load(configured("allow_code_execution=true"), "humaneval", 0)
        cfg = configured()
        cfg.backend = "vllm"
        with pytest.raises(ValueError, match="search works on the KV cache and needs backend=transformers"):
            workbench.load(cfg, "math500", 2)
    bench = workbench.load(configured("allow_code_execution=true"), "humaneval", 2)
    assert bench.step_ends == []
    assert workbench.AS_PROGRAM in bench.words.decode(bench.prompts[0])
    out = bench.run(lambda p, propose, score: best_of_n(p, propose, score, n=2), seed=0, stream="bon", width=2)
    assert all(len(state.ends) == 1 for pool in out.pool for state in pool)
    assert [row["correct"] for row in bench.records(out)] == [False, False]  # run, and wrong: nobody trained it
    gold = bench.words.encode(f"```python\n{bench.problems[1].prompt}{bench.problems[1].answer}```")
    assert bench.correct(State(1, tuple(gold), (len(gold),), True))
    assert not bench.correct(State(0, tuple(gold), (len(gold),), True))
