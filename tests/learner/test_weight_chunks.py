"""Weights in chunks: what goes in comes out, whatever the data types and however it is cut."""

import numpy as np
import pytest
import torch

from learner.weight_chunks import tensors_of, weight_chunks


def random_weights():
    generator = torch.Generator().manual_seed(0)
    return [
        ("embed.weight", torch.randn(7, 4, generator=generator)),
        ("layer.weight", torch.randn(4, 6, generator=generator).t()),  # not contiguous
        ("half.weight", torch.randn(5, generator=generator).bfloat16()),
        ("norm.weight", torch.tensor([-0.0, float("inf")])),
        ("lm_head.weight", torch.randn(7, 4, generator=generator)),
    ]


@pytest.mark.parametrize("cut", [1, 2, 5])
@pytest.mark.parametrize("tied_head", [False, True])
def test_all_weights_come_back_bit_by_bit(cut, tied_head):
    named = random_weights()
    chunks = list(weight_chunks([named[at : at + cut] for at in range(0, 5, cut)], 3, tied_head=tied_head))
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for chunk in chunks:
        for array in chunk.arrays:
            array.flags.writeable = False  # as the object store hands them over
    back = dict(tensors_of(chunks))
    assert list(back) == [name for name, _ in named if not (tied_head and name == "lm_head.weight")]
    for name, tensor in named:
        if name in back:
            assert back[name].dtype == tensor.dtype
            assert back[name].shape == tensor.shape
            assert back[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))


def test_a_chunk_shares_the_memory_of_the_weights():
    named = random_weights()[:1]
    (chunk,) = weight_chunks([named], 0, tied_head=False)
    assert np.shares_memory(chunk.arrays[0], named[0][1].numpy())
    assert next(chunk.tensors())[1].data_ptr() == named[0][1].data_ptr()


def test_missing_repeated_and_mixed_chunks_are_errors():
    named = random_weights()
    three = list(weight_chunks([named[:2], named[2:4], named[4:]], 3, tied_head=False))
    other = list(weight_chunks([named[:2], named[2:]], 4, tied_head=False))
    for chunks, message in (
        (three[:2], "version 3 end after 2 chunks"),
        ([], "end after 0 chunks"),
        ([three[0], three[2]], "chunk 1 was to come, and chunk 2 of version 3 came"),
        ([three[0], three[0]], "chunk 1 was to come, and chunk 0 of version 3 came"),
        ([three[0], other[1]], "chunk 1 was to come, and chunk 1 of version 4 came"),
        ([*three, other[1]], "chunk 3 was to come"),
    ):
        with pytest.raises(ValueError, match=message):
            list(tensors_of(chunks))
