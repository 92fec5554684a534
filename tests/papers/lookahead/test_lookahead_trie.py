"""The trie: golden drafts, the laws of inserting, forgetting and pruning, oracle and adversarial contents."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation.tree import replay, tree_mask
from papers.lookahead.method import DraftTrie, ReleasedTrie, TrieDrafter
from papers.lookahead.method.trie import MODES, SOURCES, parallel


def walk(node):
    for token, child in node.children.items():
        yield node, token, child
        yield from walk(child)


def all_nodes(trie):
    return [entry for root in trie.roots.values() for entry in walk(root)]


def text_of(rng, n, vocabulary=12):
    """Text in which phrases come back."""
    phrases = [[rng.randrange(2, vocabulary) for _ in range(rng.randrange(2, 7))] for _ in range(5)]
    out = []
    while len(out) < n:
        out += rng.choice(phrases) if rng.random() < 0.8 else [rng.randrange(2, vocabulary)]
    return out[:n]


@pytest.mark.parametrize("kind", [DraftTrie, ReleasedTrie])
def test_golden_drafts(kind):
    """The two cases of the authors' own test (lookahead/tests/test_lookahead_cache.py)."""
    trie = kind(8)
    trie.insert_output([1, 2, 3])
    trie.insert_output([1, 2, 4])
    ids, parents = trie.draft([1], 63, 8, "hier", "mix")
    assert ids == [1, 2, 3, 4]
    mask, depth = tree_mask(parents)
    assert mask.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert depth == [0, 1, 2, 2]
    assert trie.draft([1], 63, 8, "par", "mix") == ([1, 2, 3, 2], [-1, 0, 1, 0])  # as many tokens: 2 comes twice
    assert trie.draft([1], 63, 8, "one", "mix") == ([1, 2, 3], [-1, 0, 1])
    single = kind(8)
    single.insert_output([1, 2, 3, 4])
    assert single.draft([1], 63, 8, "hier", "mix") == ([1, 2, 3, 4], [-1, 0, 1, 2])


def test_counts_are_those_of_the_windows():
    trie = DraftTrie(1)  # windows hold the token after the draft's depth, too: branch_length + 1 successors
    trie.insert_prompt([9, 1, 2, 1, 2, 3])
    trie.insert_output([1, 2, 3])
    one = trie.roots[1].children[2]
    assert (one.input, one.output) == (2, 1.0)
    assert {token: (child.input, child.output) for token, child in one.children.items()} == {1: (1, 0), 3: (1, 1.0)}
    assert 9 not in trie.roots  # the first token of a prompt, mostly the start of text
    assert trie.nodes == len(all_nodes(trie)) == 6


def test_prompt_counts_decide_and_output_counts_break_ties():
    trie = DraftTrie(4)
    for _ in range(50):
        trie.insert_output([1, 7])
    trie.insert_output([1, 6])
    trie.insert_output([1, 6])
    trie.insert_output([1, 8])
    trie.insert_prompt([0, 1, 5, 0])
    assert trie.draft([1], 64, 1, "hier", "mix")[0] == [1, 5, 7, 6, 8]
    assert trie.draft([1], 64, 1, "hier", "output")[0] == [1, 7, 6, 8]
    assert trie.draft([1], 64, 1, "hier", "input")[0] == [1, 5]
    assert trie.draft([1], 64, 1, "one", "mix")[0] == [1, 5]
    # a full draft: half of decoding_length goes to the most frequent outputs, the best scores fill it
    assert trie.draft([1], 3, 1, "hier", "mix")[0] == [1, 5, 7]
    assert trie.draft([1], 4, 1, "hier", "mix")[0] == [1, 5, 7, 6]


def test_the_longer_context_is_taken_if_it_gives_enough():
    trie = DraftTrie(2)
    trie.insert_output([1, 2, 3, 4])
    trie.insert_output([9, 2, 5, 6])
    assert trie.draft([1, 2], 64, 2, "hier", "mix")[0] == [2, 3, 4]
    assert trie.draft([1, 2], 64, 3, "hier", "mix")[0] == [2, 3, 4]
    assert set(trie.draft([1, 2], 64, 4, "hier", "mix")[0]) == {2, 3, 4, 5, 6}  # too few: the last token alone
    assert trie.draft([7, 8], 64, 4, "hier", "mix") == ([8], [-1])


def test_stop_tokens_are_not_looked_up_alone():
    trie = DraftTrie(4, stop_tokens=(2,))
    trie.insert_output([1, 2, 3])
    assert trie.draft([5, 2], 64, 4, "hier", "mix") == ([2], [-1])
    assert trie.draft([1, 2], 64, 4, "hier", "mix")[0] == [2, 3]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    decoding_length=st.integers(1, 40),
    depth=st.integers(0, 8),
    mode=st.sampled_from(MODES),
    source=st.sampled_from(SOURCES),
    kind=st.sampled_from([DraftTrie, ReleasedTrie]),
)
def test_drafts_are_trees_of_seen_continuations(seed, decoding_length, depth, mode, source, kind):
    rng = random.Random(seed)
    trie = kind(6)
    prompt, output = text_of(rng, 30), text_of(rng, 40)
    trie.insert_prompt(prompt)
    trie.insert_output(output)
    seen = {"input": [prompt[1:]], "output": [output], "mix": [prompt[1:], output]}[source]
    windows = {tuple(text[i : i + n]) for text in seen for i in range(len(text)) for n in range(1, 9)}
    for at in range(2, 40):
        ids, parents = trie.draft(output[at - 2 : at], decoding_length, min(depth, 6), mode, source)
        mask, depths = tree_mask(parents)
        assert len(ids) <= max(1, decoding_length)
        assert max(depths) <= depth
        assert ids[0] == output[at - 1]
        if kind is DraftTrie:  # the released code also drafts what the source has not seen
            for row in range(1, len(ids)):
                assert tuple(ids[i] for i in mask[row].nonzero()[0]) in windows
        if mode == "hier":
            assert len({(parent, token) for parent, token in zip(parents, ids, strict=True)}) == len(ids)
        if mode == "one":
            assert parents == list(range(-1, len(ids) - 1))


@given(st.integers(1, 40), st.integers(0, 1000))
def test_parallel_branches_are_paths_of_the_tree_in_as_many_tokens(size, seed):
    rng = random.Random(seed)
    ids, parents = list(range(size)), [-1]
    stack = [0]
    while len(parents) < size:  # depth-first, as drafts are laid out
        stack = stack[: rng.randrange(len(stack)) + 1]
        parents.append(stack[-1])
        stack.append(len(parents) - 1)
    flat_ids, flat_parents = parallel(ids, parents)
    mask, _ = tree_mask(flat_parents)
    branches = [[flat_ids[i] for i in mask[row].nonzero()[0]] for row in range(len(flat_ids))]
    paths = [[ids[i] for i in tree_mask(parents)[0][row].nonzero()[0]] for row in range(size)]
    assert len(flat_ids) == size
    assert all(branch in paths for branch in branches)
    inner = set(flat_parents) - {0}
    assert all(flat_parents.count(row) == 1 for row in inner if row > 0)  # only the root has several children


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([DraftTrie, ReleasedTrie]))
def test_a_request_leaves_no_prompt_counts_and_the_counters_stay_right(seed, kind):
    rng = random.Random(seed)
    trie = kind(5, prune_after=3, max_output_nodes=20)
    for _ in range(6):
        trie.insert_prompt(text_of(rng, 25))
        answer = text_of(rng, 20)
        while answer:
            step = rng.randrange(1, 5)
            trie.stream_output(answer[:step])
            answer = answer[step:]
        trie.end_request()
        assert all(child.input == 0 for _, _, child in all_nodes(trie))
        assert trie.nodes == len(all_nodes(trie))
        if kind is DraftTrie:
            assert all(child.output > 0 for _, _, child in all_nodes(trie))
            assert all(root.output_nodes == root.nodes for root in trie.roots.values())


def test_streaming_an_output_counts_what_inserting_it_whole_counts():
    text = text_of(random.Random(1), 60)
    whole, streamed = DraftTrie(4), DraftTrie(4)
    whole.insert_output(text)
    for at in range(0, 60, 7):
        streamed.stream_output(text[at : at + 7])
    streamed.end_request()

    def counts(trie):
        def of(node):
            return {token: (child.output, of(child)) for token, child in node.children.items()}

        return {token: of(root) for token, root in trie.roots.items()}

    assert counts(streamed) == counts(whole)


def test_pruning_halves_and_never_keeps_a_child_of_a_deleted_node():
    trie = DraftTrie(3, prune_after=1, max_output_nodes=3)
    for _ in range(4):
        trie.insert_output([1, 2, 3, 4])
    trie.insert_output([1, 5, 6, 7])
    trie.end_request()
    node, path = trie.roots[1], []
    while node.children:
        ((token, node),) = node.children.items()
        path.append((token, node.output))
    assert path == [(2, 2.0), (3, 2.0), (4, 2.0)]
    assert trie.roots[1].nodes == 3
    assert trie.roots[2].children[3].output == 4.0  # small trees are left alone


@pytest.mark.parametrize("branch_length", [1, 3, 12])
@pytest.mark.parametrize("mode", MODES)
def test_an_oracle_commits_branch_length_and_one_tokens_a_pass(branch_length, mode):
    """Every token once in the answer, and the answer in the trie: all drafts are right, so the passes are known."""
    prompt, answer = [200, 100], list(range(40))
    trie = DraftTrie(branch_length)
    trie.insert_output([100, *answer])
    drafter = TrieDrafter(trie, 64, mode, "mix")
    drafter.start(prompt)
    told = replay(drafter.draft, prompt, answer, drafter.commit)
    full, rest = divmod(len(answer), branch_length + 1)
    assert told.accepted == [branch_length + 1] * full + ([rest] if rest else [])


def test_an_adversarial_trie_costs_no_pass():
    rng = random.Random(0)
    answer = list(range(30))
    trie = DraftTrie(12)
    for _ in range(20):  # after every token something that does not follow it
        trie.insert_output([token for i in range(30) for token in (i, 50 + rng.randrange(20))])
    drafter = TrieDrafter(trie, 64, "hier", "mix")
    drafter.start([40, 0])
    told = replay(drafter.draft, [40, 0], answer, drafter.commit)
    assert told.accepted == [1] * 30
    assert min(told.drafted[:-2]) > 1  # with room for one token any result is enough, so the last token is not tried


@pytest.mark.parametrize(("decoding_length", "branch_length"), [(1, 12), (64, 0)])
def test_no_room_for_a_draft_is_plain_decoding(decoding_length, branch_length):
    trie = DraftTrie(branch_length)
    trie.insert_output(list(range(30)))
    drafter = TrieDrafter(trie, decoding_length, "hier", "mix")
    drafter.start([5, 0])
    assert replay(drafter.draft, [5, 0], list(range(1, 20)), drafter.commit).accepted == [1] * 19


def test_nothing_behind_an_end_token_is_inserted():
    drafter = TrieDrafter(DraftTrie(4), 64, "hier", "mix")
    drafter.start([3, 4, 5, 1, 6, 7], end_tokens=(1,))
    drafter.commit([8, 9, 1, 2])
    drafter.finish()
    assert set(drafter.trie.roots) == {4, 8}


def test_released_code_drops_prompt_nodes_from_a_full_mix():
    """The slip that `ReleasedTrie` keeps: with more candidates than room only frequent outputs are drafted."""
    drafts = {}
    for kind in (DraftTrie, ReleasedTrie):
        trie = kind(4)
        trie.insert_prompt([0, 1, 5, 6, 7, 8])
        for token in (20, 21, 22, 23):
            for _ in range(2):
                trie.insert_output([1, token, token + 10])
        drafts[kind] = set(trie.draft([1], 6, 4, "hier", "mix")[0])
    assert {5, 6} <= drafts[DraftTrie]
    assert not {5, 6, 7, 8} & drafts[ReleasedTrie]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branch_length": -1}, "branch_length must be at least 0, not -1"),
        ({"max_nodes": 0}, "max_nodes must be at least 1, not 0"),
        ({"max_output_nodes": 0}, "max_output_nodes must be at least 1, not 0"),
        ({"prune_after": 0}, "prune_after must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DraftTrie(**options)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ((0, "hier", "mix"), "decoding_length counts the root, so it is at least 1, not 0"),
        ((64, "tree", "mix"), "unknown mode 'tree'; known: hier, par, one"),
        ((64, "hier", "both"), "unknown source 'both'; known: input, output, mix"),
    ],
)
def test_unknown_mode_source_or_length(settings_, message):
    with pytest.raises(ValueError, match=message):
        TrieDrafter(DraftTrie(), *settings_)
