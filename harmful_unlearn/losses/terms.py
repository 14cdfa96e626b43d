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

Methods of after 2023 have losses that are not linear in the cross-entropies: a function f of each text's
log-probability, averaged over texts (`OfText`). With log P(y | x) the sum over an answer's tokens, |y| their number,
r(y) = log P_theta(y | x) - log P_theta_o(y | x), y the harmful answer, y+ the safe one, and s(z) = -log(sigmoid(z)),
which is softplus(-z):

    NPO     2/beta * s(-beta * r(y))                       Zhang et al. 2024 (arXiv 2404.05868)
    SimNPO  2/beta * s(-beta/|y| * log P_theta(y | x) - gamma)      Fan et al. 2024 (arXiv 2410.07163)
    DPO     s(beta * (r(y+) - r(y)))                       Rafailov et al. 2023 (arXiv 2305.18290)
    SU      s(-beta/|y| * r(y))                            Zhang et al. 2024 (arXiv 2407.02855), its code

RMU (Li et al. 2024, arXiv 2403.03218) reads hidden states h of one layer, [hidden], and has no need of the LM head:

    RMU     mean over texts of the mean over an answer's positions of
                                        |h_theta - c * u|^2 / hidden,     u a random direction of length 1
    RMK     mean over positions of normal text of |h_theta - h_theta_o|^2 / hidden
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import softplus

from harmful_unlearn.data.step_batches import Reads


@dataclass(frozen=True)
class LossParameters:
    """What the terms need beside their weights.

    Attributes:
        beta, gamma: of NPO, SimNPO, DPO and SU.
        rmu_layer: whose output RMU reads, counted from 1; below 1 a share of the depth.
        rmu_coef: c, the length of the hidden state that RMU steers to.
        seed: of RMU's direction.
    """

    beta: float = 0.1
    gamma: float = 0.0
    rmu_layer: float = 0.25
    rmu_coef: float = 6.5
    seed: int = 0


class OfText(NamedTuple):
    """A function of each text's log-probability, or of the difference of two, averaged over the texts.

    Attributes:
        function: of the log-probabilities, [texts]; elementwise.
        per_token: they are divided by the number of the text's tokens.
        against_base: the base's log-probabilities are subtracted from them.
    """

    function: Callable[[Tensor, LossParameters], Tensor]
    per_token: bool = False
    against_base: bool = False


class LossTerm(NamedTuple):
    """sign * sum_i w_i * v_i, with w_i the batch's weights and v_i what `value` says.

    Attributes:
        batch: which batch of a step it reads (`StepBatch`).
        weights: whose weights in that batch (`Batch.weights`): "own_answer", "random_answers" or "text"; with `of_text`
            those of each text.
        pool: where random answers are drawn from: "harmful" or "normal" answers.
        sign: -1 where it is maximised.
        value: "cross-entropy" of a token, "kl": KL(P_theta_o || P_theta) at a position, or the squared distance of the
            hidden state at a position "from direction" (c * u) or "from base".
        of_text: where the cross-entropies of a text count together.
        at_landing: computed at the landing point theta' (landing.py), rather than at theta.
    """

    batch: str
    weights: str = "each text"
    pool: str = "harmful"
    sign: int = 1
    value: str = "cross-entropy"
    of_text: OfText | None = None
    at_landing: bool = False

    @property
    def needs_base(self) -> bool:
        """Whether theta_o takes part."""
        against_base = self.of_text is not None and self.of_text.against_base
        return self.at_landing or against_base or self.value in ("kl", "from base")


# Add a loss here, and to a method in methods.py.
LOSSES = {
    "gd": LossTerm("harmful", "own_answer"),
    "rd": LossTerm("harmful", "random_answers"),
    # The released code adds 1e-12 inside the logarithm of P_theta. That changes the value by less than 1e-12 times the
    # vocabulary and does not change the gradient, so it is omitted.
    "pd": LossTerm("normal", "text", sign=-1, value="kl"),
    # Gradient ascent (Yao et al. 2023, arXiv 2310.10683): GD with its sign turned (implementation detail 13).
    "ga": LossTerm("harmful", "own_answer", sign=-1),
    # Random mismatch (Yao et al. 2023): RD with normal answers in place of harmful ones.
    "rm": LossTerm("harmful", "random_answers", pool="normal"),
    # PD with its sign turned, as Yao et al. 2023 minimise it. They call it the forward KL; their code leaves out the
    # base's entropy, a constant.
    "kl": LossTerm("normal", "text", value="kl"),
    # Fine-tuning (FT): normal answers given their questions.
    "ft": LossTerm("normal_answers", "own_answer"),
    # Landing-point preservation (ours, docs/method.md): KL(P_theta_o || P_theta') on normal text.
    "lp": LossTerm("normal", "text", value="kl", at_landing=True),
    # Safe answers (ours): the safe answers to the step's harmful prompts, at the landing point.
    "sa": LossTerm("safe", "own_answer", at_landing=True),
    # The same at theta: refusals are learned directly.
    "sft": LossTerm("safe", "own_answer"),
    "npo": LossTerm("harmful_texts", of_text=OfText(lambda r, p: 2 / p.beta * softplus(p.beta * r), against_base=True)),
    "simnpo": LossTerm(
        "harmful_texts",
        of_text=OfText(lambda log_p, p: 2 / p.beta * softplus(p.beta * log_p + p.gamma), per_token=True),
    ),
    "su": LossTerm(
        "harmful_texts", of_text=OfText(lambda r, p: softplus(p.beta * r), per_token=True, against_base=True)
    ),
    "dpo": LossTerm("preferences", of_text=OfText(lambda r, p: softplus(-p.beta * r), against_base=True)),
    "rmu": LossTerm("harmful", "own_answer", value="from direction"),
    "rmk": LossTerm("normal", "text", value="from base"),
}
NEED_BASE = {name for name, term in LOSSES.items() if term.needs_base}


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
        harmful_texts=any(term.batch == "harmful_texts" for term in terms),
        safe_answers=("safe", "own_answer") in parts,
        preferences=any(term.batch == "preferences" for term in terms),
        only_with_safe=any(term.batch in ("safe", "preferences") and not term.at_landing for term in terms),
        normal_texts=("normal", "text") in parts,
        normal_answers=("normal_answers", "own_answer") in parts,
    )
