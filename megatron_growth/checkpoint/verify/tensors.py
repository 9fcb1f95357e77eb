"""Every tensor of a grown checkpoint against the definition, bit for bit.

The base is walked in the order that it lies on storage. While one of its parts is in memory, all
that became of it is read, compared and dropped: memory is a few times one (layer, expert) tensor or
one chunk, whatever the model.
"""

import math
from collections import Counter
from collections.abc import Callable

import torch

from megatron_growth.checkpoint.verify.definition import (
    Definition,
    Part,
    Source,
    Target,
    is_master,
    is_moment,
)
from megatron_growth.checkpoint.verify.problem import Problem
from megatron_growth.checkpoint.verify.stored import Stored
from megatron_growth.checkpoint.verify.values import standard_deviation
from megatron_growth.errors import CheckpointError

Progress = Callable[[int, int], None]  # bytes compared, bytes in all
Report = Callable[[Problem], None]

_INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # as wide as an element


class TensorCheck:
    """Compares every tensor of `grown`.

    Args:
        definition: what it must be.
        base: the base, with the tensors that take part.
        grown: the grown checkpoint.
        masters: optimizer state that holds the fp32 masters; None where noise goes on the weights.
        report: called with each problem as it is found.
        on_progress: called after each comparison.

    Attributes:
        elements: compared so far, by target key.
        nbytes: of those.
    """

    def __init__(
        self,
        definition: Definition,
        base: Stored,
        grown: Stored,
        masters: str | None,
        report: Report,
        on_progress: Progress,
    ) -> None:
        self._definition = definition
        self._base = base
        self._grown = grown
        self._masters = masters
        self._report = report
        self._on_progress = on_progress
        self._sigmas: dict[Part, float] = {}
        self._comparable: set[str] = set()
        self._total = 0
        self.elements: Counter[str] = Counter()
        self.nbytes = 0

    def run(self) -> None:
        self._check_names_shapes_and_types()
        self._total = sum(map(self._size, self._comparable))
        for source in sorted(self._definition.sources(), key=self._position):
            self._check(source)
        self._check_all_compared()

    def _check_names_shapes_and_types(self) -> None:
        expected = self._definition.shapes()
        for key in sorted(self._grown.tensors.keys() - expected.keys()):
            self._report(Problem(key, "is no tensor of the grown model"))
        for key, (source, shape) in expected.items():
            if key not in self._grown.tensors:
                self._report(Problem(key, "is missing"))
            elif (found := self._grown.shape(key)) != shape:
                self._report(Problem(key, f"has shape {list(found)}, not {list(shape)}"))
            elif (dtype := self._grown.dtype(key)) != self._base.dtype(source):
                self._report(Problem(key, f"is of type {dtype}, not {self._base.dtype(source)}"))
            else:
                self._comparable.add(key)

    def _check_all_compared(self) -> None:
        """No tensor may pass unseen."""
        for key in sorted(self._comparable):
            numel = math.prod(self._grown.shape(key))
            if self.elements[key] != numel:
                self._report(
                    Problem(
                        key,
                        f"has {numel} elements, of which the base explains {self.elements[key]}",
                    )
                )

    # -- one part of the base, and all that became of it

    def _check(self, source: Source) -> None:
        states = [state for state in source.states if not is_moment(state)]
        exact = {state: self._base.read(source.part(state)) for state in states}
        master = next((state for state in states if is_master(state)), None)
        self._check_cast(
            exact, master, str(source.tensor), Target(source.layer, source.expert), "in the base, "
        )
        for target in self._definition.targets(source):
            grown = {state: self._check_weight(source, target, state, exact) for state in states}
            key = self._definition.part(source.tensor, target).key
            self._check_cast(grown, master, key, target)
        for state in source.states:
            if state is not None and is_moment(state):
                self._check_moment(source, state)

    def _check_weight(
        self,
        source: Source,
        target: Target,
        state: str | None,
        exact: dict[str | None, torch.Tensor],
    ) -> torch.Tensor | None:
        """One target's weight or master; what it holds."""
        origin, sigma = state, 0.0
        if self._definition.is_noisy(source, target):
            origin = self._masters if state is None and self._masters in exact else state
            sigma = self._sigma(source, origin)
        if self._definition.is_parked(source, target):
            layer = self._base.read(source.layer_part(state))
            expected = self._definition.parked(exact[state], layer)
            return self._compare(source, target, state, expected)
        expected = self._definition.weight(source, target, exact[origin], sigma, exact[state].dtype)
        return self._compare(source, target, state, expected)

    def _check_moment(self, source: Source, state: str) -> None:
        value = self._base.read(source.part(state))
        for target in self._definition.targets(source):
            expected = self._definition.moment(source, target, state, value)
            self._compare(source, target, state, expected)

    def _check_cast(
        self,
        tensors: dict[str | None, torch.Tensor | None] | dict[str | None, torch.Tensor],
        master: str | None,
        key: str,
        target: Target,
        where: str = "",
    ) -> None:
        """A weight is its master, rounded."""
        exact, weight = tensors.get(master), tensors.get(None)
        if master is None or exact is None or weight is None:
            return
        if differing := _difference(weight, exact.to(weight.dtype)):
            what = f"{where}is not its fp32 master (state {master!r}) rounded"
            self._report(Problem(key, what, target.layer, target.expert, *differing))

    def _compare(
        self, source: Source, target: Target, state: str | None, expected: torch.Tensor
    ) -> torch.Tensor | None:
        part = self._definition.part(source.tensor.of(state), target)
        if part.key not in self._comparable:
            return None
        self.elements[part.key] += expected.numel()
        self.nbytes += expected.nbytes
        self._on_progress(self.nbytes, self._total)
        try:
            found = self._grown.read(part)
        except CheckpointError as error:
            self._report(Problem(part.key, str(error), target.layer, target.expert))
            return None
        if differing := _difference(found, expected):
            what = f"is not {self._definition.describe(source, target, state)}"
            self._report(Problem(part.key, what, target.layer, target.expert, *differing))
        return found

    # -- looked up

    def _sigma(self, source: Source, state: str | None) -> float:
        part = source.sigma_part(state)
        if part not in self._sigmas:
            try:
                self._sigmas[part] = standard_deviation(self._base.read(part))
            except ValueError as error:
                raise CheckpointError(
                    f"{part.key} at {list(part.place)} in {self._base.name} {error}"
                ) from None
        return self._sigmas[part]

    def _position(self, source: Source) -> tuple[str, int]:
        return self._base.position(source.part(source.states[0]))

    def _size(self, key: str) -> int:
        return math.prod(self._grown.shape(key)) * self._grown.dtype(key).itemsize


def _difference(found: torch.Tensor, expected: torch.Tensor) -> tuple[int, float] | None:
    """How many elements differ in any bit, and by how much at most; None when none does."""
    integers = _INTEGERS[expected.dtype.itemsize]
    differing = found.contiguous().view(integers) != expected.contiguous().view(integers)
    count = int(differing.sum())
    if count == 0:
        return None
    return count, float((found[differing].double() - expected[differing].double()).abs().max())
