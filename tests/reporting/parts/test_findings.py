"""What a report says it found: only what the intervals support."""

import pytest

from harmful_unlearn.reporting.parts.context import ReportContext
from harmful_unlearn.reporting.parts.findings import findings, subject
from tests.helpers.comparisons import comparison, lean

Figure = tuple[float, float | None, float | None]


def found(shares: dict[str, Figure], metric="harmful_rate", prompts="unseen", n=200) -> str:
    """The findings of one seed with these figures (value, low, high) and no other methods."""
    made = comparison(seeds=(0,))
    made.methods = {name: made.methods[name] for name in shares}
    made.figures = [row for row in made.figures if row["model"] in shares]
    for row in made.figures:
        if (row["metric"], row["set"]) == (metric, prompts):
            row["value"], row["low"], row["high"] = shares[row["model"]]
            row["n"] = n
    made.attacks = made.relearning = []
    return findings(ReportContext(made))[0].markdown.replace("\N{NO-BREAK SPACE}", " ").replace("\\", "")


def test_a_method_is_lower_or_higher_only_if_the_intervals_do_not_overlap():
    text = found({"base": (0.5, 0.4, 0.6), "ft": (0.3, 0.2, 0.4), "ga": (0.3, 0.2, 0.39), "sku": (0.7, 0.61, 0.8)})
    assert text.startswith(
        "- **1 of 3 methods clearly gives fewer harmful answers than the original, 50.0 % [40.0, 60.0], on unseen "
        "prompts.** Fewer: GA 30.0 % [20.0, 39.0]. More: SKU 70.0 % [61.0, 80.0]. No clear difference: FT.\n"
    )


def test_an_only_method_is_named():
    assert found({"base": (0.5, 0.4, 0.6), "sku": (0.1, 0, 0.2)}).startswith("- **SKU clearly gives fewer")
    assert found({"base": (0.5, 0.4, 0.6), "sku": (0.5, 0.4, 0.6)}).startswith("- **SKU does not clearly give fewer")


@pytest.mark.parametrize("n, clear", [(100, False), (1000, True)])
def test_no_harmful_answer_among_few_may_be_chance(n, clear):
    """The bootstrap's interval has no width, but by the rule of three the rate may be 3/n."""
    text = found({"base": (0.05, 0.02, 0.08), "sku": (0.0, 0.0, 0.0)}, n=n)
    assert ("SKU clearly gives" in text) == clear and ("No clear difference: SKU" in text) != clear


def test_with_ablations_it_is_said_that_they_do_not_count():
    text = found({"base": (0.5, 0.4, 0.6), "ft": (0.1, 0, 0.2), "ga": (0.1, 0, 0.2), "sku-no-gd": (0.1, 0, 0.2)})
    assert text.startswith("- **2 of 2 methods of the main table clearly give fewer") and "without GD" not in text


def test_without_the_originals_figure_there_is_no_claim():
    assert "harmful" not in found({"base": (None, None, None), "ft": (0.1, 0, 0.2), "ga": (0.2, 0.1, 0.3)})


def test_a_single_seed_of_several_is_not_a_range():
    made = lean()
    for row in made.figures:
        if row["model"] == "ga_mismatch" and row["seed"] > 0 and row["metric"] == "harmful_rate":
            row["value"] = row["low"] = row["high"] = None
    text = findings(ReportContext(made))[0].markdown.splitlines()[0]
    assert "No clear difference: FT; GA; GA + mismatch." in text


def test_without_an_interval_nothing_is_clear():
    assert "No clear difference: SKU" in found({"base": (0.9, 0.8, 1.0), "sku": (0.0, None, None)})


def test_what_costs_most_is_named_only_if_it_is_clear():
    cost = {"metric": "reference_perplexity", "prompts": "normal"}
    text = found({"base": (5.0, 4, 6), "ft": (4.9, 4, 6), "ga": (9.0, 8, 10), "sku": (20.0, 15, 25)}, **cost)
    assert (
        "- **2 of 3 methods clearly raise the perplexity of normal reference answers.** Original 5.000 [4.000, 6.000]. "
        "Higher: GA 9.000 [8.000, 10.00]; SKU 20.00 [15.00, 25.00]. No clear difference: FT. Highest: SKU.\n"
    ) in text
    text = found({"base": (5.0, 4, 6), "ga": (9.0, 8, 15), "sku": (20.0, 15, 25)}, **cost)
    assert "None is clearly the highest." in text and "Highest:" not in text


def test_the_most_degenerate_answers():
    degenerate = {"metric": "degenerate_rate"}
    text = found({"base": (0.0, 0.0, 0.0), "ga": (0.5, 0.4, 0.6), "sku": (0.2, 0.1, 0.3)}, **degenerate)
    assert "- **GA gives the most degenerate answers to unseen prompts.** Share: Original 0.0 % [0.0, 0.0]; GA" in text
    text = found({"base": (0.0, 0.0, 0.0), "ga": (0.5, 0.2, 0.6), "sku": (0.2, 0.1, 0.3)}, **degenerate)
    assert "- **No model gives clearly the most degenerate answers to unseen prompts.** Largest share" in text
    text = found({"base": (0.0, 0.0, 0.0), "ga": (0.02, 0.01, 0.03)}, **degenerate)
    assert "- **No model gives more than 3.0 % degenerate answers to unseen prompts.**\n" in text
    text = found({"base": (0.0, 0.0, 0.0), "ga": (0.0, 0.0, 0.0)}, n=40, **degenerate)  # too few to say how few
    assert "- **No model gave any degenerate answers to unseen prompts.**\n" in text


def test_seeds_have_ranges_and_multiples_of_their_own_original():
    text = "".join(block.markdown for block in findings(ReportContext(lean())))
    # 2 * (1 + place / 4) * (1 + seed / 10) is the same multiple in every seed.
    assert "Higher (multiples of the original's): FT 1.250 (1.250–1.250); GA 1.500" in text
    assert "ranges over the 3 seeds do not overlap, which is no test of significance" in text
    assert "To compare: Oracle 27.5" in text
    made = lean()
    for row in made.figures:
        if row["model"] == "ga" and row["metric"] == "reference_perplexity":
            row["value"] = 1e9
    text = findings(ReportContext(made))[0].markdown
    assert "Higher (multiples of the original's, at most 1000): FT" in text and "GA 1000 (1000–1000)" in text


def test_attacks_and_relearning_are_claims_of_their_own():
    text = findings(ReportContext(comparison()))[0].markdown
    for where in ("on unseen prompts.", "under the worst attack.", "after 20 steps of fine-tuning by the worst"):
        assert text.count(where) == 1
    assert "attack" not in findings(ReportContext(lean()))[0].markdown


def test_the_subject_names_files_without_their_paths():
    files = {"harmful_dataset": "/data/some/harmful.jsonl", "normal_dataset": "truthfulqa/truthful_qa"}
    made = lean(settings={**files, "part": "validation"}, judge={"name": "phrases:a/b/c.txt", "by_seed": {}})
    text = subject(ReportContext(made)).markdown.replace("\\", "")
    assert "Data: harmful.jsonl, truthfulqa/truthful_qa. Validation prompts: 200 harmful" in text
    assert "Seeds: 0, 1, 2." in text and "Judge: phrases:c.txt." in text
