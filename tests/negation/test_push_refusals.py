"""What is never pushed to the hub, and what is not changed there."""

import json
import shutil

import pytest

import task_vector
from harmful_unlearn.errors import UserError
from harmful_unlearn.negation import push
from harmful_unlearn.negation.negate import negate
from tests.helpers.models.tiny_pairs import record
from tests.helpers.servers import hub

NAME = "someone/unlearned"


@pytest.mark.parametrize("what", ["models", "adapters"])
def test_a_stage_1_model_is_never_pushed(what, request, server):
    folder = request.getfixturevalue(what)
    shutil.copytree(folder / "harmful", folder / "a fine assistant")
    for name in ("harmful", "a fine assistant"):
        for flags in ([], ["--public"]):
            with pytest.raises(UserError, match="deliberately harmful, and is never pushed"):
                task_vector.main(["--output", str(folder / name), "--push_to_hub", NAME, *flags])
    (folder / "harmful" / "run.json").unlink()
    with pytest.raises(UserError, match="no run.json"):
        push.push(folder / "harmful", NAME)
    with pytest.raises(UserError, match="no run.json"):
        push.push(folder / "base", NAME)
    assert not server.requests


@pytest.mark.parametrize("what", ["models", "adapters"])
def test_other_weights_under_an_unlearned_models_record_are_never_pushed(what, request, server):
    folder = request.getfixturevalue(what)
    name = next((folder / "harmful").glob("*.safetensors")).name
    for file in (smuggled := shutil.copytree(folder / "unlearned", folder / "smuggled")).glob("*.safetensors*"):
        file.unlink()
    shutil.copy(folder / "harmful" / name, smuggled)
    push_it = ["--output", str(smuggled), "--push_to_hub", NAME]
    with pytest.raises(UserError, match="are not what stage 2 wrote, and are never pushed: make it anew"):
        task_vector.main(push_it)
    content = json.loads((smuggled / "run.json").read_text())
    (smuggled / "run.json").write_text(json.dumps(content | {"fingerprint": None}))
    with pytest.raises(UserError, match="does not say which weights it is about: make it anew"):
        task_vector.main(push_it)
    assert not server.requests


@pytest.mark.parametrize("alpha, message", [("-1", "deliberately harmful"), ("0", "does not unlearn")])
def test_what_adds_harm_is_refused_before_it_is_made(alpha, message, models, server):
    made = ["--base", str(models / "base"), "--finetuned", str(models / "harmful"), "--output", str(models / "new")]
    with pytest.raises(UserError, match=message):
        task_vector.main([*made, "--scaling_coef", alpha, "--push_to_hub", NAME])
    assert not (models / "new").exists() and not server.requests


def test_a_record_that_says_little_or_contradicts_itself_is_refused(models, server):
    folder = models / "unlearned"
    written = json.loads((folder / "run.json").read_text())
    for change, message in (
        ({"scaling_coef": -1.0}, "does not unlearn"),
        ({"finetuned": {"a": -1.0}}, "does not unlearn"),
        ({"stage_1": {}}, "does not say how all of its sources"),
        ({"stage_1_of_model_2": written["stage_1"]}, "does not say how all of its sources"),
        ({"finetuned": {}, "stage_1": {}}, "no result of stage 2"),
        ({"scaling_coef": None}, "no result of stage 2"),
        ({"harmful": True}, "deliberately harmful"),
        ({"harmful": None}, "no run.json says"),
    ):
        (folder / "run.json").write_text(json.dumps(written | change))
        with pytest.raises(UserError, match=message):
            push.push(folder, NAME)
    assert not server.requests


def test_a_method_that_does_not_negate(models, server):
    """Its stage 1 model is refused, too; what stage 2 makes of it is not; and its change must not be subtracted."""
    record(models / "harmful", method="ga")
    negate(models / "base", [(models / "harmful", 1.0)], models / "added", -1.0)
    negate(models / "base", [(models / "harmful", 1.0)], models / "subtracted", 1.0)
    push.push(models / "added", NAME)
    assert NAME in server.repositories
    with pytest.raises(UserError, match="no result of stage 2, and is never pushed"):
        push.push(models / "harmful", NAME)
    with pytest.raises(UserError, match="adds what --method ga trained, and its coefficient here is -1"):
        push.push(models / "subtracted", NAME)


def test_a_task_vector_is_no_model(models, server):
    negate(models / "base", [(models / "harmful", 1.0)], None, save_vector=models / "vector")
    with pytest.raises(UserError, match="is a task vector"):
        push.push(models / "vector", NAME)
    assert not server.requests


@pytest.mark.parametrize(
    "private, flags, fix",
    [(False, [], "is a public repository: give --public"), (True, ["--public"], "is a private repository: omit")],
)
def test_no_repository_changes_its_visibility(private, flags, fix, models, server):
    server.repositories[NAME] = hub.Repository(private)
    with pytest.raises(UserError, match=fix):
        task_vector.main(["--output", str(models / "unlearned"), "--push_to_hub", NAME, *flags])
    assert server.repositories[NAME] == hub.Repository(private)


def test_weights_of_another_model_are_not_mixed_in(models, server):
    server.repositories[NAME] = hub.Repository(True, {"model.safetensors": b"", "README.md": b"mine"})
    with pytest.raises(UserError, match="has other weights \\(model.safetensors\\)"):
        push.push(models / "unlearned", NAME)
    assert len(server.repositories[NAME].files) == 2
