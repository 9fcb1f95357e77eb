"""Sizes and steps of the demo, and Megatron's arguments for them.

The full demo is sized for two cores and six minutes; the quick one goes the same road in fewer
steps. One learning rate, constant after a warm-up, serves all three runs.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_growth.demo.data import VOCABULARY

SEQ_LENGTH = 128
BATCH = 16  # sequences in a step
MICRO_BATCH = 8  # sequences in a forward pass; with two data-parallel ranks, one pass for a step
TOKENS_PER_STEP = BATCH * SEQ_LENGTH
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Settings:
    """One size of the demo. Steps are optimizer steps, of `TOKENS_PER_STEP` tokens each."""

    base_steps: int
    """Training of the base."""

    extra_steps: int
    """Training of the grown model, and all of the large model's training from scratch."""

    warmup_steps: int
    """Of the learning rate, for base and scratch; the grown model goes on at the constant rate."""

    base_interval: int
    """Steps between two measurements of the base's held-out loss."""

    extra_interval: int
    """The same for the other two. It divides `base_steps`, so that both are measured equally long
    after their starts, and not `extra_steps`: after the last step Megatron measures anyway."""

    heldout_samples: int
    """Sequences in the held-out set: whole micro-batches on each of two data-parallel ranks."""

    @property
    def heldout_tokens(self) -> int:
        """One more than in the sequences: the label of the last."""
        return self.heldout_samples * SEQ_LENGTH + 1


FULL = Settings(
    base_steps=440,
    extra_steps=130,
    warmup_steps=30,
    base_interval=100,
    extra_interval=44,
    heldout_samples=256,
)
QUICK = Settings(
    base_steps=12,
    extra_steps=6,
    warmup_steps=3,
    base_interval=8,
    extra_interval=4,
    heldout_samples=32,
)

_BASE_SIZE = ["--num-layers", "4", "--num-experts", "8", "--moe-router-topk", "2"]
_LARGE_SIZE = ["--num-layers", "8", "--num-experts", "16", "--moe-router-topk", "4"]
_SHAPE = f"""
    --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256 --moe-ffn-hidden-size 128
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --position-embedding-type rope
    --max-position-embeddings {SEQ_LENGTH}
""".split()
# Upstream (0.19.2) accepts --full-validation without a list of sets, and fails when it evaluates.
_TRAINING = f"""
    --seq-length {SEQ_LENGTH} --global-batch-size {BATCH} --micro-batch-size {MICRO_BATCH}
    --lr {LEARNING_RATE} --lr-decay-style constant --weight-decay 0.1 --adam-beta2 0.95
    --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0
    --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --num-workers 0
    --full-validation --multiple-validation-sets
    --eval-global-batch-size {BATCH} --eval-micro-batch-size {MICRO_BATCH}
    --use-distributed-optimizer --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
    --log-interval 10 --rerun-mode disabled
""".split()

BASE_RANKS = 2
BASE_LAYOUT = ["--expert-model-parallel-size", "2"]
LARGE_RANKS = 4
LARGE_LAYOUT = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]


def base_arguments(settings: Settings, data: Path, save: Path) -> list[str]:
    """The base, from random weights."""
    last = settings.base_steps
    steps = _steps(last, settings.base_interval, settings.warmup_steps)
    return [*_BASE_SIZE, *_SHAPE, *BASE_LAYOUT, *_common(data), *steps, *_saved(save, last)]


def grown_arguments(settings: Settings, data: Path, load: Path, save: Path) -> list[str]:
    """The grown model, from the base. Nothing here says what the model is: growth knows."""
    last = settings.base_steps + settings.extra_steps
    steps = _steps(last, settings.extra_interval, settings.warmup_steps)
    # Megatron would hold this run to the base's number of steps.
    start = ["--load", str(load), "--override-opt-param-scheduler"]
    return [*LARGE_LAYOUT, *_common(data), *steps, *start, *_saved(save, last)]


def scratch_arguments(settings: Settings, data: Path) -> list[str]:
    """The large model from random weights, on the very samples that the grown one goes on with."""
    steps = _steps(settings.extra_steps, settings.extra_interval, settings.warmup_steps)
    first = ["--first-sample", str(settings.base_steps * BATCH)]
    return [*_LARGE_SIZE, *_SHAPE, *LARGE_LAYOUT, *_common(data), *steps, *first]


def _common(data: Path) -> list[str]:
    train, heldout = str(data / "train"), str(data / "heldout")
    return [*_TRAINING, "--train-data-path", train, "--valid-data-path", heldout]


def _steps(last: int, interval: int, warmup: int) -> list[str]:
    numbers = {"--train-iters": last, "--eval-interval": interval, "--lr-warmup-iters": warmup}
    return [word for option, number in numbers.items() for word in (option, str(number))]


def _saved(save: Path, last: int) -> list[str]:
    """Saved once, at the end."""
    return ["--save", str(save), "--save-interval", str(last)]
