"""`variable_length_attention` against a softmax written out for each sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.model.attention import Layout, variable_length_attention


def layout(lengths: list[int]) -> Layout:
    return Layout.of(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32))


def by_hand(query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """One sequence and one head at a time."""
    rows = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        heads = [torch.softmax(q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5, -1) @ v[:, h] for h in range(q.shape[1])]
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows)


def tensors(queries: list[int], keys: list[int], heads: int = 2, width: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [2 * torch.randn(sum(lengths), heads, width) for lengths in (queries, keys, keys)]


CASES = {
    "one token": ([1], [1]),
    "as many queries as keys": ([3, 3, 7, 1, 3], [3, 3, 7, 1, 3]),
    "fewer queries than keys": ([1, 2, 2, 4], [9, 5, 5, 6]),
    "the same number of queries, other keys": ([2, 2, 2], [4, 5, 5]),
    "other queries, the same number of keys": ([1, 2, 2], [5, 5, 5]),
    "no query in some sequences": ([0, 2, 0, 0, 3, 0], [4, 4, 4, 5, 5, 1]),
    "no query at all": ([0, 0], [4, 3]),
    "across the switch of kernels": ([255, 256, 257, 3, 0, 40], [255, 256, 257, 300, 300, 257]),
}


@pytest.mark.parametrize(("queries", "keys"), CASES.values(), ids=CASES)
def test_values_and_gradients_equal_a_softmax_for_each_sequence(queries: list[int], keys: list[int]) -> None:
    query, key, value = (x.requires_grad_() for x in tensors(queries, keys))
    expected = by_hand(query, key, value, queries, keys)
    attended = variable_length_attention(query, key, value, layout(queries), layout(keys))
    assert attended.shape == query.shape
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)
    if not sum(queries):
        return
    weight = torch.randn_like(attended)
    ours = torch.autograd.grad((attended * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@given(
    shapes=st.lists(
        st.integers(1, 12).flatmap(lambda k: st.tuples(st.integers(0, k), st.just(k))), min_size=1, max_size=10
    )
)
@torch.no_grad()
def test_a_token_attends_to_its_own_sequence_only(shapes: list[tuple[int, int]]) -> None:
    queries, keys = ([shape[i] for shape in shapes] for i in (0, 1))
    query, key, value = tensors(queries, keys)
    attended = variable_length_attention(query, key, value, layout(queries), layout(keys))
    torch.testing.assert_close(attended, by_hand(query, key, value, queries, keys), rtol=1e-5, atol=1e-5)


def test_a_layout_knows_the_lengths_and_the_longest() -> None:
    pack = layout([3, 1, 5])
    assert pack.lengths == [3, 1, 5]
    assert pack.max_seqlen == 5
