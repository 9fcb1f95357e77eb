"""The grown run's command line: what the base says, unless the user does."""

from argparse import Namespace

import pytest

from megatron_growth.training import arguments, cpu_backend

BASE = Namespace(
    num_layers=4, lr=1e-3, min_lr=1e-4, lr_decay_style="cosine", lr_decay_iters=1000,
    lr_warmup_iters=10, train_iters=1000, train_samples=None, bf16=True, fp16=False,
    rope_type="rope", use_distributed_optimizer=True, padded_vocab_size=96, seed=7,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _backend() -> None:
    cpu_backend.install()


def _added(*argv: str, **changes: object) -> list[str]:
    base = Namespace(**{**vars(BASE), **changes})
    return arguments.completed(list(argv), base)[len(argv) :]


def test_the_bases_choices_are_taken_over() -> None:
    added = _added()
    for option, value in {"--lr": "0.001", "--rope-type": "rope", "--seed": "7"}.items():
        assert added[added.index(option) + 1] == value
    assert {"--bf16", "--use-distributed-optimizer"} <= set(added)


def test_a_decay_that_upstream_took_from_the_bases_length_is_none() -> None:
    """Else the grown run would begin at the end of the base's schedule."""
    assert "--lr-decay-iters" not in _added("--train-iters", "5000")
    assert "--lr-decay-iters" in _added("--train-iters", "5000", lr_decay_iters=3000)


def test_a_schedule_option_replaces_the_whole_schedule() -> None:
    assert not [word for word in _added("--lr", "3e-4") if "lr" in word]


def test_a_run_by_samples_gets_no_iterations() -> None:
    added = _added("--train-samples", "8000", lr_decay_iters=3000)
    assert not [word for word in added if word.startswith("--lr-") and word.endswith("-iters")]


def test_a_padded_vocabulary_that_does_not_split_is_padded_anew() -> None:
    assert "--padded-vocab-size" in _added("--tensor-model-parallel-size", "2")
    assert "--padded-vocab-size" not in _added("--tensor-model-parallel-size", "5")


def test_every_name_is_an_argument_of_megatrons() -> None:
    known = arguments._actions()
    names = [*arguments.ARCHITECTURE, *arguments.INHERITED, *sum(arguments.FAMILIES, ())]
    assert [name for name in names if name not in known] == []
    assert len(names) == len(set(names))
