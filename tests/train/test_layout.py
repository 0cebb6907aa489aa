from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgealign.train.layout import (
    NO_PARENT,
    Segment,
    Tree,
    arrange,
    branches,
    document,
    lay_out,
    pack,
    pair,
    split_by_tokens,
    split_for,
    split_in_rows,
    stack,
)


def test_a_pair_shares_its_prompt_and_hides_its_answers_from_each_other():
    batch = pack([pair((10, 11), (20, 21, 22), (30, 31))])
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 22, 30, 31]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    seen = [[key for key in range(7) if batch.allowed[0, 0, query, key]] for query in range(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 5, 6]]


def test_each_learned_token_is_predicted_from_its_predecessor_on_its_own_path():
    batch = pack([pair((10, 11), (20, 21), (30,))])
    assert batch.source.tolist() == [1, 2, 1]  # both answers begin after the prompt's last token
    assert batch.target.tolist() == [20, 21, 30]
    assert batch.sequence.tolist() == [0, 0, 1]
    assert batch.lengths.tolist() == [2, 1]


def test_taps_follow_the_ancestor_path_and_end_at_its_start():
    batch = pack([document((1, 2, 3), (False,) * 3), pair((10,), (20, 21), (30,))], kernel=4)
    none = 7  # B * T
    assert batch.taps[0].tolist() == [none, 0, 1, none, 3, 4, 3]
    assert batch.taps[1].tolist() == [none, none, 0, none, none, 3, none]
    assert batch.taps[2].tolist() == [none, none, none, none, none, none, none]


def test_an_empty_prompt_leaves_the_first_token_without_a_prediction():
    batch = pack([pair((), (20, 21), (30,))])
    assert batch.lengths.tolist() == [1, 0]
    assert batch.target.tolist() == [21]


def test_a_child_of_an_empty_segment_continues_the_grandparent():
    tree = Tree((
        Segment((5, 6), (False, False)),
        Segment((), (), 0),
        Segment((7,), (True,), 1),
        Segment((8, 9), (True, False), 1),
    ))
    batch = pack([tree], kernel=3)
    assert batch.source.tolist() == [1, 1]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.taps.tolist() == [[5, 0, 1, 1, 3], [5, 5, 0, 0, 1]]
    assert tree.n_learned == int(batch.lengths.sum())


def test_padding_sees_only_padding_and_is_seen_by_no_token():
    batch = stack([document((1, 2, 3), (True,) * 3), document((4,), (True,))], kernel=3, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.allowed[1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    assert batch.n_tokens == 4


def test_learned_tokens_that_others_continue_are_refused():
    tree = Tree((Segment((1,), (True,)), Segment((2,), (True,), 0)))
    with pytest.raises(ValueError, match="only a segment without children may hold learned tokens"):
        pack([tree])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (Tree((Segment((1,), (False,), 0),)), "parent 0 does not come before it"),
        (Tree((Segment((1,), (False,), -2),)), "parent -2 does not come before it"),
        (Tree((Segment((1, 2), (False,)),)), "2 tokens but 1 learned flags"),
    ],
)
def test_a_malformed_tree_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        pack([tree])


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="every row is empty"):
        lay_out([[], []])


def test_any_number_of_branches_become_sequences_in_order():
    batch = pack([branches((1, 2), [(3,), (4, 5), (6, 7, 8)]), document((9, 10), (False, True))])
    assert batch.lengths.tolist() == [1, 2, 3, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), min_size=1, max_size=3)), min_size=1, max_size=5
    ).filter(lambda shapes: any(p or sum(c) for p, c in shapes)),
    st.integers(1, 4),
)
def test_every_token_sees_exactly_its_path(shapes, kernel):
    """Against a slow, obvious walk up the parents."""
    trees, ids = [], iter(range(1, 10_000))
    for prompt, completions in shapes:
        trees.append(branches([next(ids) for _ in range(prompt)], [[next(ids) for _ in range(c)] for c in completions]))
    batch = pack(trees, kernel=kernel)
    flat = batch.input_ids[0].tolist()
    at = {token: i for i, token in enumerate(flat)}
    learned = set()
    for tree in trees:
        for segment in tree.segments:
            before = () if segment.parent == NO_PARENT else tree.segments[segment.parent].ids
            path = [*before, *segment.ids]
            for i in range(len(before), len(path)):
                here = at[path[i]]
                assert batch.position_ids[0, here] == i
                seen = {flat[k] for k in range(len(flat)) if batch.allowed[0, 0, here, k]}
                assert seen == set(path[: i + 1])
                taps = [at[path[i - d]] if i >= d else len(flat) for d in range(1, kernel)]
                assert batch.taps[:, here].tolist() == taps
                if i and segment.learned[i - len(before)]:
                    learned.add((at[path[i - 1]], path[i]))
        assert tree.n_tokens == sum(len(segment.ids) for segment in tree.segments)
    assert set(zip(batch.source.tolist(), batch.target.tolist(), strict=True)) == learned
    assert sum(tree.n_learned for tree in trees) == len(batch.target) == len(learned)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 80))
def test_groups_hold_every_example_once_and_keep_to_the_budget(lengths, budget):
    groups = split_by_tokens(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 80), st.integers(1, 5))
def test_groups_for_several_processes_are_as_many_for_each_where_there_are_enough_examples(lengths, budget, parts):
    groups = split_for(lengths, budget, parts)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert len(groups) % parts == 0 or len(groups) == len(lengths)
    for group in groups:
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1
    if parts == 1:
        assert groups == split_by_tokens(lengths, budget)


def test_a_step_of_one_pass_is_split_evenly_for_two_processes():
    assert split_for([280] * 8, 4096, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert len(split_for([280] * 8, 1000, 2)) == 4  # 3 by the budget
    assert split_for([7], 10, 2) == [[0]]


def test_groups_are_as_few_as_the_budget_allows_and_evenly_filled():
    assert [len(group) for group in split_by_tokens([280] * 8, 2048)] == [4, 4]
    assert split_by_tokens([6, 5, 4, 3], 9) == [[0, 3], [1, 2]]
    assert split_by_tokens([7, 5, 5, 3], 10) == [[0, 3], [1, 2]]
    assert sorted(map(sorted, split_by_tokens([6, 6, 4, 4, 4], 12))) == [[0, 1], [2, 3, 4]]  # even would not fit


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([280] * 4, [[0], [1], [2], [3]]),  # equal lengths need no padding
        ([500, 300, 190], [[0], [1, 2]]),
        ([500, 300, 50], [[0, 1, 2]]),  # two rows would pad 150 of 850
        ([700, 690, 60], [[0], [1, 2]]),
        ([900], [[0]]),
        ([10, 10, 10], [[0, 1, 2]]),
        ([], []),
    ],
)
def test_rows_are_short_unless_that_takes_much_padding(lengths, rows):
    assert split_in_rows(lengths) == rows


def test_arranged_examples_of_all_lengths_make_short_rows_with_little_padding():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(40, 500, 8).tolist()
        arranged = [lengths[i] for i in arrange(lengths)]
        assert sorted(arranged) == sorted(lengths)
        rows = split_in_rows(arranged)
        assert [i for row in rows for i in row] == list(range(len(arranged)))
        width = max(sum(arranged[i] for i in row) for row in rows)
        assert len(rows) * width <= 1.1 * sum(lengths)
        assert width < 0.7 * sum(lengths)


def test_moving_a_batch_moves_every_tensor():
    batch = pack([document((1, 2), (True, True))]).to("meta")
    assert batch.input_ids.device == batch.allowed.device == batch.lengths.device == torch.device("meta")
    assert batch.n_tokens == 2
