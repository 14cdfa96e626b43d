"""The arithmetic of stage 2 on disk, for a chunk of an entry at a time.

unlearned = base - scaling_coef * sum_i coef_i * (finetuned_i - base)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.negation.sources import WeightedFolders, open_matched
from harmful_unlearn.storage.safetensors_io import Buffers, all_finite, work_dtype


class Negation:
    """base - alpha * tau with tau = sum_i coef_i * (finetuned_i - base), for any chunk of any entry.

    Computed in float32 (float64 for float64 entries) and rounded once (implementation detail 16). Threads may share it.

    Attributes:
        base, sources: the opened folders.
        changed: the entries that tau has; all others are the base's.

    Raises:
        UserError: as `open_matched`; tau has no entry.
    """

    def __init__(self, base: Path, finetuned: WeightedFolders):
        folders = [folder for folder, _ in finetuned]
        self._coefs = [coef for _, coef in finetuned]
        self.base, self.sources, self._names = open_matched(base, folders)
        self.changed = {name for names in self._names for name in names}
        if not self.changed:
            names = ", ".join(map(str, folders))
            raise UserError(f"no entry of {base} is changed by {names}: give models with weights")
        self._buffers = Buffers()

    def _tau(self, name: str, span: slice, base: Tensor) -> Tensor:
        """Elements `span` of the flattened entry of tau; `base` holds the base's, in float32 or float64."""
        tau = None
        for source, coef, names in zip(self.sources, self._coefs, self._names, strict=True):
            if name in names:
                buffer = self._buffers("tau" if tau is None else "delta", base.numel(), base.dtype)
                delta = source.delta(names[name], span, base, buffer)
                delta = delta.mul_(coef) if coef != 1 else delta
                tau = delta if tau is None else tau.add_(delta)
        assert tau is not None  # `changed` has the name
        return tau

    def values(self, name: str, span: slice, alphas: Sequence[float | None]) -> Iterator[Tensor]:
        """Elements `span` of the flattened entry at each alpha, or of tau where alpha is None.

        Each tensor is overwritten by the next.

        Raises:
            UserError: a value is NaN or infinite; a file became shorter.
        """
        spec, size = self.base.specs[name], span.stop - span.start
        stored = self.base.read_into(self._buffers("stored", size, spec.dtype), name, span.start)
        if name not in self.changed:
            yield from (check_finite(stored, name) for _ in alphas)
            return
        work = work_dtype(spec.dtype)
        base = self._buffers("base", size, work).copy_(stored)
        tau = self._tau(name, span, base)
        value = self._buffers("value", size, work)
        for alpha in alphas:
            if alpha is None:
                yield check_finite(tau, name)
                continue
            scaled = tau if alpha == 1 else torch.mul(tau, alpha, out=value)
            torch.sub(base, scaled, out=value)  # not sub(alpha=): fused, it rounds differently from TaskVector
            yield check_finite(stored.copy_(value), name)


def scaled_entries(base: Path, finetuned: list[Path], scaling_coef: float) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each entry that `negate` changes, as `negate` would write them, on the CPU. Raises as that."""
    negation = Negation(base, [(folder, 1.0) for folder in finetuned])
    for name, spec in negation.base.specs.items():
        if name in negation.changed:
            entry = torch.empty(spec.shape, dtype=spec.dtype)
            for span in spec.chunks():
                (entry.view(-1)[span],) = negation.values(name, span, [scaling_coef])
            yield name, entry


def check_finite(values: Tensor, name: str) -> Tensor:
    """The values of the entry `name`. Raises UserError: one is NaN or infinite."""
    if not all_finite(values):
        raise UserError(f"{name} comes out NaN or infinite: check both models' weights, or lower --scaling_coef")
    return values
