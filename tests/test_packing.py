"""Inputs token by token, and groupings that are as good as claimed."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_world import make_store, real_documents

from realm_fast.errors import DataError
from realm_fast.packing import (
    NO_TOKENS,
    SpecialTokens,
    block_input,
    body_mask,
    body_starts,
    bucket_by_length,
    joint_input,
    null_block_input,
    pack_blocks,
    pack_rows,
    pad_batch,
    padded_length,
    plan_packs,
    query_input,
)

CLS, SEP, PAD, MASK = 101, 102, 7, 103  # a padding id that is no zero, so that a forgotten one shows
SPECIAL = SpecialTokens(CLS, SEP, PAD, MASK)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


@pytest.mark.parametrize(
    ("row", "ids", "segments"),
    [
        (query_input(tokens(5, 6), SPECIAL), [CLS, 5, 6, SEP], [0, 0, 0, 0]),
        (block_input(tokens(1), tokens(5, 6), SPECIAL), [CLS, 1, SEP, 5, 6, SEP], [0, 0, 0, 1, 1, 1]),
        (block_input(NO_TOKENS, tokens(5), SPECIAL), [CLS, SEP, 5, SEP], [0, 0, 1, 1]),
        (null_block_input(SPECIAL), [CLS, SEP, SEP], [0, 0, 1]),
        (
            joint_input(tokens(9, MASK), tokens(5, 6), 7, SPECIAL),
            [CLS, 9, MASK, SEP, 5, 6, SEP],
            [0] * 4 + [1] * 3,
        ),
        (
            joint_input(tokens(9, MASK), tokens(5, 6), 6, SPECIAL),
            [CLS, 9, MASK, SEP, 5, SEP],
            [0] * 4 + [1] * 2,
        ),
        (joint_input(tokens(9, MASK), tokens(5, 6), 5, SPECIAL), [CLS, 9, MASK, SEP, SEP], [0] * 4 + [1]),
        (joint_input(tokens(9), NO_TOKENS, 64, SPECIAL), [CLS, 9, SEP, SEP], [0, 0, 0, 1]),
    ],
    ids=["query", "block", "no title", "null", "joint", "body cut", "body cut away", "joint null"],
)
def test_inputs_token_by_token(row, ids, segments):
    assert row.ids.tolist() == ids
    assert row.segments.tolist() == segments


def test_a_query_is_never_cut():
    with pytest.raises(
        DataError, match=r"the query from block 12: 4 tokens and 3 special ones do not fit into 6"
    ):
        joint_input(tokens(1, 2, 3, 4), tokens(5), 6, SPECIAL, what="the query from block 12")


def test_tokens_of_the_store_are_uint16_and_ids_above_2_to_15_survive():
    row = block_input(np.array([40000], np.uint16), np.array([65535], np.uint16), SPECIAL)
    assert row.ids.tolist() == [CLS, 40000, SEP, 65535, SEP]


def test_pad_batch_places_every_token():
    rows = [query_input(tokens(5, 6), SPECIAL), block_input(tokens(1), tokens(8, 9), SPECIAL)]
    batch = pad_batch(rows, PAD)
    assert batch.ids.tolist() == [[CLS, 5, 6, SEP] + [PAD] * 4, [CLS, 1, SEP, 8, 9, SEP] + [PAD] * 2]
    assert batch.segments.tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 4, [True] * 6 + [False] * 2]
    assert [part.dtype for part in batch] == [torch.int64, torch.int64, torch.bool]


@pytest.mark.parametrize(
    ("multiple_of", "max_tokens", "width"), [(1, None, 5), (4, None, 8), (8, 6, 6), (8, 5, 5)]
)
def test_pad_batch_rounds_up_but_not_beyond_what_the_model_takes(multiple_of, max_tokens, width):
    batch = pad_batch([query_input(tokens(1, 2, 3), SPECIAL)], PAD, multiple_of, max_tokens)
    assert batch.ids.shape == (1, width)


def test_pad_batch_of_no_rows():
    assert pad_batch([], PAD).ids.shape == (0, 0)


def test_body_mask_leaves_out_query_special_tokens_and_padding():
    rows = [
        joint_input(tokens(9, MASK), tokens(5, 6), 64, SPECIAL),
        joint_input(tokens(9), NO_TOKENS, 64, SPECIAL),
    ]
    batch = pad_batch(rows, PAD)
    assert body_starts(batch).tolist() == [4, 3]
    assert body_mask(batch).tolist() == [[False] * 4 + [True] * 2 + [False] * 2, [False] * 8]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_buckets_are_the_cheapest_grouping_there_is(lengths, overhead):
    groups = bucket_by_length(np.array(lengths), multiple_of=4, overhead_tokens=overhead)
    assert sorted(itertools.chain(*(g.tolist() for g in groups))) == list(range(len(lengths)))

    def cost(grouping):
        return sum(
            len(group) * padded_length(max(lengths[i] for i in group), 4) + overhead for group in grouping
        )

    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    contiguous = [
        [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(order)])]
        for n in range(len(order))
        for cuts in itertools.combinations(range(1, len(order)), n)
    ]
    assert cost([g.tolist() for g in groups]) == min(cost(grouping) for grouping in contiguous)


def test_rows_of_a_bucket_keep_their_order():
    groups = bucket_by_length(np.array([50, 3, 50, 4, 49]), overhead_tokens=8)
    assert [g.tolist() for g in groups] == [[1, 3], [0, 2, 4]]


def test_buckets_of_no_rows():
    assert bucket_by_length(np.zeros(0, np.int64)) == []


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 900), st.sampled_from([1, 4, 8]))
@settings(max_examples=80, deadline=None)
def test_packs_hold_every_row_once_within_the_budget(lengths, budget, multiple_of):
    plan = plan_packs(np.array(lengths, dtype=np.int64), budget, multiple_of=multiple_of)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == len(lengths)
    padded = 0
    for start, stop in itertools.pairwise(plan.bounds.tolist()):
        rows = plan.order[start:stop]
        tokens_of_pack = len(rows) * padded_length(max(lengths[i] for i in rows), multiple_of)
        assert len(rows) == 1 or tokens_of_pack <= budget
        padded += tokens_of_pack
    assert (plan.tokens, plan.padded_tokens) == (sum(lengths), padded)
    assert 0 <= plan.padding_waste < 1


def test_packs_waste_under_five_percent_on_lengths_like_those_of_a_corpus():
    lengths = np.clip(np.random.default_rng(0).normal(106, 40, 10_000), 20, 288).astype(np.int64)
    assert plan_packs(lengths, 16384, multiple_of=4).padding_waste < 0.04
    assert plan_packs(lengths, 16384, multiple_of=8).padding_waste < 0.05


@pytest.mark.parametrize("ids", [[], [0], [5, 2, 2, 9], list(range(12))])
def test_many_blocks_at_once_are_the_blocks_one_by_one(tmp_path, ids):
    store = make_store(tmp_path, [*real_documents(12), ("", "A text without a title.")])
    special = SpecialTokens.of(store.tokenizer())
    rows = [block_input(store.title_tokens(i), store.body_tokens(i), special) for i in ids]
    for got, expected in zip(pack_blocks(store, np.array(ids, np.int64), special), pack_rows(rows)):
        assert got.dtype == torch.int64
        assert torch.equal(got, expected)
