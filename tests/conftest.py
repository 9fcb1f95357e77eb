"""Tests of one process that train need the CPU backend before anything else imports Megatron."""

import pytest

from megatron_growth.training import cpu_backend

HERE = "tests/megatron/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.nodeid.startswith(HERE) for item in items):
        cpu_backend.install()
