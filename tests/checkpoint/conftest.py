"""Quiet and quick: DCP logs every step at debug level, and threads only slow down tensors this
small."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _quiet_and_single_threaded():
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
