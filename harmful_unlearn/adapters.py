"""A saved PEFT LoRA adapter as a task vector: tau = scale * B @ A, without the base's weights."""

import math
import re
from pathlib import Path

from torch import Tensor

from harmful_unlearn.checkpoints import Checkpoint, Spec, read_json
from harmful_unlearn.errors import UserError

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
        self.folder, self._config = folder, config
        self._file = Checkpoint(folder, "adapter_model")
        self.specs: dict[str, Spec] = {}
        pairs = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in self._file.specs}
        for pair in sorted(pairs):
            keys = [f"{pair}.lora_{matrix}.weight" for matrix in "AB"]
            if any(key not in self._file.specs for key in keys):
                raise UserError(_merge_first(folder, f"the entry {pair}"))
            a, b = (self._file.specs[key].shape for key in keys)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                raise UserError(_merge_first(folder, f"{pair} with shapes {a} and {b}"))
            shape = (a[1], b[0]) if config.get("fan_in_fan_out") else (b[0], a[1])
            self.specs[pair.removeprefix("base_model.model.") + ".weight"] = Spec("F32", shape)

    def delta(self, name: str, base: Tensor | None = None) -> Tensor:
        """tau of the weight `name`, float32, in the weight's shape; the base's values are not needed."""
        from peft.utils.other import get_pattern_key

        module = name.removesuffix(".weight")
        a, b = (self._file.read(f"base_model.model.{module}.lora_{x}.weight").float() for x in "AB")
        alphas = self._config.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(alphas, module), self._config.get("lora_alpha", 8))
        rank = a.shape[0]
        tau = (b @ a) * (alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))
        return tau.T if self._config.get("fan_in_fan_out") else tau


def _merge_first(folder: Path, what: str) -> str:
    return f"{folder} has {what}, which is more than LoRA's B @ A: merge it with PEFT, give the merged model"
