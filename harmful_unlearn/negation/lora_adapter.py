"""A saved PEFT LoRA adapter as a task vector: tau = scaling * B @ A, without the base's weights."""

import math
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import read_json
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder, TensorSpec

# LoRA settings under which tau is not scaling * B @ A, or that change more than the LoRA matrices.
UNSUPPORTED_LORA = (
    "use_dora", "lora_bias", "modules_to_save", "use_qalora", "target_parameters", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


class LoraAdapter:
    """A PEFT LoRA adapter: tau = scaling * B @ A, shape [out, in], for each weight that it adapts.

    scaling is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA; r and lora_alpha may differ between layers.

    Attributes:
        specs: dtype and shape of tau, by the base's entry name.
        matrices: the A and B of the adapter's files.

    Raises:
        UserError: not an adapter, a broken one, or one that changes more than B @ A (DoRA, biases, ...).
    """

    partial = True

    def __init__(self, folder: Path):
        config = read_json(folder / "adapter_config.json")
        unsupported = [key for key in UNSUPPORTED_LORA if config.get(key)]
        if config.get("bias", "none") != "none":
            unsupported.append(f"bias={config['bias']}")
        if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "eva"):
            unsupported.append(f"init_lora_weights={config['init_lora_weights']}")  # it changed the base
        if config.get("peft_type") != "LORA" or unsupported:
            raise UserError(_merge_first(folder, ", ".join(unsupported) or f"peft_type {config.get('peft_type')}"))
        patterns = config.get("alpha_pattern") or {}
        alphas = [config.get("lora_alpha", 8), *(patterns.values() if isinstance(patterns, dict) else [None])]
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
            raise UserError(f"{folder / 'adapter_config.json'}: lora_alpha is not a number: fix it, or copy it again")
        self.folder, self._config = folder, config
        self._factors = lru_cache(maxsize=16)(self._read_factors)
        self.matrices = SafetensorsFolder(folder, "adapter_model")
        self.specs: dict[str, TensorSpec] = {}
        self._scalings: dict[str, float] = {}
        for module in sorted({re.sub(r"\.lora_[AB]\.weight$", "", key) for key in self.matrices.specs}):
            keys = [f"{module}.lora_{matrix}.weight" for matrix in "AB"]
            if any(key not in self.matrices.specs for key in keys):
                raise UserError(_merge_first(folder, f"the entry {module}"))
            a, b = (self.matrices.specs[key].shape for key in keys)  # [r, in], [out, r]
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
                raise UserError(_merge_first(folder, f"{module} with shapes {a} and {b}"))
            shape = (a[1], b[0]) if config.get("fan_in_fan_out") else (b[0], a[1])
            name = module.removeprefix("base_model.model.") + ".weight"
            self.specs[name], self._scalings[name] = TensorSpec(torch.float32, shape), self._scaling(name, rank=a[0])

    def delta(self, name: str, span: slice, base: Tensor | None, out: Tensor) -> Tensor:
        """Elements `span` of tau's flattened entry: complete rows. The base's values are not needed."""
        left, right = self._factors(name)
        rows = slice(span.start // right.shape[1], span.stop // right.shape[1])
        tau = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        torch.mm(left[rows], right, out=tau.view(-1, right.shape[1])).mul_(self._scalings[name])
        return out if out is tau else out.copy_(tau)

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product, times scaling, is tau of the weight `name`."""
        module = name.removesuffix(".weight")
        a, b = (self.matrices.read(f"base_model.model.{module}.lora_{matrix}.weight").float() for matrix in "AB")
        return (a.T, b.T) if self._config.get("fan_in_fan_out") else (b, a)

    def _scaling(self, name: str, rank: int) -> float:
        try:
            alpha = self._config.get("lora_alpha", 8)
            if patterns := self._config.get("alpha_pattern"):
                from peft.utils.other import get_pattern_key  # peft takes seconds to import

                alpha = patterns.get(get_pattern_key(patterns, name.removesuffix(".weight")), alpha)
            scaling = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
            if not abs(scaling) <= torch.finfo(torch.float32).max:
                raise ValueError
        except (re.error, AttributeError, TypeError, ValueError, ArithmeticError):
            raise UserError(
                f"{self.folder}/adapter_config.json gives {name} no finite lora_alpha / r: save the adapter again"
            ) from None
        return scaling


def _merge_first(folder: Path, extra: str) -> str:
    return f"{folder} has {extra}, which is more than LoRA's B @ A: merge it with PEFT, and give the merged model"
