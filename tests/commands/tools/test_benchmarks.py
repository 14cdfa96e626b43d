"""Each benchmark runs on a tiny model and prints its table, and prints no time where its ways disagree."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import evaluation, gpu, gpu_check, judges, made_up, measuring, memory, negation, step
from harmful_unlearn.data.batch import Batch
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.step_batches import StepBatch
from harmful_unlearn.data.templates import ReleasedTemplate
from harmful_unlearn.errors import UserError
from harmful_unlearn.models.loading import load_model
from harmful_unlearn.models.lora import Lora, add_lora
from tests.helpers.models.tiny import GOLDENS

CPU = torch.device("cpu")
SHAPE = ["--hidden", "32", "--layers", "2", "--vocabulary", "700"]
DATA = ["--harmful_dataset", str(GOLDENS / "pku_saferlhf_current_schema.jsonl")]
NORMAL = ["--normal_dataset", str(GOLDENS / "TruthfulQA.csv")]


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """A product of the usual size takes many seconds without bf16 instructions."""
    monkeypatch.setitem(measuring.SIDE_OF_MATRIX, "cpu", 256)


@pytest.fixture
def printed(monkeypatch, capsys):
    """`printed(step, "--lora")`: what the benchmark prints."""

    def run(benchmark, *flags) -> str:
        monkeypatch.setattr(sys, "argv", [benchmark.__file__, *map(str, flags)])
        benchmark.main()
        return capsys.readouterr().out

    return run


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """A printed table by its first column, which is headed `title`."""
    lines = text[text.index(f"| {title} |") :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


# --- step ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_of_ones_own_model_and_data(tiny_model, printed):
    text = printed(step, "--device", "cpu", "--model", tiny_model("llama"), *DATA, *NORMAL, "--repeat", 1, "--ways",
                   "packed", "--tokens_per_pass", 100)  # fmt: skip
    rows = rows_of(text, "step")
    assert list(rows) == ["packed"] and rows["packed"][2] == "1/1.00"
    assert all(float(row[1]) > 0 and row[3].endswith("%") and float(row[4]) >= 0 for row in rows.values())
    shares = rows_of(text[text.index("Where a step goes") :], "step")
    assert all(97 <= sum(int(share.rstrip("%")) for share in row) <= 103 for row in shares.values())
    assert "GFLOP/s in fp32" in text and "pku_saferlhf_current_schema.jsonl" in text


@pytest.mark.parametrize(
    "more",
    [
        [],
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (["--lora"], ["--precision", "bf16"], ["--lora", "--precision", "bf16"])
        ),
    ],
)
def test_all_ways_of_a_step(more, printed, monkeypatch):
    monkeypatch.setattr(step, "of_own_process", lambda name: 2**20)
    short = [*SHAPE, "--answer_tokens", 15, "--repeat", 1]
    text = printed(step, "--device", "cpu", *short, "--ways", *step.WAYS, *more)
    rows = rows_of(text, "step")
    assert list(rows) == list(step.WAYS)
    assert {name: row[0] for name, row in rows.items() if name != "released"} == dict.fromkeys(
        [*step.WAYS][1:], "bf16" if "bf16" in more else "fp32"
    )
    assert rows["released"][0] == "fp32"


def test_steps_with_other_losses_print_no_time(printed, monkeypatch, capsys):
    right = step.released

    def wrong(*arguments):
        loss, values = right(*arguments)
        return loss, {**values, "gd": values["gd"] + 0.1}

    monkeypatch.setattr(step, "released", wrong)
    with pytest.raises(UserError, match="the losses differ"):
        printed(step, "--device", "cpu", *SHAPE, "--repeat", 1, "--ways", "released", "packed")
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="the losses differ"):
        step.check_losses({"released": {"gd": 1.0}, "packed": {"gd": float("nan")}}, "fp32")


def test_real_data_need_a_tokenizer(printed):
    with pytest.raises(UserError, match="--harmful_dataset needs a tokenizer"):
        printed(step, *SHAPE, *DATA)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_of_a_run_against_its_plan(printed, tmp_path, monkeypatch):
    flags = [*SHAPE, "--steps", 2, "--trains", "LoRA", "--precisions", "fp32", "--record", tmp_path / "record.json",
             "--folder", tmp_path]  # fmt: skip
    text = printed(memory, *flags)
    (row,) = rows_of(text, "model").values()
    assert row[:3] == ["LoRA", "fp32", "2"] and "2 steps: program 0.60, weights" in text
    (done,) = json.loads((tmp_path / "record.json").read_text()).values()
    assert 0.2 < done["planned"] / done["measured"] < 5
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]

    monkeypatch.setattr(measuring, "watched", lambda *_, **__: pytest.fail("it was measured again"))
    assert printed(memory, *flags) == text


@pytest.mark.slow
def test_a_run_that_fails_is_reported(printed, tmp_path):
    with pytest.raises(UserError, match="failed: .*no-such-file"):
        printed(memory, *SHAPE, "--harmful_dataset", tmp_path / "no-such-file.jsonl", "--record", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


# --- evaluation ---------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--prompts", 6, "--max_new_tokens", 5, "--repeat", 1]


def test_an_evaluation(tiny_model, printed):
    text = printed(evaluation, *SMALL, "--model", tiny_model("qwen2"), *DATA, "--precision", "bf16",
                   "--tokens_per_batch", 100, "--prompts", 3)  # fmt: skip
    assert list(rows_of(text, "work")) == ["greedy", "sampled", "scoring", "choices"]
    assert len(rows_of(text.partition("Where the time")[2], "work")["choices"]) == len(measuring.KINDS)
    assert text.count("| ours |") == 4 and "qwen2" not in text.splitlines()[0].split(",")[1]


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        ("their_answers", lambda *a: ["other"] * 6, "greedy answers differ"),
        ("their_scores", lambda *a: [(1.0, 1)] * len(a[2]), "scores differ"),
    ],
)
def test_evaluations_that_differ_print_no_time(function, wrong, message, printed, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, function, wrong)
    with pytest.raises(UserError, match=message):
        printed(evaluation, *SMALL, *SHAPE)
    assert not capsys.readouterr().out


# --- GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs(tmp_path):
    """In a process without the package datasets, which the machine with the GPU lacks."""
    output = tmp_path / "gpu.json"
    flags = ["gpu.py", "--device", "cpu", "--tiny", "--output", str(output), "--folder", str(tmp_path)]
    lines = ["import sys", "sys.path.insert(0, '.')", "sys.modules['datasets'] = None", f"sys.argv = {flags}"]
    lines += ["from benchmarks import gpu, measuring", "measuring.SIDE_OF_MATRIX['cpu'] = 256", "gpu.main()"]
    words = [sys.executable, "-c", "; ".join(lines)]
    text = measuring.watched(words, "VmHWM")[2]
    report = json.loads(output.read_text())
    assert len(report["tables"]["check"]) == 6 and len(report["tables"]["steps"]) >= 8
    assert report["tables"]["stage 2"] and len(report["tables"]["evaluation"]) == 8
    assert all("4-bit: not measured" in note for note in report["notes"])
    assert all(title[0] in text for title in gpu.HEADERS.values())


def test_wrong_figures_of_a_gpu_stop_it(printed, monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu_check,
        "losses_and_gradients",
        lambda model, base, collator, layout: {
            name: (1.0, torch.tensor([1.0 if layout == "plain rows" else 1.1])) for name in gpu_check.LOSSES
        },
    )
    with pytest.raises(gpu_check.Wrong, match="not those of the CPU"):
        printed(gpu, "--device", "cpu", "--tiny", "--output", tmp_path / "gpu.json")


def test_a_part_that_fails_loses_its_own_rows_only(printed, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "stage_2", lambda *_: 1 / 0)
    parts = ["OPT-1.3B, every weight", "stage 2", "evaluation"]
    text = printed(gpu, "--device", "cpu", "--tiny", "--output", tmp_path / "gpu.json", "--parts", *parts)
    assert "stage 2: not measured (ZeroDivisionError" in text and "tokens a second" in text
    assert len(json.loads((tmp_path / "gpu.json").read_text())["tables"]["steps"]) == 2
    text = printed(gpu, "--device", "cpu", "--tiny", "--output", tmp_path / "gpu.json", "--minutes", "-1")
    assert text.count("no time was left") == len(gpu.TRAINED) + 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(printed):
    with pytest.raises(UserError, match="no GPU was found"):
        printed(gpu)


# --- what they share ----------------------------------------------------------------------------------------------


@pytest.mark.slow  # bench-gpu's test has its parts
def test_negation(printed, tmp_path, monkeypatch):
    monkeypatch.setattr(negation, "opt_config", lambda _: made_up.opt_config(32, 1, 700))
    monkeypatch.setattr(negation, "RELEASED", negation.IN_MEMORY)
    text = printed(negation, "--runs", 1, "--folder", tmp_path, "--mergekit", "no-such-command")
    assert "task_vector.py" in rows_of(text, "task")


def test_needed_operations(tiny_model):
    model = load_model(tiny_model("opt"), torch.float32)
    batch = Collator(ReleasedTemplate(made_up.word_tokenizer(700)), "released", 256).texts_batch(
        made_up.data(made_up.word_tokenizer(700))[1].texts[:2]
    )
    assert isinstance(batch, Batch)
    layer, head = 4 * 32 * 32 + 2 * 32 * 64, 700 * 32
    body, tokens, scored = 2 * layer, batch.tokens, len(batch.row)
    passes = [StepBatch(normal=batch)]
    # Forward, two gradients, and the base's forward pass.
    assert measuring.needed_flops(model, passes, {"pd": 1.0}) == 2 * 4 * (tokens * body + scored * head)
    assert measuring.needed_flops(model, passes, {"gd": 1.0}) == 0
    adapted = add_lora(model, Lora(r=4, alpha=4), "base")
    adapter = 2 * 2 * 4 * (32 + 32)  # r on q_proj and v_proj of two layers
    expected = 2 * (tokens * (3 * body + 3 * adapter) + 3 * scored * head)
    assert measuring.needed_flops(adapted, passes, {"pd": 1.0}) == expected


def test_where_time_goes_adds_up():
    weight = torch.randn(700, 64, requires_grad=True)

    def work() -> None:
        hidden = torch.randn(300, 64) @ torch.randn(64, 64)
        (hidden @ weight.t()).softmax(-1).sum().backward()

    shares = measuring.where_time_goes(work, CPU, 700)
    assert sum(shares.values()) == pytest.approx(1) and shares["head and losses"] > 0.3


def test_watched_commands_are_quiet_until_they_fail():
    words = [sys.executable, "-c", "import time; print('text'); time.sleep(0.3)"]
    seconds, peak, said = measuring.watched(words, "VmHWM")
    assert seconds > 0.3 and peak > 2**20 and said == "text\n"
    with pytest.raises(UserError, match="some reason"):
        measuring.watched([sys.executable, "-c", "raise SystemExit('some reason')"], "VmHWM")


def test_benchmarks_are_named_in_their_own_help(printed, capsys):
    for benchmark in (step, memory, evaluation, gpu, negation):
        with pytest.raises(SystemExit):
            printed(benchmark, "--help")
        assert Path(benchmark.__file__).name in capsys.readouterr().out


# --- judges -------------------------------------------------------------------------------------------------------

HARM, REFUSAL = "Take the number from the drawer, it is easy.", "Sorry, I cannot help with the number."


@pytest.fixture
def labelled(tmp_path):
    """The flags: data in which answers are easy to tell, twenty answers of two models, and labels for them."""
    rows = [
        {"prompt": f"How {i}?", "response_0": f"{HARM} {i}", "response_1": f"{REFUSAL} {i}",
         "is_response_0_safe": False, "is_response_1_safe": True}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["sha256,model,label"]
    for model, text, label in (("base", HARM, "harmful"), ("sku", REFUSAL, "refused")):
        answers = [{"prompt": f"How {i}?", "answer": f"{text} {i}!"} for i in range(10)]
        file = tmp_path / "out" / "answers" / f"{model}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in answers))
        lines += [f"{judges.digest(Pair(row['prompt'], row['answer']))},{model},{label}" for row in answers]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return ["--labels", tmp_path / "labels.csv", "--answers", tmp_path / "out", *NORMAL,
            "--harmful_dataset", tmp_path / "harmful.jsonl"]  # fmt: skip


def test_judges_are_measured_on_labelled_answers(labelled, printed, tmp_path):
    text = printed(judges, *labelled)
    assert rows_of(text, "judge")["classifier"][:4] == ["20", "1.0", "1.0", "0%"]
    called = rows_of(text, "label")
    assert called["harmful"] == ["10", "100%", "0%"] and called["safe"] == ["0", "–", "–"]
    assert called["refused"] == ["10", "0%", "100%"]  # they begin as published refusals do
    assert rows_of(text, "model") == {
        "base": ["10", "100%", "0%", "0%", "0%", "100%"],
        "sku": ["10", "0%", "100%", "0%", "0%", "0%"],
    }
    (tmp_path / "out" / "answers" / "base.jsonl").unlink()
    assert "10 of 20 labelled answers found" in printed(judges, *labelled)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ("sha256,model,label\nabc,base,bad\n", "use harmful, refused, safe, nonsense"),
        ("sha256,label\nabc,safe\n", "columns sha256, model and label"),
        ("sha256,model,label\nabc,base,safe\n", "none of the answers"),
    ],
)
def test_labels_that_cannot_be_used_are_named(labels, named, labelled, printed, tmp_path):
    (tmp_path / "labels.csv").write_text(labels)
    with pytest.raises(UserError, match=named):
        printed(judges, *labelled)
