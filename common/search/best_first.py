"""Best-first search over reasoning steps: A*-decoding (Chatziveroglou 2025) and its relatives by their priority.

A state's priority is f = g + h: h = 1 - r says how far the scorer thinks it is from a right answer, and g charges what
has gone wrong on the way. Open states of all depths wait in one queue; the lowest f is extended next.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.generation.steps import State
from common.search.core import Budget, Cost, Propose, Score, SearchResult, best_of, check_n, check_problems, scored

STOPS = ("first_goal", "budget")


@dataclass(frozen=True)
class Node:
    """An open state: g and f = g + h."""

    state: State
    g: float
    h: float

    @property
    def f(self) -> float:
        return self.g + self.h


StepCost = Callable[[Node, State, float], float]  # (parent, child, h of the child) -> cost of the step


def increase(parent: Node, child: State, h: float) -> float:
    """max(0, h' - h): a loss of confidence is charged for good."""
    return max(0.0, h - parent.h)


def consistent(parent: Node, child: State, h: float) -> float:
    """max(0, h - h'): the smallest cost that makes h consistent, so that f never falls along a path."""
    return max(0.0, parent.h - h)


def zero(parent: Node, child: State, h: float) -> float:
    """Nothing: greedy best-first search."""
    return 0.0


def length(parent: Node, child: State, h: float) -> float:
    """A tenth a step: shorter answers first."""
    return 0.1


def surprise(parent: Node, child: State, h: float) -> float:
    """A tenth of the mean negative log-probability of the step's tokens."""
    return -0.1 * child.logprobs[-1] / child.step_tokens


def total(parent: Node, child: State, h: float) -> float:
    """h' itself, as in uniform-cost search."""
    return h


STEP_COSTS: dict[str, StepCost] = {
    "increase": increase,
    "consistent": consistent,
    "zero": zero,
    "length": length,
    "surprise": surprise,
    "total": total,
}


def a_star(
    problems: Sequence[int],
    propose: Propose,
    score: Score,
    budget: Budget | None = None,
    *,
    k: int = 4,
    step_cost: str = "increase",
    stop: str = "first_goal",
    root_score: float = 1.0,
    max_open: int | None = None,
    reserve: int = 0,
) -> SearchResult:
    """Extends the open state of the lowest f by k steps, again and again; one state of each problem a round.

    step_cost: one of STEP_COSTS. stop: 'first_goal' takes the first finished answer that leaves the queue; 'budget'
    goes on until the budget is spent (or nothing is open) and takes the finished answer of the highest score.
    root_score: r of the empty answer. max_open: states kept in the queue, the worst are dropped. reserve: tokens kept
    back for the end: if the budget ends without a finished answer, the best open state is completed step by step. A
    budget of no more than the reserve is one sample.
    Equal steps of one parent are charged but scored and kept once. Ties in f: lower h, then deeper, then older.
    trace: for each extension f, h, depth, children kept.
    Raises ValueError for k < 1, an unknown step_cost or stop, and root_score outside [0, 1].
    """
    check_n(k, "k")
    if step_cost not in STEP_COSTS:
        raise ValueError(f"unknown step_cost {step_cost!r}; known: {', '.join(STEP_COSTS)}")
    if stop not in STOPS:
        raise ValueError(f"unknown stop {stop!r}; known: {', '.join(STOPS)}")
    if not 0 <= root_score <= 1:
        raise ValueError(f"root_score lies in [0, 1], not {root_score}")
    problems, budget = check_problems(problems), budget or Budget()
    searches = {p: _Search(p, root_score, max_open) for p in problems}
    limit = None if budget.tokens is None else budget.tokens - reserve
    while True:
        chosen = {}
        for p, search in searches.items():
            affordable = budget.allows(search.cost) and (limit is None or search.cost.tokens < limit)
            node = search.next_open(stop) if affordable else None
            if node is not None:
                chosen[p] = node
        if not chosen:
            break
        parents = [(p, node) for p, node in chosen.items() for _ in range(k)]
        samples = [searches[p].draws + i for p in chosen for i in range(k)]
        children = propose([node.state for _, node in parents], samples)
        fresh: list[tuple[Node, State]] = []
        for (p, node), child in zip(parents, children, strict=True):
            searches[p].cost.add(child)
            if all(other.tokens != child.tokens or other.problem != p for _, other in fresh[-k:]):
                fresh.append((node, child))
        costs = {p: search.cost for p, search in searches.items()}
        for (node, _), child in zip(fresh, scored([state for _, state in fresh], score, costs), strict=True):
            h = 1.0 - child.scores[-1]
            searches[child.problem].push(Node(child, node.g + STEP_COSTS[step_cost](node, child, h), h))
        for p, node in chosen.items():
            kept = sum(child.problem == p for _, child in fresh)
            searches[p].draws += k
            searches[p].trace.append({"f": node.f, "h": node.h, "depth": len(node.state.ends), "children": kept})
    _finish([search for search in searches.values() if not search.goals], propose, score, budget)
    best = [s.goals[0] if stop == "first_goal" and s.goals else best_of(s.goals) for s in searches.values()]
    return SearchResult(
        best, [s.goals for s in searches.values()], [s.cost for s in searches.values()],
        [s.trace for s in searches.values()],
    )  # fmt: skip


class _Search:
    """The queue of one problem."""

    def __init__(self, problem: int, root_score: float, max_open: int | None) -> None:
        self.cost, self.goals, self.trace = Cost(), [], []  # type: ignore[var-annotated]
        self.draws = 0  # children drawn so far: each has a random stream of its own
        self.max_open, self.pushed = max_open, 0
        self.queue: list[tuple[float, float, int, int, Node]] = []
        self.push(Node(State(problem), 0.0, 1.0 - root_score))

    def push(self, node: Node) -> None:
        heapq.heappush(self.queue, (node.f, node.h, -len(node.state.ends), self.pushed, node))
        self.pushed += 1
        if self.max_open is not None and len(self.queue) > self.max_open:
            self.queue.remove(max(self.queue))
            heapq.heapify(self.queue)

    def next_open(self, stop: str) -> Node | None:
        """The next state to extend; finished ones on the way are goals. None: the search is over."""
        while self.queue and not (self.goals and stop == "first_goal"):
            node = heapq.heappop(self.queue)[-1]
            if not node.state.done:
                return node
            self.goals.append(node.state)
        return None


def _finish(searches: list[_Search], propose: Propose, score: Score, budget: Budget) -> None:
    """Completes the best open state of searches that found nothing, as far as the budget allows."""
    live = {}
    for search in searches:
        if search.queue:
            node = heapq.heappop(search.queue)[-1]
            if node.state.done:
                search.goals.append(node.state)
            else:
                live[node.state.problem] = (search, node.state)
    while live := {p: (s, state) for p, (s, state) in live.items() if not state.done and budget.allows(s.cost)}:
        children = propose([state for _, state in live.values()], [search.draws for search, _ in live.values()])
        for child in children:
            search = live[child.problem][0]
            search.cost.add(child)
            live[child.problem] = (search, child)
        done = [child for child in children if child.done]
        for state in scored(done, score, {p: search.cost for p, (search, _) in live.items()}):
            live[state.problem][0].goals.append(state)
