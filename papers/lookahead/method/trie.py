"""The trie of token windows and the draft trees made from it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

MODES = ("hier", "par", "one")
SOURCES = ("input", "output", "mix")
OUTPUT_WEIGHT = 1e-4  # w of `score` in a mix: prompt counts decide, output counts break ties
QUERY_LENGTH = 2

DraftTree = tuple[list[int], list[int]]  # ids, parents; the root first


class Node:
    """A token of the trie: how often prompt (`input`) and outputs (`output`) took the path that leads to it.

    Counts never grow along a path, since whatever counts a node has counted those above it.
    """

    __slots__ = ("children", "input", "output")

    def __init__(self) -> None:
        self.children: dict[int, Node] = {}
        self.input = 0
        self.output = 0.0  # pruning halves it


class Root(Node):
    """What followed one token. nodes: all below it; output_nodes: those that outputs went through."""

    __slots__ = ("nodes", "output_nodes")

    def __init__(self) -> None:
        super().__init__()
        self.nodes = 0
        self.output_nodes = 0


Selection = dict[int, list[tuple[int, Node]]]  # id of a node -> its selected children, in the order of the draft


class DraftTrie:
    """Counts of all token windows of prompts and outputs, and draft trees made from them.

    roots: for each token, the tree of the up to branch_length + 1 tokens that followed it. Counts of prompts last until
    `end_request`, those of outputs stay. stop_tokens: ids too common to be looked up alone. A tree with more than
    max_nodes, or max_output_nodes from outputs, is thinned at the end of a request, once prune_after trees have
    changed. Raises ValueError for a number out of range.
    """

    drop_forgotten = True  # nodes that only the prompt went through leave with it

    def __init__(
        self,
        branch_length: int = 12,
        *,
        stop_tokens: Collection[int] = (),
        max_nodes: int = 65536,
        max_output_nodes: int = 512,
        prune_after: int = 1024,
    ) -> None:
        for name, value, least in (
            ("branch_length", branch_length, 0),
            ("max_nodes", max_nodes, 1),
            ("max_output_nodes", max_output_nodes, 1),
            ("prune_after", prune_after, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.branch_length, self.max_nodes, self.max_output_nodes = branch_length, max_nodes, max_output_nodes
        self.prune_after, self.stop_tokens = prune_after, frozenset(stop_tokens)
        self.roots: dict[int, Root] = {}
        self._changed: dict[int, Root] = {}  # since the last pruning
        self._prompted: dict[int, Root] = {}  # by the prompt of this request
        self._pending: list[int] = []  # outputs whose windows are not complete yet

    @property
    def nodes(self) -> int:
        return sum(root.nodes for root in self.roots.values())

    def insert_prompt(self, tokens: Sequence[int]) -> None:
        """Counts every window of a prompt [n]; its first token, the start-of-text of most models, is left out."""
        for i in range(1, len(tokens) - 1):
            root = self._root(tokens[i])
            self._prompted[tokens[i]] = root
            node: Node = root
            for token in tokens[i + 1 : i + 2 + self.branch_length]:
                child = node.children.get(token)
                if child is None:
                    child = node.children[token] = Node()
                    root.nodes += 1
                node = child
                node.input += 1

    def insert_output(self, tokens: Sequence[int]) -> None:
        """Counts every window of a whole output [n], such as an answer of an earlier day."""
        for i in range(len(tokens) - 1):
            self._count_output(tokens[i], tokens[i + 1 : i + 2 + self.branch_length])

    def stream_output(self, tokens: Sequence[int], final: bool = False) -> None:
        """Counts the next tokens of the current output: each window when it is complete, the rest at the end.

        Windows that start with a stop token are left out, which `insert_output` does not do (`stream_put`).
        """
        pending, successors = self._pending, self.branch_length + 1
        pending += tokens
        complete = len(pending) - (1 if final else successors)
        for i in range(complete):
            if pending[i] not in self.stop_tokens:
                self._count_output(pending[i], pending[i + 1 : i + 1 + successors])
        if final:
            pending.clear()
        elif complete > 0:
            del pending[:complete]

    def end_request(self) -> None:
        """Completes the output, forgets the prompt, and prunes if enough trees have changed."""
        self.stream_output((), final=True)
        for root in self._prompted.values():
            self._forget_prompt(root)
            if self.drop_forgotten:
                root.nodes = root.output_nodes
        self._prompted.clear()
        if len(self._changed) >= self.prune_after:
            for root in self._changed.values():
                if root.nodes > self.max_nodes or root.output_nodes > self.max_output_nodes:
                    self._halve(root)
                    root.nodes = root.output_nodes = _size(root)
            self._changed.clear()

    def draft(
        self, context: Sequence[int], decoding_length: int, branch_length: int, mode: str, source: str
    ) -> DraftTree:
        """A draft of at most decoding_length tokens, root included, and depth branch_length, after `context`.

        The last two tokens are looked up, then the last alone if that gave fewer than branch_length tokens (half of
        it in mode 'one'); the later result counts. Nothing found is a draft of the root alone.
        """
        draft: DraftTree = [context[-1]], [-1]
        if decoding_length <= 1 or branch_length <= 0:
            return draft
        enough = branch_length // 2 if mode == "one" else branch_length
        query = context[-QUERY_LENGTH:]
        for i, token in enumerate(query):
            root = self.roots.get(token)
            if root is None or (i == len(query) - 1 and token in self.stop_tokens):
                continue
            node = self._walk(root, query[i + 1 :], source)
            draft = [context[-1]], [-1]
            if node is not None and mode == "one":
                draft = self._one_branch(node, context[-1], min(branch_length, decoding_length - 1), source)
            elif node is not None:
                draft = _lay_out(node, context[-1], self._select(node, decoding_length, branch_length, source))
            if len(draft[0]) >= enough:
                break
        return parallel(*draft) if mode == "par" else draft

    def _select(self, node: Node, decoding_length: int, branch_length: int, source: str) -> Selection:
        """The nodes of a draft: at most decoding_length - 1, none deeper than branch_length below `node`.

        In a mix the decoding_length / 2 most frequent outputs are always in; the best scores fill what is left. Of
        equals the shallower is taken. As counts never grow along a path, the best-first search reaches parents before
        children and stops when the draft is full: it does not see the rest of the tree.
        """
        value, room = score(source), decoding_length - 1
        chosen: dict[int, tuple[Node, int, Node]] = {}
        if source == "mix":
            outputs = _best_first(node, branch_length, score("output"))
            chosen = {id(entry[2]): entry for entry in itertools.islice(outputs, max(decoding_length // 2, 1))}
        for entry in _best_first(node, branch_length, value):
            if len(chosen) >= room:
                break
            chosen[id(entry[2])] = entry
        selected: Selection = {}
        for parent, token, child in sorted(chosen.values(), key=lambda entry: -value(entry[2])):
            selected.setdefault(id(parent), []).append((token, child))
        return selected

    def _branch_score(self, source: str) -> Callable[[Node], float]:
        return score(source)

    def _root(self, token: int) -> Root:
        root = self.roots.get(token)
        if root is None:
            root = self.roots[token] = Root()
        self._changed[token] = root
        return root

    def _count_output(self, first: int, rest: Sequence[int]) -> None:
        root = self._root(first)
        node: Node = root
        for token in rest:
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = Node()
                root.nodes += 1
            node = child
            if not node.output:
                root.output_nodes += 1
            node.output += 1.0

    def _forget_prompt(self, node: Node) -> None:
        """Sets prompt counts below node to zero; below a node without output counts no node has any."""
        for token, child in list(node.children.items()):
            if not child.output and self.drop_forgotten:
                del node.children[token]
            elif child.input:
                child.input = 0
                self._forget_prompt(child)

    def _halve(self, node: Node) -> None:
        """Halves output counts above 1 and drops every other node with all below it (`_squeeze`)."""
        for token, child in list(node.children.items()):
            if child.output > 1:
                child.output /= 2
                self._halve(child)
            else:
                del node.children[token]

    @staticmethod
    def _walk(node: Node, tokens: Sequence[int], source: str) -> Node | None:
        """The node that tokens lead to, if the source has taken that path."""
        value = score(source)
        for token in tokens:
            child = node.children.get(token)
            if child is None or value(child) <= 0:
                return None
            node = child
        return node

    def _one_branch(self, node: Node, last: int, length: int, source: str) -> DraftTree:
        value = self._branch_score(source)
        ids = [last]
        while len(ids) <= length:
            token, child = max(node.children.items(), key=lambda item: value(item[1]), default=(0, None))
            if child is None or value(child) <= 0:
                break
            ids.append(token)
            node = child
        return ids, list(range(-1, len(ids) - 1))


def score(source: str) -> Callable[[Node], float]:
    """(1 - w) * input + w * output (`_ravel`); positive exactly where the source has a count."""
    if source == "input":  # w = 0
        return lambda node: node.input
    if source == "output":  # w = 1
        return lambda node: node.output
    return lambda node: (1 - OUTPUT_WEIGHT) * node.input + OUTPUT_WEIGHT * node.output


def _best_first(node: Node, depth: int, value: Callable[[Node], float]) -> Iterator[tuple[Node, int, Node]]:
    """(parent, token, child) below node, by falling value, then depth, then age; nodes without value are left out."""
    order = itertools.count()
    heap: list[tuple[float, int, int, Node, int, Node]] = []
    level = 1
    while True:
        if level <= depth:
            for token, child in node.children.items():
                if (v := value(child)) > 0:
                    heapq.heappush(heap, (-v, level, next(order), node, token, child))
        if not heap:
            return
        _, level, _, parent, token, node = heapq.heappop(heap)
        level += 1
        yield parent, token, node


def _lay_out(node: Node, last: int, selected: Selection) -> DraftTree:
    """The selected nodes depth-first."""
    ids, parents = [last], [-1]

    def visit(node: Node, row: int) -> None:
        for token, child in selected.get(id(node), ()):
            ids.append(token)
            parents.append(row)
            visit(child, len(ids) - 1)

    visit(node, 0)
    return ids, parents


def parallel(ids: Sequence[int], parents: Sequence[int]) -> DraftTree:
    """The tree's paths from root to leaf one after the other, in as many tokens as the tree has (`par_get`).

    Prefixes that paths share are repeated, so that fewer paths fit; the last one may be cut.
    """
    inner = set(parents)
    flat_ids, flat_parents = [ids[0]], [-1]
    for leaf in range(1, len(ids)):
        if leaf in inner:
            continue
        branch, row = [], leaf
        while row > 0:
            branch.append(ids[row])
            row = parents[row]
        branch = branch[::-1][: len(ids) - len(flat_ids)]
        flat_parents += [0, *range(len(flat_ids), len(flat_ids) + len(branch) - 1)][: len(branch)]
        flat_ids += branch
    return flat_ids, flat_parents


def _size(node: Node) -> int:
    return sum(1 + _size(child) for child in node.children.values())
