"""The judges by name."""

import pytest

from harmful_unlearn.errors import UserError
from tests.helpers.judges import make


@pytest.mark.parametrize("name", ["", "oracle", "hf", "hf:", "openai:", "classifier:x", "HF:x"])
def test_an_unknown_judge_names_the_three(name):
    with pytest.raises(UserError, match="classifier.*hf:.*openai:"):
        make(name)
