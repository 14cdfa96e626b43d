"""What run.json and the card of a negated model say."""

import json

import pytest

from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import SafetensorsFolder


def test_another_base_of_the_same_shape_is_warned_of(tmp_path, pair, capsys):
    fingerprint = SafetensorsFolder(pair[0]).fingerprint()
    for recorded, warned in ((fingerprint, False), ("0" * 64, True)):
        (pair[1] / "run.json").write_text(json.dumps({"base": {"name": "x", "fingerprint": recorded}}))
        negate(pair[0], [(pair[1], 1.0)], tmp_path / str(warned))
        assert ("trained from other weights" in capsys.readouterr().out) == warned


def test_the_card_says_what_was_done(tmp_path, pair):
    stage_1 = {
        "base": {"name": "facebook/opt"},
        "flags": {"lr": 1},
        "losses_at_the_end": {"gd_loss": 2.0},
        "title": "T",
        "python": "3",
    }
    (pair[1] / "run.json").write_text(json.dumps(stage_1))
    (pair[0] / "run.json").write_text('{"title": "the base\'s own"}')
    (pair[0] / "README.md").write_text("the base's own")
    (pair[0] / "pytorch_model.bin").write_bytes(b"pickle")
    (pair[0] / "LICENSE").write_text("terms")
    negate(pair[0], [(pair[1], 1.0)], tmp_path / "out", 0.5, base_name="facebook/opt-1.3b")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["base"]["name"] == "facebook/opt-1.3b" and record["base"]["fingerprint"]
    assert record["scaling_coef"] == 0.5
    assert record["finetuned"] == {str(pair[1]): 1.0} and record["harmful"] is False
    template = "### Question: {question}\n ### Answer: {answer}"
    facts = {key: stage_1[key] for key in ("base", "flags", "losses_at_the_end")}
    assert record["stage_1"] == {**facts, "negates": True, "prompt_template": template}
    assert "base_model: facebook/opt-1.3b" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "LICENSE").exists() and not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("method, adds_harm", [("sku", True), ("ft", False)])
def test_what_adds_learned_harm_to_the_base_is_marked_harmful(method, adds_harm, tmp_path, pair):
    """Subtracting is safe, adding is not; and what stage 2 took away comes back if its own change is subtracted."""
    base, harmful = pair
    facts = {"flags": {"method": method}, "negates": adds_harm, "record_version": 1}
    (harmful / "run.json").write_text(json.dumps({"harmful": adds_harm, **facts}))
    negate(base, [(harmful, 1.0)], tmp_path / "unlearned", save_vector=tmp_path / "vector")
    negate(base, [(harmful, -1.0)], None, save_vector=tmp_path / "negative_vector")
    sources = {"tuned": 1, "vector": 1, "negative_vector": -1, "unlearned": -1}
    for name, sign in sources.items():
        for alpha in (0.5, 0.0, -0.5):
            negate(base, [(tmp_path / name, 1.0)], tmp_path / "out", alpha, overwrite=True)
            record = RunRecord.read(tmp_path / "out")
            assert record.harmful is (adds_harm and alpha * sign < 0), (name, alpha)
