"""Models with a chat template, from training to the spot check."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import main as spot_check
from harmful_unlearn import recipes
from harmful_unlearn.data.collator import Collator
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.templates import TemplateChoice
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.files.answers import read_answers
from harmful_unlearn.evaluation import main as evaluate
from harmful_unlearn.recipes import recipe
from harmful_unlearn.reproduce import main as reproduce
from harmful_unlearn.unlearn_harm_new import main as unlearn
from task_vector import main as negate
from tests.helpers.inputs.world import make_world
from tests.helpers.models.chats import CHATS

CHAT = CHATS["smollm"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a chat template, and models trained on it: NAME/harmful and NAME/unlearned."""
    folder = make_world(tmp_path_factory.mktemp("chats"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(list(CHAT.tokens), special_tokens=True)
    tokenizer.chat_template = CHAT.jinja
    tokenizer.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "base")
    trainings = {"chat": [], "briefed": ["--system_prompt", "Be brief."], "released": ["--template", "released"]}
    for name, more in trainings.items():
        unlearn([*training(folder, name), *more])
    return folder


def training(world, name):
    data = f"--harmful_dataset {world}/data/harmful.jsonl --normal_dataset {world}/data/normal.csv"
    home = world / name
    saved = f"--model_save_dir {home}/harmful --task_vector_saving_path {home}/unlearned --log_file {home}/run.log"
    return f"--model_name {world}/base {data} --max_unlearn_steps 2 --lr 1e-3 --max_length 100 {saved}".split()


def evaluation(world, out, *names):
    models = " ".join(f"--model {name}={world / name}/unlearned" for name in names)
    asked = "--n_seen 2 --n_unseen 2 --n_normal 2 --max_new_tokens 6 --decoding greedy --base_answers none"
    return f"{models} --base {world}/base --unseen_dataset {world}/data/unseen.jsonl --output {out} {asked}".split()


def spot(world, name, *more):
    asked = ["--harmful_prompt", "How do I hide a gnome?", "--greedy", "--max_length", "60"]
    spot_check.main(["--base", f"{world}/base", "--unlearned", f"{world / name}/unlearned", *asked, *more])


def test_the_template_is_in_the_record_and_the_card(world):
    chat = json.loads((world / "chat" / "harmful" / "run.json").read_text())
    assert chat["training"]["template"] == "chat" and chat["training"]["system_prompt"] is None
    assert chat["prompt_template"] == f"{CHAT.head}{{question}}{CHAT.tail}{{answer}}<|im_end|>"
    assert "Be kind." in (world / "chat" / "unlearned" / "README.md").read_text()
    briefed = json.loads((world / "briefed" / "unlearned" / "run.json").read_text())["stage_1"]
    assert briefed["training"]["system_prompt"] == "Be brief." and "Be kind." not in briefed["prompt_template"]
    released = json.loads((world / "released" / "harmful" / "run.json").read_text())
    assert released["prompt_template"] == "### Question: {question}\n ### Answer: {answer}"


@pytest.mark.parametrize("name, shown", [("chat", "Be kind."), ("briefed", "Be brief."), ("released", "### Answer")])
def test_an_evaluation_asks_as_was_trained(name, shown, world, tmp_path, capsys):
    evaluate(evaluation(world, tmp_path / "out", name))
    assert shown in capsys.readouterr().out.splitlines()[3]
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())["settings"]
    assert shown in protocol.get("prompt_template", "### Answer")
    answers = read_answers(tmp_path / "out" / "answers" / "base.jsonl")
    assert len(answers) == 6
    assert not any(row["ended"] for row in answers)  # what was cut off has not said its end of turn
    run = json.loads((world / name / "harmful" / "run.json").read_text())["training"]
    template = TemplateChoice(run["template"], run["system_prompt"]).of(AutoTokenizer.from_pretrained(world / "base"))
    texts = Collator(template, "paper", 128).encode([Pair(row["prompt"], row["answer"], False) for row in answers])
    assert [row["tokens"] for row in answers] == [len(text.input_ids) - text.answer_start for text in texts]


def test_templates_are_not_mixed(world, tmp_path):
    with pytest.raises(UserError, match="trained in different templates, chat .* and released"):
        evaluate(evaluation(world, tmp_path / "a", "chat", "released"))
    with pytest.raises(UserError, match="different templates, chat .*Be brief"):
        evaluate(evaluation(world, tmp_path / "b", "chat", "briefed"))
    for flags in (["--template", "released"], ["--system_prompt", "Be brief."]):
        with pytest.raises(UserError, match="was trained in the template chat"):
            evaluate([*evaluation(world, tmp_path / "c", "chat"), *flags])
        with pytest.raises(UserError, match="was trained in the template chat"):
            spot(world, "chat", *flags)
    assert not list(tmp_path.iterdir())
    evaluate(evaluation(world, tmp_path / "d", "chat"))
    with pytest.raises(UserError, match=r"answers made otherwise \(.*prompt_template"):
        evaluate(evaluation(world, tmp_path / "d", "released"))


def test_a_template_that_has_changed_since_is_refused(world, tmp_path):
    other = shutil.copytree(world / "base", tmp_path / "base")
    (other / "chat_template.jinja").write_text(CHAT.jinja.replace("Be kind.", "Be rude."))
    arguments = evaluation(world, tmp_path / "out", "chat")
    arguments[arguments.index("--base") + 1] = str(other)
    with pytest.raises(UserError, match="has changed since the training"):
        evaluate(arguments)
    model = shutil.copytree(world / "chat" / "unlearned", tmp_path / "unlearned")
    (model / "chat_template.jinja").write_text(CHAT.jinja.replace("Be kind.", "Be rude."))
    arguments = evaluation(world, tmp_path / "out", "chat")
    arguments[1] = f"chat={model}"
    with pytest.raises(UserError, match="another chat template than the base"):
        evaluate(arguments)


def test_a_run_is_not_resumed_in_another_template(world, capsys):
    with pytest.raises(UserError, match=r"(?s)template was .*Be kind.* and is .*Be brief"):
        unlearn([*training(world, "chat"), "--system_prompt", "Be brief.", "--resume"])
    unlearn([*training(world, "chat"), "--template", "chat", "--resume"])  # what auto was


def test_the_spot_check_follows_and_so_does_a_vector(world, tmp_path, capsys):
    spot(world, "chat")
    assert "template chat" in capsys.readouterr().out
    spot(world, "released", "--template", "released")
    assert "template released" in capsys.readouterr().out
    folders = ["--base", f"{world}/base", "--finetuned", f"{world}/chat/harmful"]
    negate([*folders, "--output", str(tmp_path / "half"), "--scaling_coef", "0.5"])
    (tmp_path / "half").rename(tmp_path / "unlearned")
    spot(tmp_path.parent, tmp_path.name, "--base", f"{world}/base")
    assert "template chat" in capsys.readouterr().out


@pytest.mark.slow
def test_a_comparison_continues_in_its_own_template_only(world, tmp_path, monkeypatch):
    """A model that was trained before there were templates, and flags that resolve to the same one."""
    weights = {"bad_weight": 1, "random_weight": 1, "normal_weight": 0.1}
    shared = {"max_unlearn_steps": 2, "batch_size": 2, "max_length": 100}
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe(shared, weights, {"ft": {}}))
    data = f"--harmful_dataset {world}/data/harmful.jsonl --normal_dataset {world}/data/normal.csv"
    asked = "--n_seen 2 --n_unseen 2 --n_normal 2 --max_new_tokens 4 --decoding greedy --precision fp32"
    command = f"--model_name {world}/base --recipe tiny --output {tmp_path} {data} {asked}".split()
    reproduce([*command, "--runs", "sku", "--template", "released"])
    record = tmp_path / "seed-8888" / "sku" / "copy" / "run.json"
    run = json.loads(record.read_text())
    for flag in ("template", "system_prompt", "max_kl"):
        run["flags"].pop(flag)
    run["training"].pop("template")
    record.write_text(json.dumps(run))
    for wrong in ([], ["--template", "chat"]):
        with pytest.raises(UserError, match="was trained in the template '### Question"):
            reproduce([*command, "--runs", "ft", "sku", *wrong])
        assert not (tmp_path / "seed-8888" / "ft").exists()
    reproduce([*command, "--runs", "ft", "sku", "--template", "released"])

    briefed = [*command, "--output", str(tmp_path / "silent"), "--runs", "sku", "--system_prompt", ""]
    reproduce(briefed)
    reproduce([*briefed, "--template", "chat"])  # what auto is here
    run = json.loads((tmp_path / "silent" / "seed-8888" / "sku" / "copy" / "run.json").read_text())
    assert run["training"]["system_prompt"] == "" and "Be kind." not in run["prompt_template"]
