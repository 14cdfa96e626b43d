"""The authors' figures, through the code path that the script runs (goldens: tests/goldens)."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harmful_unlearn.data.batch_sampler import StepIndices
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.pku_saferlhf import read_harmful
from harmful_unlearn.data.step_batches import StepBatches
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.losses import objective
from harmful_unlearn.losses.terms import reads
from harmful_unlearn.models.loading import load_model
from harmful_unlearn.training.flags import parse_flags
from harmful_unlearn.training.run_log import RunLog
from harmful_unlearn.training.setup import Stage1
from harmful_unlearn.unlearn_harm_new import acquire
from task_vector import TaskVector
from tests.helpers.models.tiny import GOLDENS, value_of

LOSS_TOLERANCE = 5e-4  # over the trajectory; relative, absolute for losses below 1e-3
FIRST_STEP_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 5e-4
SCHEMAS = ("pku_saferlhf.jsonl", "pku_saferlhf_current_schema.jsonl")


class GoldenSampler:
    """The rows that each recorded step used, in BatchSampler's place."""

    def __init__(self, trajectory: list[dict]):
        self.trajectory = trajectory

    def __getitem__(self, step: int) -> StepIndices:
        used = self.trajectory[step]
        return StepIndices(used["harmful_rows"], used["normal_rows"], used["random_answer_rows"])


@pytest.fixture(scope="module")
def batches(goldens, tokenizer):
    return StepBatches(
        Collator(ReleasedTemplate(tokenizer), "released", 1024),
        GoldenSampler(goldens["trajectory"]),
        read_harmful(str(GOLDENS / SCHEMAS[0])),
        read_normal(GOLDENS / "TruthfulQA.csv", 8888),
        reads({"gd", "rd", "pd"}),
    )


def load_base() -> torch.nn.Module:
    return load_model(GOLDENS / "model", torch.float32)


@pytest.fixture(scope="module", params=["packed", "plain rows", "plain rows, all logits at once"])
def trained(request, goldens, batches, tmp_path_factory):
    """The model and the metrics after the 20 recorded steps, by each path."""
    batches = replace(batches, packed_up_to=math.inf if request.param == "packed" else 0)
    if "at once" in request.param:
        undo = pytest.MonkeyPatch()
        undo.setattr(objective, "has_plain_head", lambda _: False)
        request.addfinalizer(undo.undo)
    used = goldens["hyper_parameters"]
    folder = tmp_path_factory.mktemp("golden")
    settings = parse_flags(
        f"--bad_weight {used['bad_weight']} --random_weight {used['random_weight']} "
        f"--normal_weight {used['normal_weight']} --lr {used['lr']} --max_unlearn_steps {used['steps']} "
        f"--model_save_dir {folder / 'harmful'} --log_file {folder / 'run.log'}".split()
    )
    run = Stage1(settings, GOLDENS / "model", None, "fp32", Accelerator(cpu=True), batches, plan=None)
    with RunLog(settings) as log:
        harmful = acquire(run, log)
    return load_model(harmful, torch.float32), log.history


@pytest.mark.parametrize("schema", SCHEMAS)
def test_examples_are_the_released_ones(goldens, batches, schema):
    encoded = batches.collator.encode(read_harmful(str(GOLDENS / schema)).pairs)
    expected = goldens["harmful_examples"]
    assert [text.input_ids for text in encoded] == [example["input_ids"] for example in expected]
    assert [text.start_loc for text in encoded] == [example["start_loc"] for example in expected]


def test_pool_and_normal_texts_are_the_released_ones(goldens, batches):
    answers = batches.harmful.answers
    assert len(answers) == goldens["harmful_answer_pool_size"]
    assert answers[0].startswith(goldens["harmful_answer_pool_first"])
    normal = batches.normal
    assert [text.input_ids for text in batches.collator.encode(normal.texts)] == goldens["normal_examples"]
    assert [len(normal.train), len(normal.validation), len(normal.test)] == goldens["normal_split_sizes"]


def test_packed_rows_hold_what_plain_rows_do(goldens, batches):
    packed, plain = (replace(batches, packed_up_to=up_to)(0, torch.device("cpu"))[0].harmful for up_to in (math.inf, 0))
    assert (
        packed.is_packed
        and len(packed.input_ids) == 1
        and len(plain.input_ids) == 2 + 2 * goldens["hyper_parameters"]["k_random"]
    )


def test_first_step_to_float32_rounding(goldens, trained):
    ours, theirs = trained[1][0], goldens["trajectory"][0]
    for name in ("gd_loss", "rd_loss", "pd_loss", "total_loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=FIRST_STEP_TOLERANCE, abs=1e-6), name


def test_trajectory(goldens, trained):
    assert len(trained[1]) == len(goldens["trajectory"])
    for ours, theirs in zip(trained[1], goldens["trajectory"], strict=True):
        for name in ("gd_loss", "rd_loss", "pd_loss", "total_loss", "grad_norm", "lr"):
            bound = LOSS_TOLERANCE * (abs(theirs[name]) if abs(theirs[name]) > 1e-3 else 1)
            assert abs(ours[name] - theirs[name]) <= bound, (theirs["step"], name)


def test_harmful_weights(trained):
    assert worst(trained[0].state_dict(), load_file(GOLDENS / "harmful_model.safetensors")) < WEIGHT_TOLERANCE


def test_unlearned_weights(trained):
    base = load_base()
    unlearned = (-TaskVector(base, trained[0])).apply_to(base, 1.0)
    theirs = load_file(GOLDENS / "unlearned_model.safetensors")
    assert worst(unlearned.state_dict(), theirs) < WEIGHT_TOLERANCE
    assert unlearned.lm_head.weight is unlearned.model.decoder.embed_tokens.weight


def worst(ours: dict, theirs: dict) -> float:
    # The gradient of k_proj.bias is zero but for rounding, which AdamW blows up (goldens' README).
    names = [name for name in theirs if not name.endswith("k_proj.bias")]
    return max((ours[name] - theirs[name]).abs().max().item() for name in names)


def test_gradient_ascent(goldens, batches):
    harmful = batches(0, torch.device("cpu"))[0].harmful
    model = load_base().eval()
    with torch.no_grad():
        loss = value_of(model, "ga", harmful)
    assert loss.item() == pytest.approx(goldens["ga_loss_first_batch"], rel=FIRST_STEP_TOLERANCE)


def test_the_golden_can_fail(goldens, tokenizer, batches):
    """One position off in the answer's start moves the first loss by far more than the tolerance."""
    paper = StepBatches(
        Collator(ReleasedTemplate(tokenizer), "paper", 1024),
        batches.sampler,
        batches.harmful,
        batches.normal,
        batches.reads,
    )
    harmful = paper(0, torch.device("cpu"))[0].harmful
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "model").eval()
    with torch.no_grad():
        loss = value_of(model, "gd", harmful)
    assert abs(loss.item() - goldens["trajectory"][0]["gd_loss"]) > 1e-3
