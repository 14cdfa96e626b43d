"""The base's answers and scores, kept for later evaluations of other models.

They are in a folder for each way of asking: its name is a hash of the protocol's settings and of the model's identity.
Verdicts and perplexities are not kept: a judge or another model decides them.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.evaluated_model import EvaluatedModel
from harmful_unlearn.evals.protocol import EvalProtocol, sha256_of
from harmful_unlearn.storage.files import new_folder

CONTENT, DIGEST = "base.json", "base.json.sha256"


@dataclass(frozen=True)
class BaseAnswers:
    """What is kept in a folder.

    Attributes:
        rows: the lines of the base's answers file, as they are before anything is decided about them.
        scores: the content of its scores file.
    """

    rows: list[dict]
    scores: dict

    @classmethod
    def read(cls, folder: Path) -> "BaseAnswers | None":
        """What `folder` holds; None if that is nothing, or not what was written."""
        try:
            content = (folder / CONTENT).read_bytes()
            if hashlib.sha256(content).hexdigest() != (folder / DIGEST).read_text(encoding="ascii"):
                return None
            return cls(**json.loads(content))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Keep them in `folder`, in place of what is there."""
        content = json.dumps({"rows": self.rows, "scores": self.scores}, ensure_ascii=False).encode()
        # Another process may be writing the same, or there is no room: then they are not kept.
        with suppress(UserError, OSError), new_folder(folder, overwrite=True) as partial:
            (partial / CONTENT).write_bytes(content)
            (partial / DIGEST).write_text(hashlib.sha256(content).hexdigest(), encoding="ascii")


def folder_of(home: Path, protocol: EvalProtocol, model: EvaluatedModel) -> Path:
    """Where in `home` the answers are that this model gives when it is asked in this way."""
    return home / sha256_of([protocol.settings(), model.identity])[:32]
