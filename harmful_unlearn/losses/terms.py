"""TODO harmful_unlearn.losses.terms."""

from typing import NamedTuple


class LossTerm(NamedTuple):
    """sign * (the batch's weights for `module`) @ (cross-entropies, or divergences from the base).

    Attributes:
        reads: the batch of a step (StepBatch).
        module: whose weights in it.
        lands: at the landing point theta' rather than at the copy theta.
    """

    reads: str
    module: str
    sign: int = 1
    diverges: bool = False
    lands: bool = False


LOSSES = {
    # L_GD, Guided Distortion: of each harmful answer given its own prompt (released code, points 3, 9).
    "gd": LossTerm("harmful", "gd"),
    # The baseline of Yao et al. 2023, gradient ascent: GD with the sign turned (point 13).
    "ga": LossTerm("harmful", "gd", sign=-1),
    # L_RD, Random Disassociation: mean over K random harmful answers given each prompt (point 11).
    "rd": LossTerm("harmful", "rd"),
    # Random mismatch of Yao et al. 2023: RD's formula with normal answers.
    "rm": LossTerm("harmful", "rd"),
    # L_PD, Preservation Divergence: minus KL(P_theta_o || P_theta) over the positions of normal text (point 12).
    # The released code adds 1e-12 inside the logarithm of p; that changes the value by less than 1e-12 times
    # the vocabulary and the gradient by nothing, so it is left out.
    "pd": LossTerm("normal", "pd", sign=-1, diverges=True),
    # The same with its sign turned, as Yao et al. 2023 minimise it. They call it the forward KL; their code
    # leaves out the base's entropy, a constant.
    "kl": LossTerm("normal", "pd", diverges=True),
    # Landing-point preservation: KL(P_theta_o || P_theta') over the positions of normal text (README, Landing).
    "lp": LossTerm("normal", "pd", diverges=True, lands=True),
    # The baseline FT: of normal answers given their questions.
    "ft": LossTerm("normal", "gd"),
    # Of safe answers to the step's harmful prompts, where the model lands.
    "sa": LossTerm("safe", "gd", lands=True),
}
ON_HARMFUL = {name for name, loss in LOSSES.items() if loss.reads == "harmful"}
NEED_BASE = {name for name, loss in LOSSES.items() if loss.diverges or loss.lands}
