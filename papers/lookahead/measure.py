"""What `infer` measures: decoders side by side, exactness, replayed sweeps, the trie's own cost, the time of a pass."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.generation.tree import Decoding, Draft, TreeForward, no_draft, replay, verify_tree
from common.metrics.timing import Timings, compare
from papers.lookahead.decoders import (
    ARMS,
    Memoryless,
    Rows,
    Setting,
    Task,
    choose_sizes,
    decoded,
    drafter_of,
    drafting,
    filled,
    repetition,
    replayed,
    room_of,
    through,
    tokens_per_pass,
    without_collections,
)
from papers.lookahead.method import DraftTrie, LookaheadDecoder

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from papers.lookahead.decoders import Drafter


def side_by_side(
    cfg: DictConfig,
    name: str,
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase,
    task: Task,
    sizes: dict[str, int],
) -> tuple[Rows, Rows]:
    """Every decoder on every test prompt through one loop; greedy's texts become the task's recorded answers.

    Returns the passes, a row a prompt and decoder, and as many rows of the common schema. There `correct` says that the
    text is greedy's, which is what the paper promises; the prompts have no difficulty (0).
    """
    rows, samples, room = [], [], room_of(sizes)
    for arm in ARMS:
        drafter = drafter_of(arm, cfg, task, sizes)
        runs = [decoded(model, drafter, task, prompt, room) for prompt in task.prompts["test"]]
        if arm == "greedy":
            task.answers["test"] = [run.tokens.tolist() for run in runs]
        for problem, (prompt, answer, run) in enumerate(
            zip(task.prompts["test"], task.answers["test"], runs, strict=True)
        ):
            tokens = run.tokens.tolist()
            rows.append(
                {"model": name, "task": task.name, "arm": arm, "problem": problem, **sizes}
                | {"prompt_tokens": len(prompt), "new_tokens": len(tokens), "forwards": run.forwards}
                | {"drafted": run.drafted, "accepted": run.accepted, "repetition": repetition(tokens)}
                | {"margin": None if tokens == answer else margin(model, prompt, tokens, answer)}
            )
            cost = run.ledger(model.config)
            samples.append(
                {"arm": f"{name}, {arm}", "task": task.name, "problem_id": problem, "difficulty": 0}
                | {"prompt_tokens": cost.prompt_tokens, "output_tokens": cost.generated_tokens}
                | {"discarded_tokens": cost.discarded_tokens, "forwards": cost.forwards, "flops": cost.flops}
                | {"seconds": cost.seconds, "answer": words.decode(tokens, skip_special_tokens=True)}
                | {"correct": tokens == answer}
            )
    return rows, samples


def margin(model: PreTrainedModel, prompt: list[int], tokens: list[int], answer: list[int]) -> float:
    """Distance of the two largest logits where two texts part."""
    place = next((i for i, (a, b) in enumerate(zip(tokens, answer, strict=False)) if a != b), None)
    if place is None:  # one text is the beginning of the other: no choice explains that
        return float("inf")
    with torch.inference_mode():
        ids = torch.tensor([prompt + answer[:place]], device=model.device)
        best = model(input_ids=ids).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def exactness(cfg: DictConfig, name: str, model: PreTrainedModel, tasks: list[Task]) -> Rows:
    """The public decoder against `generate` of transformers, for all modes and sizes; tries start empty and live on."""
    each, end = -(-cfg.exact.prompts // len(tasks)), tasks[0].end
    prompts = [prompt for task in tasks for prompt in task.prompts["test"][:each]][: cfg.exact.prompts]
    expected = [generated(model, prompt, cfg.exact.new_tokens, end) for prompt in prompts]
    rows = []
    for mode in cfg.exact.modes:
        for decoding_length, branch_length in cfg.exact.sizes:
            decoder = LookaheadDecoder(model, decoding_length, branch_length, mode)
            for problem, (prompt, answer) in enumerate(zip(prompts, expected, strict=True)):
                run = decoder.generate(prompt, cfg.exact.new_tokens, end)
                rows.append(
                    {"model": name, "mode": mode, "decoding_length": decoding_length, "branch_length": branch_length}
                    | {"problem": problem, "new_tokens": len(run.tokens), "forwards": run.forwards}
                    | {"same": run.tokens.tolist() == answer}
                )
    return rows


def generated(model: PreTrainedModel, prompt: list[int], new_tokens: int, end: int | None, **options: Any) -> list[int]:
    """Greedy `generate` of transformers."""
    ids = torch.tensor([prompt], device=model.device)
    settings = {"do_sample": False, "eos_token_id": end, "pad_token_id": 0, "max_new_tokens": new_tokens, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, len(prompt) :].tolist()


def sweep(cfg: DictConfig, task: Task) -> Rows:
    """Tokens per pass for every mode, source, decoding_length and branch_length, and for the released code's drafts.

    Tries know the warm-up answers and learn none of the test prompts', so that one serves many cells.
    """
    rows = []
    for branch_length in cfg.sweep.branch_lengths:
        trie = task.drafter(Setting(1, branch_length)).trie
        for decoding_length in cfg.sweep.decoding_lengths:
            cells = [(mode, source, False) for mode in cfg.sweep.modes for source in cfg.sweep.sources]
            for mode, source, released in [*cells, ("hier", "mix", True)]:
                setting = Setting(decoding_length, branch_length, mode, source, released)
                drafter = task.drafter(setting) if released else drafting(trie, setting)
                runs = replayed(drafter, task, count=cfg.sweep.prompts, learn=False)
                passes = sum(run.forwards for run in runs)
                rows.append(
                    {"task": task.name, "drafts": "released code" if released else "as described", "mode": mode}
                    | {"source": source, "decoding_length": decoding_length, "branch_length": branch_length}
                    | {"tokens_per_pass": tokens_per_pass(runs)}
                    | {"drafted_per_pass": sum(sum(run.drafted) for run in runs) / passes}
                )
    return rows


def at_defaults(cfg: DictConfig, task: Task) -> Rows:
    """Passes of each test prompt at the released default sizes, for the claims that name no others."""
    rows = []
    for mode in ("one", "par", "hier"):
        runs = replayed(task.drafter(Setting(cfg.decoding_length, cfg.branch_length, mode)), task)
        rows += _by_problem(runs, {"task": task.name, "mode": mode})
    return rows


def _by_problem(runs: Sequence[Decoding], labels: dict[str, Any]) -> Rows:
    return [
        labels
        | {"problem": problem, "new_tokens": len(run.tokens), "forwards": run.forwards}
        | {"accepted": run.accepted, "repetition": repetition(run.tokens.tolist())}
        for problem, run in enumerate(runs)
    ]


def worst_cases(cfg: DictConfig, task: Task, other: Task) -> Rows:
    """Passes of each test prompt from an empty trie, one of this task, one of another, and one of shuffled answers."""
    rng = random.Random(cfg.seed)
    shuffled = [rng.sample(answer, len(answer)) for answer in task.learnt]
    contents = {"empty trie": [], "warmed trie": task.learnt}
    contents |= {"trie of another domain": other.learnt, "adversarial trie": shuffled}
    setting = Setting(cfg.decoding_length, cfg.branch_length)
    rows = []
    for condition, answers in contents.items():
        runs = replayed(drafting(filled(DraftTrie(cfg.branch_length), answers), setting), task)
        rows += _by_problem(runs, {"task": task.name, "condition": condition})
    return rows


def warm_up_curve(cfg: DictConfig, task: Task) -> Rows:
    """Tokens per pass against the number of answers that filled the trie before the first test prompt."""
    setting = Setting(cfg.decoding_length, cfg.branch_length)
    rows = []
    for count in cfg.sweep.warm:
        drafter = drafting(filled(DraftTrie(cfg.branch_length), task.learnt[:count]), setting)
        rows += _by_problem(replayed(drafter, task), {"task": task.name, "answers": count})
    return rows


@without_collections()  # what it times are tries
def capacities(cfg: DictConfig, task: Task) -> Rows:
    """Tries that may hold so many times decoding_length output nodes a tree: tokens per pass, microseconds, memory.

    Pruned after every request, for at this size of vocabulary the released rule (1024 changed trees) hardly applies.
    """
    setting = Setting(cfg.decoding_length, cfg.branch_length)
    tries, rows = {}, []
    for factor in cfg.sweep.capacities:
        nodes = factor * cfg.decoding_length
        trie = DraftTrie(cfg.branch_length, max_output_nodes=nodes, max_nodes=2 * nodes, prune_after=1)
        for answer in task.learnt:
            trie.insert_output(answer)
            trie.end_request()
        copy = pickle.loads(pickle.dumps(trie, pickle.HIGHEST_PROTOCOL))
        runs = replayed(drafting(copy, setting), task, count=cfg.sweep.prompts)
        tries[factor] = trie
        rows.append(
            {"task": task.name, "capacity": factor, "output_nodes_a_tree": nodes, "nodes": trie.nodes}
            | {"megabytes": bytes_of(trie) / 1e6, "tokens_per_pass": tokens_per_pass(runs)}
        )
    texts = [p + a for p, a in zip(task.prompts["test"], task.answers["test"], strict=True)][: cfg.sweep.prompts]
    contexts = [text[i - 1 : i + 1] for text in texts for i in range(len(text) // 2, len(text))]

    def query(trie: DraftTrie) -> None:
        for context in contexts:
            trie.draft(context, setting.decoding_length, setting.branch_length, setting.mode, setting.source)

    calls: dict[str, Callable[[], Any]] = {str(f): lambda trie=trie: query(trie) for f, trie in tries.items()}
    calls["insert"] = lambda: filled(DraftTrie(cfg.branch_length), task.learnt)
    timings = compare(calls, rounds=cfg.timing.rounds)
    inserted = sum(map(len, task.learnt))
    for row in rows:
        row["query_us"] = 1e6 * timings.median(str(row["capacity"])) / len(contexts)
        row["insert_us_per_token"] = 1e6 * timings.median("insert") / inserted
    return rows


def bytes_of(trie: DraftTrie) -> int:
    """Memory of nodes and their dictionaries."""
    total, stack = 0, list(trie.roots.values())
    while stack:
        node = stack.pop()
        total += sys.getsizeof(node) + sys.getsizeof(node.children)
        stack += node.children.values()
    return total


def timing(
    cfg: DictConfig, name: str, model: PreTrainedModel, task: Task, sizes: dict[str, int], runs: Rows, tokens: int
) -> Rows:
    """Tokens/s of each decoder at batch 1, interleaved, from the same warmed trie each time; prefill included.

    On the first test prompts, with `tokens` answer tokens in all, to which every decoder gave the same text. For the
    main model `generate` of transformers, plain and with its prompt lookup, stands beside them as context: its loop is
    another one. Without Python's cycle collector, as in `timeit`: it would walk the tries of all calls.
    """
    own = [row for row in runs if (row["model"], row["task"]) == (name, task.name)]
    differing = {row["problem"] for row in own if row["margin"] is not None}
    asked, made = [], 0
    for problem, (prompt, answer) in enumerate(zip(task.prompts["test"], task.answers["test"], strict=True)):
        if problem not in differing and made < tokens:
            asked.append(prompt)
            made += len(answer)
    room = room_of(sizes)
    fresh = {
        arm: [drafter_of(arm, cfg, task, sizes) for _ in range(cfg.timing.rounds + 1)] for arm in ARMS
    }  # one for each call: a decoder that has seen the prompts would draft their answers

    def own_loop(arm: str) -> None:
        drafter = fresh[arm].pop()
        for prompt in asked:
            decoded(model, drafter, task, prompt, room)

    def reference(**options: Any) -> None:
        for prompt in asked:
            generated(model, prompt, task.new_tokens, task.end, **options)

    calls: dict[str, Callable[[], Any]] = {arm: lambda arm=arm: own_loop(arm) for arm in ARMS}
    if name == cfg.models[0]:
        calls["generate"] = reference
        calls["generate, prompt lookup"] = lambda: reference(prompt_lookup_num_tokens=sizes["lookup"])
    with without_collections():
        timings = compare(calls, rounds=cfg.timing.rounds)
    labels = {"model": name, "task": task.name, "prompts": len(asked), "tokens": made}
    return [labels | _timed(timings, arm, made) for arm in calls]


def _timed(timings: Timings, arm: str, tokens: int) -> dict[str, Any]:
    ratio, cpu = timings.ratio("greedy", arm), timings.ratio("greedy", arm, "cpu")
    return {
        "arm": arm,
        "tokens_per_s": tokens / timings.median(arm),
        "speed_up": ratio.value,
        "speed_up_low": ratio.low,
        "speed_up_high": ratio.high,
        "speed_up_cpu_time": cpu.value,
        "rounds": ratio.n,
        "contended": sum(timings.contended_rounds[arm]) / ratio.n,
    }


def latency(cfg: DictConfig, models: dict[str, PreTrainedModel]) -> Rows:
    """Milliseconds of a pass with T new tokens over a cache of `context` tokens."""
    rows = []
    for name, model in models.items():
        forward = TreeForward(model, cfg.latency.context + max(cfg.latency.tokens))
        vocabulary = model.config.vocab_size
        with torch.inference_mode():
            forward.prefill([i % vocabulary for i in range(cfg.latency.context)])

            def call(count: int, forward: TreeForward = forward, vocabulary: int = vocabulary) -> None:
                forward([i % vocabulary for i in range(count)], list(range(-1, count - 1)))
                for layer in forward.layers:
                    layer.length = forward.context

            calls = {str(t): lambda t=t: call(t) for t in cfg.latency.tokens}
            timings = compare(calls, rounds=cfg.latency.rounds, min_seconds=0.03)
        for t in cfg.latency.tokens:
            ratio = timings.ratio(str(t), "1")
            rows.append(
                {"model": name, "tokens": t, "ms": 1e3 * timings.median(str(t)), "ratio": ratio.value}
                | {"ratio_low": ratio.low, "ratio_high": ratio.high, "rounds": ratio.n}
                | {"contended": sum(timings.contended_rounds[str(t)]) / ratio.n}
            )
    return rows


@dataclass
class Pass:
    """One recorded pass: the draft and the path through it that the answer takes."""

    ids: list[int]
    parents: list[int]
    path: list[int]
    tokens: list[int]


def recorded(drafter: Drafter, task: Task, problem: int) -> list[Pass]:
    """The passes of a test prompt, with their drafts."""
    prompt, answer = task.prompts["test"][problem], task.answers["test"][problem]
    passes: list[Pass] = []

    def noting(draft: Draft) -> Draft:
        def noted(tokens: list[int], room: int) -> tuple[Sequence[int], Sequence[int]]:
            ids, parents = draft(tokens, room)
            rest = answer[len(tokens) - len(prompt) :]
            path, new = verify_tree(ids, parents, lambda _, done: rest[len(done)], len(rest))
            passes.append(Pass(list(ids), list(parents), path, new))
            return ids, parents

        return noted

    through(drafter, task, prompt, lambda draft, commit: replay(noting(draft), prompt, answer, commit))
    return passes


def trace_driven(cfg: DictConfig, model: PreTrainedModel, task: Task) -> dict[str, Any]:
    """Speed of another model on recorded drafts: it runs every pass and keeps the recorded path, whatever it would say.

    Tokens/s with drafts over tokens/s without, prefill included, at the decoding_length chosen for that model's
    token_cost.
    """
    sizes = choose_sizes(cfg, task, cfg.latency.token_cost)
    drafter = drafter_of("hier", cfg, task, sizes)
    problems = range(min(cfg.latency.prompts, len(task.prompts["test"])))
    drafts = {
        "hier": [recorded(drafter, task, i) for i in problems],
        "greedy": [recorded(Memoryless(no_draft), task, i) for i in problems],
    }

    def drive(arm: str) -> None:
        with torch.inference_mode():
            for i, passes in zip(problems, drafts[arm], strict=True):
                prompt = task.prompts["test"][i]
                forward = TreeForward(model, len(prompt) + task.new_tokens + sizes["decoding_length"])
                unread = prompt[:-1]
                for one in passes:
                    forward(one.ids, one.parents, unread)
                    forward.keep(one.path)
                    unread = []

    timings = compare({arm: lambda arm=arm: drive(arm) for arm in drafts}, rounds=cfg.timing.rounds)
    tokens = sum(len(one.tokens) for passes in drafts["hier"] for one in passes)
    forwards = sum(map(len, drafts["hier"]))
    return {"decoding_length": sizes["decoding_length"], "tokens": tokens, "forwards": forwards} | {
        f"{arm}_{key}": value
        for arm in ("greedy", "hier")
        for key, value in _timed(timings, arm, tokens).items()
        if key != "arm"
    }


def example(cfg: DictConfig, task: Task, words: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A draft tree for the figure: the first with several forks that is accepted 4 deep, else the deepest accepted."""
    drafter = drafter_of("hier", cfg, task, {"decoding_length": min(16, cfg.decoding_length), "lookup": 1})
    passes = [one for i in range(len(task.prompts["test"])) for one in recorded(drafter, task, i)]
    forks = [sum(one.parents.count(row) > 1 for row in range(len(one.ids))) for one in passes]
    deep = [one for one, count in zip(passes, forks, strict=True) if count > 1 and len(one.path) >= 5]
    deep = deep or [max(passes, key=lambda one: len(one.path))]
    return vars(deep[0]) | {"words": [words.decode([token]) for token in deep[0].ids]}
