"""The command-line arguments that go with the CPU backend."""

from collections.abc import Sequence

from megatron_growth.training.cpu_backend.install import needed

# Flag and value, None for a switch.
_FLAGS: tuple[tuple[str, str | None], ...] = (
    ("--distributed-backend", "gloo"),
    # Plain PyTorch modules; the other implementation needs Transformer Engine.
    ("--transformer-impl", "local"),
    ("--attention-backend", "unfused"),
    # The fused kernels, and what torch's norms do not have.
    ("--no-gradient-accumulation-fusion", None),
    ("--no-masked-softmax-fusion", None),
    ("--no-bias-gelu-fusion", None),
    ("--no-bias-swiglu-fusion", None),
    ("--no-bias-dropout-fusion", None),
    ("--no-rope-fusion", None),
    ("--no-persist-layer-norm", None),
)


def arguments(argv: Sequence[str]) -> list[str]:
    """The arguments to append to ``argv`` so that Megatron runs here; none where there is a GPU.

    What the user has given is left alone. ``--use-cpu-initialization`` is deliberately not among
    them: it ignores the expert seed, so that local expert i would start the same on every
    expert-parallel rank. Megatron's other initialisation runs on CPU under the backend.
    """
    if not needed():
        return []
    given = {argument.split("=", 1)[0] for argument in argv}
    missing: list[str] = []
    for flag, value in _FLAGS:
        if flag not in given:
            missing += [flag] if value is None else [flag, value]
    return missing
