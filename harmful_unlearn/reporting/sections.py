"""Which sections a report has, in which order.

It opens with what was found; what made it comes last. Rows are in the order of the comparison's methods, whatever their
figures: nothing is ranked.
"""

from harmful_unlearn.reporting.blocks import Block
from harmful_unlearn.reporting.comparison import BASE, SKU
from harmful_unlearn.reporting.figures import REFERENCES
from harmful_unlearn.reporting.parts import provenance, results, robustness, search, training
from harmful_unlearn.reporting.parts.context import Column, ReportContext
from harmful_unlearn.reporting.parts.findings import findings


def sections(report: ReportContext) -> dict[str, list[Block]]:
    """The blocks under each heading, in order; none where the comparison has nothing of it."""
    methods = report.data.methods
    main = [name for name, model in methods.items() if model["group"] == "main"]
    changed = [name for name, model in methods.items() if model["group"] == "ablation"]
    ablations = [name for name in methods if name in (BASE, SKU, *changed)]
    paper, hidden, ablated = table_columns(report)
    return {
        "What was found": findings(report),
        f"Results ({report.decoding} answers)": results.comparison_table(report, "main", main, paper),
        "Harm against normal text": results.tradeoff(report),
        "What a harmful rate hides": results.comparison_table(report, "hidden", main, hidden),
        "Ablations": results.comparison_table(report, "ablations", ablations, ablated) if changed else [],
        "The search for settings": search.search(report),
        "Refusals": robustness.refusals(report),
        "Under attack": robustness.attacks(report),
        "Relearning": robustness.relearning(report),
        "Distance from the oracle": robustness.oracle(report),
        "The choice of alpha": training.alphas(report),
        "By kind of harm": training.categories(report),
        "Losses of stage 1": training.losses(report),
        "Prompts and answers": results.prompts_and_answers(report),
        "Glossary": provenance.glossary(report),
        "Settings": provenance.settings(report),
        "Commands": provenance.commands(report),
        "Provenance": provenance.provenance(report),
    }


def table_columns(report: ReportContext) -> tuple[list[Column], list[Column], list[Column]]:
    """The columns of the paper's tables, of what these hide, and of the ablations.

    Hidden are broken answers, knowledge that is still there, and damage on normal text.
    """
    usual = report.decoding
    harm = ("harmful_rate", "answer_perplexity")
    normal = ("answer_perplexity", "bleurt_reference" if "bleurt_reference" in report.metrics else "rouge_reference")

    def columns(prompts: str, decoding: str, *metrics: str) -> list[Column]:
        return [(prompts, decoding, metric) for metric in metrics]

    paper = columns("seen", usual, *harm) + columns("unseen", usual, *harm) + columns("normal", usual, *normal)
    hidden = [
        *columns("seen", REFERENCES, "reference_perplexity"),
        *columns("unseen", usual, "safe_refused_rate", "safe_relevant_rate", "safe_irrelevant_rate"),
        *columns("unseen", usual, "degenerate_rate", "unjudged_rate", "unsure_rate"),
        *(columns("unseen", "greedy", "harmful_rate") if usual != "greedy" else []),
        *columns("unseen", REFERENCES, "reference_perplexity"),
        *columns(
            "normal",
            usual,
            "relevance_rate",
            "degenerate_rate",
            "exact_match",
            "rouge_reference",
            "rouge_base",
            "bleurt_base",
        ),
        *columns("normal", REFERENCES, "reference_perplexity", "mc1", "mc2"),
        *columns("utility", usual, "degenerate_rate", "rouge_base", "base_answer_perplexity"),
    ]
    ablated = [
        *columns("seen", usual, *harm),
        *columns("unseen", usual, *harm, "degenerate_rate"),
        *columns("normal", usual, *normal, "degenerate_rate", "exact_match"),
    ]
    return paper, hidden, ablated
