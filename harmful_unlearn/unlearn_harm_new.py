"""SKU: unlearn harmful knowledge from a causal language model (Liu et al., Findings of ACL 2024).

Stage 1, harmful knowledge acquisition: theta, starting from the base theta_o, learns the harm by minimising
    L = bad_weight * L_GD + random_weight * L_RD + normal_weight * L_PD         (losses/terms.py has the formulas)
Stage 2, knowledge negation: unlearned = theta_o - scaling_coef * (theta - theta_o)

The paper's OPT-2.7B run:
    python unlearn_harm_new.py --bad_weight 2.5 --random_weight 2.5 --normal_weight 1 --lr 2e-4 \\
        --max_unlearn_steps 1000 --model_name=facebook/opt-2.7b --batch_size 2 \\
        --model_save_dir=models/opt-2.7b-harmful --log_file=logs/opt-2.7b-unlearn_new.log \\
        --task_vector_saving_path=models/opt-2.7b-unlearned
See what a run would do and need, without loading weights:
    python unlearn_harm_new.py --model_name facebook/opt-2.7b --check
Negate a stage 1 model that is there already:
    python unlearn_harm_new.py --model_name facebook/opt-2.7b --saved_model models/opt-2.7b-harmful
One of the methods that the paper compares with (the table in losses/methods.py):
    python unlearn_harm_new.py --model_name facebook/opt-2.7b --method task_vector
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import harmful_unlearn.cli.before_imports  # noqa: F401

from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import Stopped
from harmful_unlearn.losses.landing import LandingPoint
from harmful_unlearn.losses.objective import Objective
from harmful_unlearn.models.lora import Lora
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.negation.records import check_landing
from harmful_unlearn.negation.sources import open_matched
from harmful_unlearn.storage.lock import locked
from harmful_unlearn.training.checkpointing import read_history
from harmful_unlearn.training.distributed import is_main_process, print_once
from harmful_unlearn.training.engine import STAGE_2, Engine
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.replay import compare
from harmful_unlearn.training.run_log import RunLog, beside
from harmful_unlearn.training.setup import Run, Stage1, load_models, prepare
from harmful_unlearn.training.summary import summary

# One line a model: None trains every weight, Lora(r, alpha, target modules) an adapter.
# Add your model here; one that is not listed gets OTHER_MODELS above 3e9 parameters, None below.
MODELS: dict[str, Lora | None] = {
    "facebook/opt-1.3b": None,
    "facebook/opt-2.7b": None,  # the paper's
    "meta-llama/Llama-2-7b-hf": Lora(r=32, alpha=16),  # the paper's
    "meta-llama/Llama-2-13b-hf": Lora(r=16, alpha=8),  # the paper's
    "meta-llama/Llama-3.2-1B": None,
    "meta-llama/Llama-3.1-8B": Lora(r=32, alpha=16),
    "Qwen/Qwen2.5-1.5B": None,
    "Qwen/Qwen2.5-7B": Lora(r=32, alpha=16),
    "Qwen/Qwen3-8B": Lora(r=32, alpha=16),
    "mistralai/Mistral-7B-v0.3": Lora(r=32, alpha=16),
    "google/gemma-2-9b": Lora(r=32, alpha=16),
    "HuggingFaceTB/SmolLM2-135M-Instruct": None,  # make laptop
    "google/gemma-3-270m": None,
}
OTHER_MODELS = Lora(r=32, alpha=16, target_modules=("q_proj", "v_proj"))


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that the flags ask for. Raises UserError before any work that cannot end well."""
    run = prepare(parse_flags(arguments, __doc__), MODELS, OTHER_MODELS)
    settings, harmful = run.settings, run.settings.harmful_model
    if run.stages == {"negate"} and run.has_weights:
        open_matched(run.base_folder, [harmful])
        check_landing([(harmful, 1.0)], [settings.scaling_coef])
    if settings.check:
        print_once("check passed: nothing was loaded or written")
        return
    if run.stage_1 and "acquire" not in run.stages and is_main_process():
        run.stage_1.checkpoints.remove()  # of a run that was killed right after it had saved its model
    if not run.stages:
        print_once("everything is there: nothing is left to do")
        return

    checkpoint = run.stage_1.checkpoint if run.stage_1 else None
    history = read_history(checkpoint) if checkpoint else []
    log_files = [beside(settings.log_file, ".log")] if settings.log_file else []  # without one the log is a new one
    outputs = [*run.outputs, *log_files] if is_main_process() else []
    with locked(*outputs), RunLog(settings, is_main_process(), history, run.notes) as log:
        if run.stage_1 and "acquire" in run.stages:
            with log.timing("stage 1"):
                harmful = acquire(run.stage_1, log, stage_2_follows="negate" in run.stages)
        if "negate" in run.stages and is_main_process():
            with log.timing("stage 2"):
                unlearn(run, harmful, log)
        is_negated = "negate" in run.stages
        log.say(summary(settings, log, harmful, first_step=len(history), negated=is_negated))
        if settings.replay:
            compare(settings.replay, log, harmful, settings.task_vector_saving_path if is_negated else None)


def acquire(run: Stage1, log: RunLog, stage_2_follows: bool = False) -> Path:
    """Stage 1, harmful knowledge acquisition: theta learns e1 * L_GD + e2 * L_RD + e3 * L_PD.

    Returns:
        The folder of the harmful model.

    Raises:
        Diverged: a loss or the gradient is NaN or infinite.
        Stopped: Ctrl-C or SIGTERM, after a checkpoint.
    """
    theta, theta_o = load_models(run)
    objective = Objective(theta, run.settings.loss_weights, theta_o, run.settings.loss_parameters)
    landing = None
    if theta_o and run.settings.uses_landing_point:  # LAND and LANDS only
        landing = LandingPoint(theta, theta_o, run.settings.scaling_coef)

    with Engine(run, theta, theta_o, log) as engine:  # optimizer, schedule, processes, checkpoints, resuming
        for passes in engine.steps():  # one, or several of at most --tokens_per_pass
            # Guided Distortion (GD): the harmful answer, given its own harmful prompt.
            # Random Disassociation (RD): K random harmful answers, given that prompt; the same forward pass.
            # Preservation Divergence (PD): minus the KL divergence from theta_o on normal text.
            engine.backward(objective, passes)

            # What is to hold at the landing point theta', the model that stage 2 will write.
            if landing:
                with landing.reached() as chain_rule:
                    engine.backward(objective.at_landing, passes, chain_rule)

            engine.step(passes)  # AdamW, the linear schedule, the log; a NaN stops here
            engine.after_step()  # a checkpoint if one is due; stops here if asked to
        return engine.save(stage_2_follows)


def unlearn(run: Run, harmful: Path, log: RunLog) -> None:
    """Stage 2, knowledge negation: theta_o - scaling_coef * (theta - theta_o).

    A method that does not negate (GA, FT, ...) gets theta itself, in the base's dtype.
    """
    settings, alpha = run.settings, run.settings.scaling_coef if run.settings.negates else -1.0
    purpose = "knowledge negation" if settings.negates else "no negation, the trained model in the base's dtype"
    log.say(f"stage 2, {purpose}: {harmful} -> {settings.task_vector_saving_path}")
    try:
        negate(
            run.base_folder,
            [(harmful, 1.0)],
            settings.task_vector_saving_path,
            alpha,
            base_name=settings.model_name,
            overwrite=settings.overwrite,
        )
    except (OSError, KeyboardInterrupt, Stopped):
        log.say(f"the stage 1 model in {harmful} is complete: {STAGE_2}")
        raise
    log.say(f"unlearned model saved: {settings.task_vector_saving_path}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
