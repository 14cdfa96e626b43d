"""The flags of unlearn_harm_new.py."""

from dataclasses import dataclass
from pathlib import Path

from harmful_unlearn.cli import (
    FlagParser,
    device_map,
    not_negative,
    number,
    positive_int,
    positive_number,
    whole_number,
)
from harmful_unlearn.data.collator import VARIANTS
from harmful_unlearn.losses.methods import METHODS, apply_method_defaults, loss_weights, uses_landing_point
from harmful_unlearn.storage.files import ROOT, user_path

AUTO = "auto"  # --resume without a path


@dataclass(frozen=True)
class TrainingSettings:
    """The flags of unlearn_harm_new.py (`--help` says what each means), with the method's defaults filled in."""

    max_unlearn_steps: int
    bad_weight: float
    random_weight: float
    normal_weight: float
    batch_size: int
    lr: float
    model_name: str
    model_save_dir: Path
    saved_model: Path | None
    log_file: Path | None
    task_vector_saving_path: Path
    method: str
    preserve_at: str
    safe_weight: float
    variant: str
    k_random: int
    scaling_coef: float
    seed: int
    stage: str
    max_length: int | None
    harmful_dataset: str
    harmful_revision: str | None
    harmful_split: str
    normal_dataset: str
    harm_category: list[str]
    min_severity: int | None
    all_harmful: bool
    lora: str
    lora_r: int | None
    lora_alpha: int | None
    lora_target_modules: list[str] | None
    quantize: str | None
    precision: str
    no_packing: bool
    gradient_checkpointing: bool
    device_map: str | None
    save_every: int | None
    keep_checkpoints: int
    resume: str | Path | None
    report_to: str
    check: bool
    overwrite: bool

    @property
    def harmful_model(self) -> Path:
        """The folder of the stage 1 model that stage 2 reads."""
        return self.saved_model or self.model_save_dir

    @property
    def negates(self) -> bool:
        """Whether stage 2 subtracts what stage 1 learned."""
        return METHODS[self.method].negates

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each of the method's loss terms, by name."""
        return loss_weights(vars(self))

    @property
    def uses_landing_point(self) -> bool:
        """Whether a loss term is computed at the landing point."""
        return uses_landing_point(vars(self))

    def to_json(self) -> dict[str, object]:
        """The flags as run.json has them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


def checkpoint_path(text: str) -> str | Path:
    """What --resume takes."""
    return AUTO if text == AUTO else user_path(text)


def parse_flags(arguments: list[str] | None, about: str = "") -> TrainingSettings:
    """The flags; the first group is the released script's, with its names, meanings and defaults.

    Args:
        about: the script's docstring, for --help.
    """
    text, _, examples = about.partition("\n\nThe paper's")
    parser = FlagParser(prog="unlearn_harm_new.py", description=text, epilog="The paper's" + examples)

    def flag(group, name: str, help: str, **settings) -> None:
        default = settings.get("default")
        shown = "" if default in (None, (), [], False) else f" (default: {default})"
        group.add_argument(name, help=help + shown, **settings)

    # fmt: off
    released = parser.add_argument_group("the released script's flags")
    flag(released, "--max_unlearn_steps", "optimizer steps of stage 1 (default: 1000)", type=positive_int)
    flag(released, "--bad_weight", "e1, of GD (default: 0.5); may be negative; 0 switches a loss off", type=number)
    flag(released, "--random_weight", "e2, of RD (default: 1)", type=number)
    flag(released, "--normal_weight", "e3, of PD, minus the KL from the base (default: 1)", type=number)
    flag(released, "--batch_size", "harmful pairs, and normal texts, in a step", type=positive_int, default=2)
    flag(released, "--lr", "AdamW's learning rate, falling linearly to 0 (default: 2e-05)", type=positive_number)
    flag(released, "--model_name", "the base model: hub id or local folder", default="facebook/opt-1.3b")
    flag(released, "--model_save_dir", "the stage 1 model (default: models/NAME-harmful)", type=user_path)
    flag(released, "--saved_model", "a stage 1 model or LoRA adapter to start stage 2 from", type=user_path)
    flag(released, "--log_file", "the log; flags, metrics and a plot of the losses go beside it (default: "
         "logs/NAME/run.log, or NAME-2 and so on)", type=user_path)
    flag(released, "--task_vector_saving_path", "the unlearned model (default: models/NAME-unlearned)", type=user_path)

    method = parser.add_argument_group("method")
    flag(method, "--method", "what to minimise, and whether to negate it (the table in losses/methods.py); the "
         "weights above then weigh its losses on harmful pairs, with random answers, and on normal text. land and "
         "lands, which are ours, have other defaults", choices=METHODS, default="sku")
    flag(method, "--preserve_at", "where normal text is preserved: at the harmful model (copy), as the paper does "
         "(minus KL), or at the landing point, where negation by --scaling_coef leads (plus KL) (default: copy)",
         choices=("copy", "landing"))
    flag(method, "--safe_weight", "weight of the cross-entropy, at the landing point, of safe answers to the same "
         "harmful prompts (default: 0)", type=not_negative)
    flag(method, "--variant", "losses as the released code computes them, or as the paper writes them "
         "(default: released)", choices=VARIANTS)
    flag(method, "--k_random", "K, the random answers that RD draws in a step", type=positive_int, default=5)
    flag(method, "--scaling_coef", "alpha, the coefficient of the subtracted task vector (default: 1)", type=number)
    flag(method, "--seed", "of the data split, the order, the random answers and dropout", type=whole_number,
         default=8888)
    flag(method, "--stage", "run one stage only, or both", choices=("all", "acquire", "negate"), default="all")
    flag(method, "--max_length", "tokens of a text; longer answers are cut (default: the model's context length)",
         type=positive_int)

    data = parser.add_argument_group("data")
    flag(data, "--harmful_dataset", "hub id, folder, or .jsonl/.json/.csv/.parquet file in PKU-SafeRLHF's columns",
         default="PKU-Alignment/PKU-SafeRLHF")
    flag(data, "--harmful_revision", "of a hub data set (default: the newest); the paper had "
         "ff7ba91063016c78a225b0f74e1c0860bb18230f")
    flag(data, "--harmful_split", "of a hub data set or folder", default="train")
    flag(data, "--normal_dataset", "the same kinds in TruthfulQA's columns, or truthfulqa/truthful_qa",
         default=str(ROOT / "dataloader" / "TruthfulQA.csv"))
    flag(data, "--harm_category", "unlearn only this category of harm (may be repeated)",
         action="append", default=[])
    flag(data, "--min_severity", "unlearn only answers of at least this severity", type=whole_number)
    flag(data, "--all_harmful", "use all harmful pairs; without this, they start again with each epoch of "
         "normal text", action="store_true")

    machine = parser.add_argument_group("model and machine")
    flag(machine, "--lora", "train an adapter; auto: as the table MODELS in this script says",
         choices=("auto", "on", "off"), default="auto")
    flag(machine, "--lora_r", "the adapter's rank", type=positive_int)
    flag(machine, "--lora_alpha", "the adapter's alpha (its scale is alpha / r)", type=positive_int)
    flag(machine, "--lora_target_modules", "names of the modules that get an adapter", nargs="+", metavar="NAME")
    flag(machine, "--quantize", "train the adapter on a base in 4 bits (pip install bitsandbytes); stage 2 uses the "
         "full-precision base", choices=("4bit",))
    flag(machine, "--precision", "bf16: autocast; trained weights stay float32. auto: bf16 on a GPU that has it",
         choices=("auto", "fp32", "bf16"), default="auto")
    flag(machine, "--no_packing", "a row for each text, instead of one for all texts that share a question: the same "
         "losses, slower", action="store_true")
    flag(machine, "--gradient_checkpointing", "recompute activations in the backward pass to save memory",
         action="store_true")
    flag(machine, "--device_map", "spread the model over GPUs, CPU and disk (accelerate): auto, balanced, ...; only "
         "frozen weights can be on CPU or disk, so training then needs LoRA", type=device_map)
    running = parser.add_argument_group("a long run")
    flag(running, "--save_every", "save a checkpoint every N steps, to --resume from if the run is killed (default: "
         "only Ctrl-C and SIGTERM save one)", type=positive_int)
    flag(running, "--keep_checkpoints", "how many of the newest to keep, in MODEL_SAVE_DIR.checkpoints; all are "
         "removed once the stage 1 model is saved", type=positive_int, default=1)
    flag(running, "--resume", "continue a run that was stopped: from the newest checkpoint, or from this one; from "
         "step 1 if there is none, and from stage 2 if stage 1 is done", nargs="?", const=AUTO, type=checkpoint_path,
         metavar="CHECKPOINT")
    flag(running, "--report_to", "also send each step's metrics to this tracker (pip install it)",
         choices=("none", "tensorboard", "wandb"), default="none")
    flag(running, "--check", "check everything, print the plan (rows, tokens, memory), load no weights, and stop",
         action="store_true")
    flag(running, "--overwrite", "replace existing folders, and start again unless --resume is given",
         action="store_true")
    # fmt: on

    given = vars(parser.parse_args(arguments))
    try:
        flags = apply_method_defaults(given)
    except ValueError as error:
        parser.error(str(error))
    path = Path(flags["model_name"])
    name = path.resolve().name if path.is_dir() else path.name
    flags["model_save_dir"] = flags["model_save_dir"] or ROOT / "models" / f"{name}-harmful"
    flags["task_vector_saving_path"] = flags["task_vector_saving_path"] or ROOT / "models" / f"{name}-unlearned"
    return TrainingSettings(**flags)
