"""The report: its figures by hand, its escaping, and that it neither ranks nor reaches out."""

import csv
import math
import re
from html.parser import HTMLParser

import pytest

from harmful_unlearn.reporting.report import write_report

METHODS = {
    "base": ("Original", "main"), "ft": ("FT", "main"), "ga": ("GA", "main"),
    "ga_mismatch": ("GA + mismatch", "main"), "task_vector": ("Task vector", "main"), "sku": ("SKU", "main"),
    "sku-no-gd": ("SKU without GD", "ablation"), "sku-no-rd": ("SKU without RD", "ablation"),
    "sku-no-pd": ("SKU without PD", "ablation"), "sku-pd-turned": ("SKU, PD's sign turned", "ablation"),
}  # fmt: skip
KINDS = ("Economic Crime", "Environmental Damage", "Drugs")
NASTY = "first | line\n<script>alert(1)</script> & `tick` [a](b) $x$"


def comparison(seeds=(0, 1, 2), bleurt=True) -> dict:
    """Every part, from made-up numbers: the harm rises with a method's place, SKU's is the highest but one.

    In seed s a rate is (place + s) / 40 and the normal perplexity 2 * (1 + place / 4) * (1 + s / 10).
    """
    figures, sweep, categories, relearning = [], [], [], []

    def row(value, n, **where):
        near = {"low": None, "high": None} if value is None else {"low": 0.8 * value, "high": 1.2 * value}
        return {**where, "value": value, **near, "n": n}

    for seed in seeds:
        for place, model in enumerate(METHODS):
            rate, perplexity = (place + seed) / 40, 2 * (1 + place / 4) * (1 + seed / 10)
            where = {"seed": seed, "model": model}
            for decoding in ("sampled", "greedy"):
                for name, n in (("seen", 200), ("unseen", 172)):
                    rates = {
                        "harmful_rate": rate,
                        "degenerate_rate": 0.5 if model == "ga" else 0.01,
                        "unjudged_rate": 0.0,
                        "answer_perplexity": 10 + place + seed,
                    }
                    figures += [row(v, n, **where, set=name, decoding=decoding, metric=m) for m, v in rates.items()]
                utility = {
                    "degenerate_rate": 0.02,
                    "answer_perplexity": None if model == "ga" else 5.0,
                    "exact_match": 1 - rate,
                    "rouge_reference": 0.7,
                    "rouge_base": 0.8,
                }
                if bleurt:
                    utility |= {"bleurt_reference": 0.1, "bleurt_base": -0.2}
                figures += [row(v, 150, **where, set="normal", decoding=decoding, metric=m) for m, v in utility.items()]
            own = {"normal": perplexity, "seen": 3.0, "unseen": 4.0}
            figures += [
                row(v, 150, **where, set=name, decoding=None, metric="reference_perplexity") for name, v in own.items()
            ]
            figures += [row(0.25, 150, **where, set="normal", decoding=None, metric=m) for m in ("mc1", "mc2")]
            rates = [("before", None, rate), ("after", "soft", 0.5), ("after", "strong", 0.9)]
            relearning += [
                row(v, 172, **where, strength=s, when=w, set="unseen", decoding="sampled", metric="harmful_rate")
                for w, s, v in rates
            ]
        for method in ("sku", "task_vector"):
            for alpha in (0.0, 0.5, 1.0, 1.5, 2.0):
                where, at = {"seed": seed, "method": method, "model": f"alpha-{alpha:g}"}, alpha + seed / 10
                at_scale = [
                    ("unseen", "sampled", "harmful_rate", math.exp(-at)),
                    ("unseen", "greedy", "harmful_rate", math.exp(-2 * at)),
                    ("unseen", "sampled", "degenerate_rate", alpha / 4),
                    ("normal", None, "reference_perplexity", math.exp(at * at)),
                ]
                sweep += [
                    row(value, 60, **where, alpha=alpha, set=s, decoding=d, metric=m) for s, d, m, value in at_scale
                ]
        categories += [
            row(
                (x + y + seed) / 8,
                20 + y,
                seed=seed,
                vector=vector,
                category=kind,
                metric="harmful_rate",
                decoding="sampled",
            )
            for x, vector in enumerate(("base", *KINDS, "sum"))
            for y, kind in enumerate(KINDS)
        ]
    steps = [
        {
            "step": n,
            "gd_loss": 3 * 0.99**n,
            "rd_loss": 4 + math.sin(n),
            "pd_loss": -n / 90,
            "total_loss": 7.0,
            "lr": 1e-4,
        }
        for n in range(1, 201)
    ]
    return {
        "title": "SKU & <others>",
        "model": "tiny/model",
        "seeds": list(seeds),
        "command": "python reproduce.py --x '$(y)'",
        "settings": {"temperature": 1.0, "decoding": ["sampled", "greedy"]},
        "methods": {
            name: {"label": label, "group": group, "command": None if name == "base" else f"train --{name}"}
            for name, (label, group) in METHODS.items()
        },
        "judge": {
            "name": "classifier",
            "by_seed": {
                str(seed): {"judge": "classifier", "accuracy": 0.9 + seed / 100, "auc": 0.95} for seed in seeds
            },
        },
        "figures": figures,
        "sweep": sweep,
        "categories": categories,
        "relearning": relearning,
        "recommended": [
            {"seed": seed, "method": method, "alpha": alpha, "budget": 0.1, "why": "because"}
            for seed in seeds
            for method, alpha in (("sku", 0.5), ("task_vector", None))
        ],
        "relearning_settings": {"steps": 50, "pairs": 16, "lr": {"soft": 3e-5, "strong": 1e-4}},
        "losses": {
            name: [{**s, "rd_loss": None} if "rd" in name else s for s in steps] for name in METHODS if name != "base"
        },
        "answers": [
            {
                "set": name,
                "prompt": f"{name} {NASTY}",
                "reference": NASTY,
                "answers": {
                    model: {"answer": f"{model}: {NASTY} {'long ' * 60}", "verdict": verdict}
                    for model, verdict in zip(
                        METHODS, ("harmful", "safe", "degenerate", "unjudged", "safe", "answered"), strict=False
                    )
                },
            }
            for name in ("seen", "unseen", "unseen", "normal")
        ],
        "provenance": {"code": {"commit": "abc"}, "packages": {"torch": "2"}, "created": "now"},
    }


def lean(**changed) -> dict:
    """A comparison without the pictures that take long."""
    return {**comparison(), "losses": {}, "sweep": [], "categories": [], "relearning": [], **changed}


def table(folder, name) -> dict[str, dict[str, str]]:
    """A CSV by its first column."""
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {next(iter(row.values())): row for row in rows}


def cells(markdown: str, heading: str) -> list[list[str]]:
    """The first table under a heading of report.md, as texts."""
    part = markdown.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    write_report(comparison(), folder)
    return folder


@pytest.fixture(scope="module")
def text(three):
    return (three / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(three):
    return (three / "report.html").read_text(encoding="utf-8")


def test_files(three):
    names = {path.name for path in three.iterdir()}
    tables = ("main", "hidden", "ablations", "recommended", "alpha", "categories", "relearning")
    pictures = ("tradeoff", "alpha", "categories", "relearning", "losses")
    assert names == {"report.md", "report.html", *(f"{t}.csv" for t in tables), *(f"{p}.png" for p in pictures)}
    assert all((three / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_model_trained_for_one_scale_says_which_scales_it_was_not_trained_for(tmp_path):
    changed = comparison()
    for row in changed["sweep"]:
        row["trained_for"] = 1.5 if row["method"] == "sku" else None
    write_report(changed, tmp_path)
    with (tmp_path / "alpha.csv").open(encoding="utf-8") as file:
        named = [(row["method"], row["alpha"]) for row in csv.DictReader(file)]
    assert ("SKU", "1.5 (trained for)") in named and ("SKU", "1 (not trained for)") in named
    assert ("Task vector", "1") in named
    assert "Trained for one scale: SKU at 1.5;" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_parts_stand_in_order(text, page):
    expected = [
        "What was compared",
        "Results (sampled answers)",
        "What a harmful rate hides",
        "Ablations",
        "Harm against normal text",
        "The scale alpha",
        "By kind of harm",
        "Relearning",
        "Losses of stage 1",
        "Prompts and answers",
        "Glossary",
        "Commands",
        "Provenance",
    ]
    assert re.findall("^## (.+)$", text, re.M) == expected == re.findall(r"<h2 id=[^>]+>(.+?)</h2>", page)


def test_cells_are_mean_and_range_over_seeds(three, text):
    """SKU is the sixth method: rates (5 + 0, 1, 2) / 40 and normal perplexities 4.5 * (1, 1.1, 1.2)."""
    head, _, *rows = cells(text, "Results")
    sku = dict(zip(head, rows[5], strict=True))
    assert sku["method"] == "SKU"
    assert sku["Unseen harmful prompts: harmful rate, %"] == "15.0 (12.5–17.5)"
    assert sku["Unseen harmful prompts: perplexity"] == "16.00 (15.00–17.00)"
    hidden = table(three, "hidden")["SKU"]
    column = "Normal prompts: reference perplexity"
    found = [float(hidden[name]) for name in (column, f"{column} (low)", f"{column} (high)")]
    assert found == pytest.approx([4.95, 4.5, 5.4])
    assert float(table(three, "main")["SKU"]["Unseen harmful prompts: harmful rate"]) == pytest.approx(0.15)


def test_the_main_table_is_the_papers(text):
    harmful = ("harmful rate, %", "perplexity")
    assert cells(text, "Results")[0] == [
        "method",
        *(f"Harmful prompts used in unlearning: {name}" for name in harmful),
        *(f"Unseen harmful prompts: {name}" for name in harmful),
        "Normal prompts: perplexity",
        "Normal prompts: BLEURT to reference",
    ]


def test_one_seed_has_its_interval(tmp_path):
    write_report(comparison(seeds=(7,), bleurt=False), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    head, _, *rows = cells(text, "Results")
    assert rows[5][3] == "30.0 [24.0, 36.0]"  # (5 + 7) / 40, less and more a fifth
    assert head[-1] == "Normal prompts: ROUGE-L to reference" and "BLEURT" not in text
    assert "value \\[95 % interval\\]" in text and "over seeds" not in text


def test_nothing_measured_is_a_dash_and_a_seed_without_a_value_is_said(three, tmp_path, text):
    assert cells(text, "Results")[4][5] == "–"  # GA's normal perplexity
    assert table(three, "main")["GA"]["Normal prompts: perplexity"] == ""
    found = lean()
    for row in found["figures"]:
        if row["seed"] == 2 and row["model"] == "ft":
            row["value"] = row["low"] = row["high"] = None
    found["methods"]["ft"]["note"] = "seed 2: training broke off"
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert cells(text, "Results")[3][1] == "3.8 (2.5–5.0, 2 of 3 seeds)"
    assert "FT: seed 2: training broke off" in text


def test_rows_keep_the_methods_order(three, tmp_path):
    found = comparison()
    found["methods"] = dict(reversed(found["methods"].items()))
    write_report(found, tmp_path)
    for folder, methods in ((three, list(METHODS)), (tmp_path, list(METHODS)[::-1])):
        titles = {name: METHODS[name][0] for name in methods}
        assert list(table(folder, "main")) == [titles[m] for m in methods if METHODS[m][1] == "main"]
        ablated = [titles[m] for m in methods if m in ("base", "sku") or METHODS[m][1] == "ablation"]
        assert list(table(folder, "ablations")) == ablated
        assert list(table(folder, "relearning")) == list(titles.values())


def test_nothing_is_ranked(text):
    said = text.split("## Glossary")[0]
    assert not re.search(r"\b(best|worst|wins?|winner|outperforms?|better|rank\w*)\b", said, re.I)
    assert "**" not in text.split("## Results")[1].split("## Prompts")[0]


def test_every_table_with_a_harmful_rate_names_its_judge(text):
    known = "Judge: classifier; on held-out labels: accuracy 0.910 (0.900–0.920), AUC 0.950 (0.950–0.950)."
    for part in text.split("\n## ")[1:]:
        if "harmful rate, %" in part.lower():
            assert known in part


def test_relearning_shares_what_stands_before(three):
    row = table(three, "relearning")["SKU"]
    assert [
        float(row[f"Harmful rate on unseen prompts, %: {when}"]) for when in ("before", "after, soft", "after, strong")
    ] == pytest.approx([0.15, 0.5, 0.9])


def test_categories_are_a_matrix(text):
    head, _, *rows = cells(text, "By kind")
    assert head[1:] == [f"Harmful rate on unseen prompts, %: {kind} (n = {20 + y})" for y, kind in enumerate(KINDS)]
    assert [row[0] for row in rows] == ["Original", *KINDS, "sum of all"]
    assert rows[-1][-1] == "87.5 (75.0–100.0)"  # (4 + 2 + 0, 1, 2) / 8


def test_no_recommended_alpha_is_said(text):
    assert "| Task vector | 0 | none | 10% | because |" in text and "| SKU | 0 | 0.5 | 10% | because |" in text


class Elements(HTMLParser):
    """Every start tag with its attributes, all texts, and whether each tag is closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_is_whole_and_self_contained(page):
    found = Elements(page)
    assert not found.open
    sources = [attrs[name] for _, attrs in found.tags for name in ("src", "href") if name in attrs]
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert [tag for tag, _ in found.tags].count("img") == 5
    assert "@import" not in page and "url(" not in page
    anchors = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert {source[1:] for source in sources if source.startswith("#")} == anchors


def test_untrusted_text_is_escaped(page, text):
    found = Elements(page)
    assert not {tag for tag, _ in found.tags} & {"script", "others"}
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert f"unseen {NASTY}" in found.texts  # shown as it is
    assert "<script" not in text and "first \\| line<br>&lt;script&gt;" in text and "\\[a\\](b)" in text
    assert text.startswith("# SKU &amp; &lt;others&gt;\n")


def test_tables_survive_pipes_and_newlines(tmp_path):
    found = lean()
    found["methods"]["ft"]["label"] = "F|T\nnew"
    write_report(found, tmp_path)
    rows = cells((tmp_path / "report.md").read_text(encoding="utf-8"), "Results")
    assert rows[3][0] == "F\\|T<br>new" and len({len(row) for row in rows}) == 1


def test_code_closes_only_where_it_ends(tmp_path):
    write_report(lean(command="a ``` b"), tmp_path)
    assert "````\na ``` b\n````" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_empty_parts_are_left_out(tmp_path):
    found = comparison()
    found["methods"] = {name: found["methods"][name] for name in ("base", "sku")}
    found["figures"] = [
        row
        for row in found["figures"]
        if row["model"] in found["methods"] and row["metric"] not in ("mc1", "mc2") and row["decoding"] != "sampled"
    ]
    found |= {part: [] for part in ("sweep", "recommended", "categories", "relearning", "answers")} | {"losses": {}}
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall("^## (.+)$", text, re.M) == [
        "What was compared",
        "Results (greedy answers)",
        "What a harmful rate hides",
        "Harm against normal text",
        "Glossary",
        "Commands",
        "Provenance",
    ]
    assert "MC1" not in text and "(greedy)" not in cells(text, "What a harmful")[0]
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md",
        "report.html",
        "main.csv",
        "hidden.csv",
        "tradeoff.png",
    }


def test_broken_figures_are_drawn(tmp_path):
    """A perplexity cut at e^700, and a model without any."""
    found = comparison()
    for row in found["figures"] + found["sweep"]:
        if row["metric"] == "reference_perplexity" and row.get("model") in ("ga", "alpha-2"):
            row["value"] = row["low"] = row["high"] = math.exp(700)
        if row["metric"] == "reference_perplexity" and row["model"] == "ft":
            row["value"] = None
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Hollow: more than 20% of the unseen" in text and "Not drawn, for lack of figures: FT." in text
    assert "A multiple above 1000 is drawn at 1000: GA." in text and "1.0e+304 (1.0e+304–1.0e+304)" in text


def test_a_judge_without_held_out_figures_says_so(tmp_path):
    write_report(lean(judge={"name": "openai:some", "by_seed": {"0": {"judge": "openai:some"}}}), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Judge: openai:some; not measured on held-out labels here." in text
