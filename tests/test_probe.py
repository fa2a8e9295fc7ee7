"""How often the masked span stands in what was retrieved."""

import numpy as np
import pytest
import torch
from model_world import make_store

from realm_fast.masking import MaskedQuery
from realm_fast.probe import span_ranks
from realm_fast.retriever import Candidates
from realm_fast.types import NO_BLOCK

TEXTS = (
    "The old town of New York lies by the river.",  # where the sentences were cut from
    "Many people live in New York.",
    "Many people live in York.",
    "The river is long.",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("probe"), [("", text) for text in TEXTS])


def masked(store, words, *, labels=10):
    """The first block as one sentence with these words masked; the loss sees the first `labels` of them."""
    tokenizer, body = store.tokenizer(), store.body_tokens(0)
    span = tokenizer.encode(words).ids
    first = next(i for i in range(len(body)) if np.array_equal(body[i : i + len(span)], span))
    tokens = body.copy()
    tokens[first : first + len(span)] = tokenizer.mask_id
    positions = np.arange(first, first + len(span), dtype=np.int32)[:labels]
    return MaskedQuery(0, tokens, positions, body[positions], (0, len(body)))


def found(store, query, ids, *, null_block):
    """span_ranks of one query with these candidates."""
    block_ids = torch.tensor([[*([NO_BLOCK] if null_block else []), *ids]])
    is_null = torch.zeros(block_ids.shape, dtype=torch.bool)
    is_null[0, 0] = null_block
    present = is_null | (block_ids != NO_BLOCK)
    candidates = Candidates(
        block_ids, is_null, present, torch.zeros(block_ids.shape), 0, 0, 0, block_ids[:, :0]
    )
    return span_ranks(store, [query], candidates)


@pytest.mark.parametrize("null_block", [True, False])
def test_the_place_of_the_first_block_with_the_span(store, null_block):
    query = masked(store, "New York")
    assert found(store, query, [1, 2, 3], null_block=null_block) == [0]
    assert found(store, query, [2, 3, 1], null_block=null_block) == [2]
    assert found(store, query, [2, 3, NO_BLOCK], null_block=null_block) == [-1]
    assert found(store, masked(store, "York"), [3, 2, 1], null_block=null_block) == [1]


def test_a_span_is_looked_for_as_a_whole_though_the_loss_sees_its_beginning(store):
    query = masked(store, "York lies", labels=1)
    assert found(store, query, [1, 2], null_block=True) == [-1]
    assert found(store, masked(store, "New York", labels=1), [2, 1], null_block=True) == [1]
