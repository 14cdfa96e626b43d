"""The loss terms: SKU's three, with the paper's formulas, and those of the methods it is compared with.

SKU's stage 1 trains theta, starting from the base theta_o, on

    L = e1 * L_GD + e2 * L_RD + e3 * L_PD                                     (method, Section 4 of the paper)

    L_GD = mean over harmful pairs (x, y) of          CE_theta(y | x)                Guided Distortion
    L_RD = mean over harmful prompts x and K random
           harmful answers y_k of                     CE_theta(y_k | x)              Random Disassociation
    L_PD = - mean over positions of normal text of    KL(P_theta_o || P_theta)       Preservation Divergence

with CE the cross-entropy of the next token, in nats. GD and RD differ in which answer follows the prompt, and in
what `--variant released` averages over:

          released (what the authors' code computes)          paper
    L_GD  mean over texts of the mean over the positions       mean over texts of the mean over the answer's tokens,
          from the answer's first token to the last. The       the first included and nothing else
          last one predicts nothing and counts as 0; the
          answer's first token is predicted only
          in a chat template (details 3, 4 and 9).
    L_RD  as L_GD, but from token 2 of the text on: the        as L_GD
          question is predicted, too (detail 11).
    L_PD  mean over all positions of the padded rows,          mean over all tokens of text
          padding included (detail 12).

The numbers are those of docs/implementation-details.md. data/collator.py turns these averages into one weight for each
scored position, so a term is a weighted sum and has no branch.
"""

from collections.abc import Iterable
from typing import NamedTuple

from harmful_unlearn.data.step_batches import Reads


class LossTerm(NamedTuple):
    """sign * sum_i w_i * v_i, with w_i the batch's weights and v_i a cross-entropy or a KL from the base.

    Attributes:
        batch: which batch of a step it reads (`StepBatch`): "harmful", "normal", "normal_answers" or "safe".
        weights: whose weights in that batch (`Batch.weights`): "own_answer", "random_answers" or "text".
        pool: where random answers are drawn from: "harmful" or "normal" answers.
        sign: -1 where it is maximised.
        diverges: v_i is KL(P_theta_o || P_theta) at a position, rather than the cross-entropy of a token.
        at_landing: computed at the landing point theta' (landing.py), rather than at theta.
    """

    batch: str
    weights: str
    pool: str = "harmful"
    sign: int = 1
    diverges: bool = False
    at_landing: bool = False


# Add a loss here, and to a method in methods.py.
LOSSES = {
    "gd": LossTerm("harmful", "own_answer"),
    "rd": LossTerm("harmful", "random_answers"),
    # The released code adds 1e-12 inside the logarithm of P_theta. That changes the value by less than 1e-12 times the
    # vocabulary and does not change the gradient, so it is omitted.
    "pd": LossTerm("normal", "text", sign=-1, diverges=True),
    # Gradient ascent (Yao et al. 2023, arXiv 2310.10683): GD with its sign turned (implementation detail 13).
    "ga": LossTerm("harmful", "own_answer", sign=-1),
    # Random mismatch (Yao et al. 2023): RD with normal answers in place of harmful ones.
    "rm": LossTerm("harmful", "random_answers", pool="normal"),
    # PD with its sign turned, as Yao et al. 2023 minimise it. They call it the forward KL; their code leaves out the
    # base's entropy, a constant.
    "kl": LossTerm("normal", "text", diverges=True),
    # Fine-tuning (FT): normal answers given their questions.
    "ft": LossTerm("normal_answers", "own_answer"),
    # Landing-point preservation (ours, docs/method.md): KL(P_theta_o || P_theta') on normal text.
    "lp": LossTerm("normal", "text", diverges=True, at_landing=True),
    # Safe answers (ours): the safe answers to the step's harmful prompts, at the landing point.
    "sa": LossTerm("safe", "own_answer", at_landing=True),
}
NEED_BASE = {name for name, term in LOSSES.items() if term.diverges or term.at_landing}


def reads(names: Iterable[str]) -> Reads:
    """What these losses read in a step. Raises ValueError: two of them draw random answers from different pools."""
    terms = [LOSSES[name] for name in names]
    parts = {(term.batch, term.weights) for term in terms}
    pools = {term.pool for term in terms if term.weights == "random_answers"}
    if len(pools) > 1:
        raise ValueError(f"losses {', '.join(names)} draw random answers from different pools")
    return Reads(
        own_answers=("harmful", "own_answer") in parts,
        random_answers=pools.pop() if pools else None,
        safe_answers=("safe", "own_answer") in parts,
        normal_texts=("normal", "text") in parts,
        normal_answers=("normal_answers", "own_answer") in parts,
    )
