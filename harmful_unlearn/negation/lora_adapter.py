"""A saved PEFT LoRA adapter as a task vector: tau = scale * B @ A, without the base's weights."""

import math
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage.files import read_json
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder, TensorSpec

# LoRA settings under which tau is not scale * B @ A, or that touch more than the LoRA matrices.
UNSUPPORTED_LORA = (
    "use_dora", "lora_bias", "modules_to_save", "use_qalora", "target_parameters", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


class Adapter:
    """A PEFT LoRA adapter: tau = scale * B @ A, shape [out, in], for the weights that it adapts.

    Scale is alpha / r, or alpha / sqrt(r) with rsLoRA; r and alpha may differ from layer to layer.

    Raises:
        UserError: no adapter, a broken one, or one that changes more than B @ A (DoRA, biases, ...).
    """

    partial = True

    def __init__(self, folder: Path):
        config = read_json(folder / "adapter_config.json")
        unsupported = [key for key in UNSUPPORTED_LORA if config.get(key)]
        unsupported += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
        if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "eva"):
            unsupported.append(f"init_lora_weights={config['init_lora_weights']}")  # it changed the base
        if config.get("peft_type") != "LORA" or unsupported:
            what = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}"
            raise UserError(_merge_first(folder, what))
        alphas = config.get("alpha_pattern") or {}
        scales = [config.get("lora_alpha", 8), *(alphas.values() if isinstance(alphas, dict) else [None])]
        if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in scales):
            raise UserError(f"{folder / 'adapter_config.json'}: lora_alpha is no number: mend it, or copy it again")
        self.folder, self._config = folder, config
        self._factors = lru_cache(maxsize=16)(self._read_factors)
        self.file = SafetensorsFolder(folder, "adapter_model")
        self.specs: dict[str, TensorSpec] = {}
        self._scales: dict[str, float] = {}
        pairs = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in self.file.specs}
        for pair in sorted(pairs):
            keys = [f"{pair}.lora_{matrix}.weight" for matrix in "AB"]
            if any(key not in self.file.specs for key in keys):
                raise UserError(_merge_first(folder, f"the entry {pair}"))
            a, b = (self.file.specs[key].shape for key in keys)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
                raise UserError(_merge_first(folder, f"{pair} with shapes {a} and {b}"))
            shape = (a[1], b[0]) if config.get("fan_in_fan_out") else (b[0], a[1])
            name = pair.removeprefix("base_model.model.") + ".weight"
            self.specs[name], self._scales[name] = TensorSpec("F32", shape), self._scale(name, rank=a[0])

    def delta(self, name: str, span: slice, base: Tensor | None, out: Tensor) -> Tensor:
        """tau's elements `span` of the flattened weight, whole rows of it; the base's values are not needed."""
        left, right = self._factors(name)
        rows = slice(span.start // right.shape[1], span.stop // right.shape[1])
        tau = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        torch.mm(left[rows], right, out=tau.view(-1, right.shape[1])).mul_(self._scales[name])
        return out if out is tau else out.copy_(tau)

    def read(self, name: str) -> Tensor:
        """tau of the weight `name`, float32, in the weight's shape."""
        spec = self.specs[name]
        tau = torch.empty(spec.shape)
        for span in spec.chunks():  # as `delta` is called for a checkpoint, so that no bit differs
            self.delta(name, span, None, tau.view(-1)[span])
        return tau

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product, times the scale, is tau of the weight `name`."""
        module = name.removesuffix(".weight")
        a, b = (self.file.read(f"base_model.model.{module}.lora_{x}.weight").float() for x in "AB")
        return (a.T, b.T) if self._config.get("fan_in_fan_out") else (b, a)

    def _scale(self, name: str, rank: int) -> float:
        try:
            alpha = self._config.get("lora_alpha", 8)
            if alphas := self._config.get("alpha_pattern"):
                from peft.utils.other import get_pattern_key  # peft takes seconds to import

                alpha = alphas.get(get_pattern_key(alphas, name.removesuffix(".weight")), alpha)
            scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
            if not abs(scale) <= torch.finfo(torch.float32).max:
                raise ValueError
        except (re.error, AttributeError, TypeError, ValueError, ArithmeticError):
            raise UserError(
                f"{self.folder}/adapter_config.json gives {name} no scale that is a number: save the adapter again"
            ) from None
        return scale


def _merge_first(folder: Path, what: str) -> str:
    return f"{folder} has {what}, which is more than LoRA's B @ A: merge it with PEFT, give the merged model"
