"""Options of Megatron's command line, by their names without `--`.

    {"bf16": True, "recompute-modules": ["moe_act", "layernorm"], "lr": 3e-4, "fp16": None}
    --bf16 --recompute-modules moe_act layernorm --lr 0.0003

true is a switch; null and false leave the option out, so that a file can take back what it extends.
Tables are laid over each other before they become words, so no option stands twice.
"""

from collections.abc import Iterator, Mapping

from megatron_growth.errors import ConfigError
from megatron_growth.geometry import Value

Table = dict[str, Value | None]


def without_clash(own: Table, free: Mapping[str, Value | None], path: str) -> Table:
    """The user's free options, refused where a field of the experiment says the same.

    Args:
        own: what the fields say; None where they leave an option out.
        free: what a `megatron` section says.
        path: that section's, for errors.
    """
    for name in free:
        if name in own:
            says = "left out" if own[name] is None else repr(own[name])
            raise ConfigError(
                f"{path}.{name} {free[name]!r}: --{name} follows from what else the experiment "
                f"says ({says}); change that, and drop it here"
            )
    return dict(free)


def words(table: Table) -> list[str]:
    """The table as a command line."""
    return [word for name, value in table.items() for word in _words(f"--{name}", value)]


def _words(option: str, value: Value | None) -> Iterator[str]:
    if value is None or value is False:
        return
    yield option
    if isinstance(value, list):
        yield from map(str, value)
    elif value is not True:
        yield str(value)
