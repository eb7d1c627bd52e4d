"""Where the beam search's model goes: to a GPU that Ray reserves, never to the CPU in its place."""

from types import SimpleNamespace

import pytest
import ray
import torch

from actors.ranking import ranking_device
from item_index.input_error import InputError


@pytest.fixture
def reserve(monkeypatch):
    """Make this process one for which Ray has reserved some GPUs, and torch one that finds a GPU or none."""

    def place(gpus, *, found):
        context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": gpus})
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found)

    return place


def test_the_model_goes_to_the_reserved_gpu_and_to_the_cpu_where_none_is(reserve):
    reserve(["0"], found=True)
    assert ranking_device() == torch.device("cuda")
    reserve([], found=False)
    assert ranking_device() == torch.device("cpu")


def test_a_reserved_gpu_that_torch_does_not_find_is_an_error(reserve):
    reserve(["3"], found=False)
    with pytest.raises(
        InputError, match=r"GPU 3 is reserved for the beam search, and torch .* finds none.*extra `gpu`"
    ):
        ranking_device()
