import random

import numpy as np
import pytest
import torch

from fedseg.device import autocast, configure, pick_device, seed_everything
from fedseg.errors import ConfigError


def test_auto_is_a_device_that_is_there():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "mps", "", "cuda:x"])
def test_unknown_devices_are_refused_with_the_choices(name):
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:<number>"):
        pick_device(name)


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="'cuda:99' is not there"):
        pick_device("cuda:99")


def test_one_seed_repeats_every_global_generator():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    seed_everything(7)
    first = draw()
    seed_everything(7)
    assert draw() == first


def test_fp16_is_refused_on_a_cpu_and_single_precision_changes_nothing():
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="use fp32 or bf16"):
        autocast(cpu, "fp16")
    with autocast(cpu, "fp32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(cpu, "bf16"):
        assert torch.is_autocast_enabled("cpu")


def test_threads_must_be_positive():
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        configure(threads=0)
