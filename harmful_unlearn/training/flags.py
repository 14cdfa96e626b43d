"""The flags of unlearn_harm_new.py."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harmful_unlearn.cli.flag_parser import FlagParser, flag
from harmful_unlearn.cli.flag_types import (
    device_map,
    layer_or_share,
    not_negative,
    number,
    positive_int,
    positive_number,
    whole_number,
)
from harmful_unlearn.data.collator import VARIANTS
from harmful_unlearn.data.templates import TEMPLATES, TemplateChoice
from harmful_unlearn.losses.methods import METHODS, PARAMETERS, apply_method_defaults, loss_weights, uses_landing_point
from harmful_unlearn.losses.terms import LossParameters
from harmful_unlearn.storage.files import ROOT, user_path
from harmful_unlearn.training.recorded_flags import folder_of, replayed_flags

AUTO = "auto"  # --resume without a path


def checkpoint_path(text: str) -> str | Path:
    """What --resume takes."""
    return AUTO if text == AUTO else user_path(text)


_released = partial(flag, group="the released script's flags")
_method = partial(flag, group="method")
_data = partial(flag, group="data")
_machine = partial(flag, group="model and machine")
_long_run = partial(flag, group="a long run")


# fmt: off
@dataclass(frozen=True)
class TrainingSettings:
    """The flags of unlearn_harm_new.py; once parsed, with the method's defaults filled in."""

    max_unlearn_steps: int = _released("optimizer steps of stage 1 (default: 1000)", type=positive_int)
    bad_weight: float = _released("e1, of GD (default: 0.5); may be negative; 0 switches a loss off", type=number)
    random_weight: float = _released("e2, of RD (default: 1)", type=number)
    normal_weight: float = _released("e3, of PD, minus the KL from the base (default: 1)", type=number)
    batch_size: int = _released("harmful pairs, and normal texts, in a step", type=positive_int, default=2)
    lr: float = _released("AdamW's learning rate, falling linearly to 0 (default: 2e-05)", type=positive_number)
    model_name: str = _released("the base model: hub id or local folder", default="facebook/opt-1.3b")
    model_save_dir: Path = _released("the stage 1 model (default: models/NAME-harmful)", type=user_path)
    saved_model: Path | None = _released("a stage 1 model or LoRA adapter to start stage 2 from", type=user_path)
    log_file: Path | None = _released(
        "the log; flags, metrics and a plot of the losses go beside it (default: logs/NAME/run.log, or NAME-2 and "
        "so on)", type=user_path)
    task_vector_saving_path: Path = _released("the unlearned model (default: models/NAME-unlearned)", type=user_path)

    method: str = _method(
        "what to minimise, and whether to negate it (the table in losses/methods.py); the weights above then weigh "
        "its losses on harmful pairs, with random answers, and on normal text. Those after ft have defaults of their "
        "own; land and lands are ours", choices=METHODS, default="sku")
    preserve_at: str = _method(
        "where normal text is preserved: at the harmful model (copy), as the paper does (minus KL), or at the "
        "landing point, where negation by --scaling_coef leads (plus KL) (default: copy)", choices=("copy", "landing"))
    safe_weight: float = _method(
        "weight of the cross-entropy of safe answers to the same harmful prompts; in methods that negate, at the "
        "landing point (default: 0)", type=not_negative)
    beta: float | None = _method(
        "how sharply npo, simnpo, dpo and safe_unlearning tell log-probabilities apart (default: 0.1, 2.5, 0.1, 1)",
        type=positive_number)
    gamma: float | None = _method("simnpo's margin (default: 0)", type=number)
    rmu_layer: float | None = _method(
        "the layer whose hidden states rmu steers, from 1, or below 1 its share of the depth; it trains this one and "
        "the two before (default: 0.25)", type=layer_or_share)
    rmu_coef: float | None = _method(
        "rmu's c, the length of the random vector that it steers to (default: 6.5)", type=positive_number)
    warmup_steps: int = _method(
        "steps in which the learning rate first rises from 0; the released code has none", type=whole_number,
        default=0)
    max_grad_norm: float | None = _method(
        "scale a larger gradient down to this L2 norm (default: never, as in the released code)", type=positive_number)
    max_kl: float = _method(
        "stop when the KL divergence from the base on normal text, which PD maximises, passes so many nats; 0: never. "
        "Far below 100 the model is already broken, and near it the released formula overflows",
        type=not_negative, default=100.0)
    variant: str = _method(
        "losses as the released code computes them, or as the paper writes them (default: released)", choices=VARIANTS)
    k_random: int = _method("K, the random answers that RD draws in a step", type=positive_int, default=5)
    scaling_coef: float = _method("alpha, the coefficient of the subtracted task vector (default: 1)", type=number)
    seed: int = _method("of the data split, the order, the random answers and dropout", type=whole_number, default=8888)
    stage: str = _method("run one stage only, or both", choices=("all", "acquire", "negate"), default="all")
    template: str = _method(
        "how a question and an answer become text: the authors' released text, or the tokenizer's chat template; "
        "auto: the chat template if there is one", choices=TEMPLATES, default="auto")
    system_prompt: str | None = _method("of the chat, in place of its template's own", metavar="TEXT")
    max_length: int | None = _method(
        "tokens of a text; longer answers are cut (default: the model's context length)", type=positive_int)

    harmful_dataset: str = _data(
        "hub id, folder, or .jsonl/.json/.csv/.parquet file in PKU-SafeRLHF's columns",
        default="PKU-Alignment/PKU-SafeRLHF")
    harmful_revision: str | None = _data(
        "of a hub data set (default: the newest); the paper had ff7ba91063016c78a225b0f74e1c0860bb18230f")
    harmful_split: str = _data("of a hub data set or folder", default="train")
    normal_dataset: str = _data(
        "the same kinds in TruthfulQA's columns, or truthfulqa/truthful_qa",
        default=str(ROOT / "dataloader" / "TruthfulQA.csv"))
    more_normal_dataset: str | None = _data(
        "everyday tasks in Alpaca's columns (hub id, folder or file): seven in ten are normal texts, too (default: "
        "none)")
    harm_category: list[str] = _data(
        "unlearn only this category of harm (may be repeated)", action="append", default=[])
    min_severity: int | None = _data("unlearn only answers of at least this severity", type=whole_number)
    all_harmful: bool = _data(
        "use all harmful pairs; without this, they start again with each epoch of normal text", action="store_true")

    lora: str = _machine(
        "train an adapter; auto: as the table MODELS in this script says",
        choices=("auto", "on", "off"), default="auto")
    lora_r: int | None = _machine("the adapter's rank", type=positive_int)
    lora_alpha: int | None = _machine("the adapter's alpha (its scale is alpha / r)", type=positive_int)
    lora_target_modules: list[str] | None = _machine(
        "names of the modules that get an adapter", nargs="+", metavar="NAME")
    quantize: str | None = _machine(
        "train the adapter on a base in 4 bits (pip install bitsandbytes); stage 2 uses the full-precision base",
        choices=("4bit",))
    precision: str = _machine(
        "bf16: trained weights stay float32, and each step computes with their bf16 casts. auto: bf16 on a GPU or CPU "
        "that has instructions for it",
        choices=("auto", "fp32", "bf16"), default="auto")
    no_packing: bool = _machine(
        "a row for each text, instead of one for all texts that share a question: the same losses, slower",
        action="store_true")
    tokens_per_pass: int | None = _machine(
        "compute a step with more tokens in several passes, whose gradients add up: the same step in less memory "
        "(default: 1024 on a CPU, 8192 on a GPU)", type=positive_int, metavar="N")
    gradient_checkpointing: bool = _machine(
        "recompute activations in the backward pass to save memory", action="store_true")
    device_map: str | None = _machine(
        "spread the model over GPUs, CPU and disk (accelerate): auto, balanced, ...; only frozen weights can be on "
        "CPU or disk, so training then needs LoRA", type=device_map)

    save_every: int | None = _long_run(
        "save a checkpoint every N steps, to --resume from if the run is killed (default: only Ctrl-C and SIGTERM "
        "save one)", type=positive_int)
    keep_checkpoints: int = _long_run(
        "how many of the newest to keep, in MODEL_SAVE_DIR.checkpoints; all are removed once the stage 1 model is "
        "saved", type=positive_int, default=1)
    resume: str | Path | None = _long_run(
        "continue a run that was stopped: from the newest checkpoint, or from this one; from step 1 if there is "
        "none, and from stage 2 if stage 1 is done", nargs="?", const=AUTO, type=checkpoint_path, metavar="CHECKPOINT")
    replay: Path | None = _long_run(
        "do again what made this model, by its run.json: the same flags, data and base, or an error; what has changed "
        "of versions and hardware is listed, and the losses and weights are compared at the end",
        type=user_path, metavar="FOLDER")
    report_to: str = _long_run(
        "also send each step's metrics to this tracker (pip install it)",
        choices=("none", "tensorboard", "wandb"), default="none")
    check: bool = _long_run(
        "check everything, print the plan (rows, tokens, memory), load no weights, and stop", action="store_true")
    overwrite: bool = _long_run(
        "replace existing folders, and start again unless --resume is given", action="store_true")
    # fmt: on

    @property
    def harmful_model(self) -> Path:
        """The folder of the stage 1 model that stage 2 reads."""
        return self.saved_model or self.model_save_dir

    @property
    def template_choice(self) -> TemplateChoice:
        """The template that the flags choose."""
        return TemplateChoice(self.template, self.system_prompt)

    @property
    def negates(self) -> bool:
        """Whether stage 2 subtracts what stage 1 learned."""
        return METHODS[self.method].negates

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of the method's loss terms, by name."""
        return loss_weights(vars(self))

    @property
    def loss_parameters(self) -> LossParameters:
        """What the loss terms need beside their weights."""
        given = {name: value for name in PARAMETERS if (value := getattr(self, name)) is not None}
        return LossParameters(**given, seed=self.seed)

    @property
    def uses_landing_point(self) -> bool:
        """Whether a loss term is computed at the landing point."""
        return uses_landing_point(vars(self))

    def to_json(self) -> dict[str, object]:
        """The flags as run.json has them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


def parse_flags(arguments: list[str] | None, about: str = "") -> TrainingSettings:
    """The flags; the first group is the released script's, with its names, meanings and defaults.

    Args:
        about: the script's docstring, for --help.

    Raises:
        UserError: --replay names no model that can be made again.
    """
    text, _, examples = about.partition("\n\nThe paper's")
    parser = FlagParser(prog="unlearn_harm_new.py", description=text, epilog="The paper's" + examples)
    parser.add_settings(TrainingSettings)
    parser.replays(replayed_flags)
    given = vars(parser.parse_args(arguments))
    try:
        flags = apply_method_defaults(given)
    except ValueError as error:
        parser.error(str(error))
    if flags["warmup_steps"] >= flags["max_unlearn_steps"]:
        parser.error("--warmup_steps leaves no step at the full rate: give fewer than --max_unlearn_steps")
    if flags["replay"] and (flags["saved_model"] or flags["stage"] == "negate"):
        parser.error("--replay trains the model again: leave out --saved_model and --stage negate")
    path = Path(flags["model_name"])
    name = path.resolve().name if path.is_dir() else path.name
    if flags["replay"]:
        name += f"-{folder_of(flags['replay']).resolve().name}-replayed"
    flags["model_save_dir"] = flags["model_save_dir"] or ROOT / "models" / f"{name}-harmful"
    flags["task_vector_saving_path"] = flags["task_vector_saving_path"] or ROOT / "models" / f"{name}-unlearned"
    return parser.settings(TrainingSettings, flags)
