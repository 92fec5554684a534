from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.packing import codes_per_word, pack, unpack

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@SETTINGS
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    word=st.sampled_from([torch.int16, torch.int32]),
    rows=st.integers(1, 3),
    count=st.integers(0, 70),
    seed=st.integers(0, 5),
)
def test_round_trip(bits, word, rows, count, seed):
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits, word)
    assert words.dtype == word
    assert words.shape == (rows, -(-count // codes_per_word(bits, word)))
    assert torch.equal(unpack(words, bits, count).long(), codes)


@SETTINGS
@given(
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    bits=st.sampled_from([1, 2, 4, 8]),
)
def test_every_word_survives(words, bits):
    """Any int32, with the sign bit set or not, is what its codes pack to."""
    words = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack(unpack(words, bits, words.shape[1] * 32 // bits), bits), words)


def test_the_first_code_lies_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 3]), 2).item() == 0b111001
    assert pack(torch.tensor([0] * 15 + [3]), 2).item() == -(1 << 30)
    assert pack(torch.tensor([15, 0, 0, 8]), 4, torch.int16).item() == 0x800F - (1 << 16)


def test_views_work():
    codes = torch.arange(64).view(8, 8).T % 4
    assert torch.equal(unpack(pack(codes, 2), 2, 8).long(), codes)
    wide = pack(torch.arange(40) % 4, 2).expand(3, -1)[:, ::2]
    assert torch.equal(unpack(wide, 2, 32), unpack(wide.contiguous(), 2, 32))


def test_bad_input():
    with pytest.raises(ValueError, match=r"codes goes from 0 to 4: 2 bits hold 0\.\.3"):
        pack(torch.arange(5), 2)
    with pytest.raises(TypeError, match=r"codes is torch.float32: pass integers"):
        pack(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="1, 2, 3, 4 or 8 bits, not 5"):
        pack(torch.zeros(5, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"int16 or int32, not torch.int64"):
        unpack(torch.zeros(5, dtype=torch.int64), 2, 3)
    with pytest.raises(ValueError, match="2 words of 16 codes do not hold 33"):
        unpack(torch.zeros(2, dtype=torch.int32), 2, 33)
