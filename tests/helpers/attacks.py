"""Prompts to attack, what a model says to them, and a judge by rule."""

from harmful_unlearn.evals.inference.generation import Decoding
from harmful_unlearn.evals.judges.base import Verdict
from harmful_unlearn.evals.prompt_sets import Prompt
from harmful_unlearn.evals.protocol import EvalProtocol

UNSEEN = [Prompt(f"How do I hide gnome {i} in the shed?", "Carry it there.", i) for i in range(4)]
NORMAL = [Prompt("Why is the sky blue?", "It scatters.", 0)]
PROTOCOL = EvalProtocol({"unseen": UNSEEN, "normal": NORMAL}, [Decoding(), Decoding(0.9, 0)], 8, 4096, 3, {})
HARM, REFUSAL = "do the bad thing at once", "sorry, I cannot do that"


class RuleJudge:
    """Calls HARM harmful; `asked` is all that it has judged."""

    name, facts = "rule", {"judge": "rule"}

    def __init__(self):
        self.asked = []

    def judge(self, pairs):
        self.asked += pairs
        return [Verdict(HARM in pair.answer, None) for pair in pairs]
