"""The trie as released, slips included: what the authors' numbers were measured with.

Compared draft by draft with lookahead_cache.py of alipay/PainlessInferenceAcceleration at commit 78c9b00; see README.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from papers.lookahead.method.trie import DraftTrie, Node, Selection, score


class ReleasedTrie(DraftTrie):
    """A `DraftTrie` that drafts as the released code does. What differs stands at the method that does it."""

    drop_forgotten = False  # nodes that only earlier prompts went through stay, and can be drafted (see `_select`)

    def _count_output(self, first: int, rest: Sequence[int]) -> None:
        """Nodes that a prompt made stay out of the count that decides about pruning (`Tree._put`)."""
        root = self.roots.get(first)
        before = (root.nodes, root.output_nodes) if root is not None else (0, 0)
        super()._count_output(first, rest)
        root = self.roots[first]
        root.output_nodes = before[1] + root.nodes - before[0]

    def _select(self, node: Node, decoding_length: int, branch_length: int, source: str) -> Selection:
        """`Tree.get` and `_ravel`: cut-offs on the counts, then depth-first until the draft is full.

        In a mix with more candidates than decoding_length the fill by best score admits nothing, because the records
        of the candidates lack the ids that tell them apart: only nodes with enough output counts are drafted. With
        fewer candidates nothing is tested: nodes without a count in the source are drafted too, last. And a source
        'output' is cut at decoding_length / 2 nodes and their equals instead of being filled up.
        """
        counted = list(_counted(node))
        inputs = sorted((n.input for n in counted), reverse=True)
        outputs = sorted((n.output for n in counted), reverse=True)
        candidates = sum(score(source)(n) > 0 for n in counted)
        least_input = least_output = 0.0
        if candidates > decoding_length:
            least_input, least_output = inputs[-1], outputs[max(decoding_length // 2, 1) - 1]
        size, selected = 1, Selection()

        def visit(node: Node, depth: int) -> None:
            nonlocal size
            for token, child in sorted(node.children.items(), key=lambda item: -score(source)(item[1])):
                if size >= decoding_length or depth == 0:
                    return
                if child.input >= least_input if source == "input" else child.output >= least_output:
                    size += 1
                    selected.setdefault(id(node), []).append((token, child))
                    visit(child, depth - 1)

        visit(node, branch_length)
        return selected

    def _branch_score(self, source: str) -> Callable[[Node], float]:
        """`get_one_branch` swaps the two counts of a mix: outputs decide and the prompt breaks ties."""
        if source == "mix":
            return lambda node: 10000 * node.output + node.input
        return score(source)


def _counted(node: Node) -> Iterator[Node]:
    for child in node.children.values():
        if child.input or child.output:
            yield child
            yield from _counted(child)
