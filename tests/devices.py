"""The devices that tests of torch code run on: the CPU, and the GPU where torch finds one."""

import pytest
import torch

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"))
DEVICES = ["cpu", CUDA]
