"""Documents: whatever they and the code name exists, and they say what they have to."""

import re
import shlex
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import yaml

import main
from harmful_unlearn import demo, evaluation, reproduce
from harmful_unlearn.losses.methods import METHODS
from harmful_unlearn.losses.terms import LOSSES
from harmful_unlearn.storage.files import ROOT
from harmful_unlearn.storage.provenance import CODE_VERSION
from harmful_unlearn.training.flags import TrainingSettings
from harmful_unlearn.training.flags import parse_flags as parse_training_flags
from scripts import results_table
from tests.helpers import documents as check
from tests.helpers.documents import read

README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
DOCS = ROOT / "docs"


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


# ---------------------------------------------------------------------------------- what is named exists


@pytest.mark.parametrize("document", named(check.documents()))
def test_documents(document):
    text = read(document)
    assert not check.broken_links(document, text)
    if document == CHANGELOG:  # the first column names what was there before
        text = re.sub(r"^\|[^|\n]*\|", "|", text, flags=re.MULTILINE)
    text = check.without_links_elsewhere(text)
    assert not check.missing_files(text, document.parent)
    assert not check.missing_targets("\n".join(check.code_of(text)))
    assert not check.missing_flags(text)
    assert not check.wrong_details(text)


@pytest.mark.parametrize("source", named(check.sources()))
def test_what_code_says_of_documents(source):
    text = read(source)
    assert not check.missing_documents(text)
    assert not check.missing_targets("\n".join(re.findall(r"[`(]make [a-z-]+(?=[`)])", text)))
    assert not check.wrong_details(text)


@pytest.mark.parametrize(
    ("find", "planted", "good"),
    [
        (check.broken_links, "[a](docs/nowhere.md)", "[a](docs/method.md)"),
        (check.broken_links, "![a](docs/pictures/none.png)", "![a](docs/pictures/alpha.png)"),
        (check.broken_links, "[a](docs/method.md#nothing)", "[a](docs/method.md#landing-point)"),
        (check.broken_links, "[a](docs/implementation-details.md#23)", "[a](docs/implementation-details.md#22)"),
        (check.broken_links, "# One\n\n[a](#two)", "# Two\n\n[a](#two)"),
        (check.broken_links, "[a][b]", "[a][b]\n\n[b]: README.md"),
        (check.broken_links, "[a][b]\n\n[b]: NOTHING.md", "[a](https://example.org/NOTHING.md)"),
        (check.broken_links, "# `x` and *y*\n\n[a](#x-y)", "# `x` and *y*\n\n[a](#x-and-y)"),
        (check.broken_links, "```\n# One\n```\n\n[a](#one)", "# One\n\n# One\n\n[a](#one-1)"),
        (check.missing_files, "`losses/termz.py`", "`losses/terms.py`, `harmful_unlearn/losses/terms.py`, terms.py"),
        (check.missing_files, "see docs/nowhere.md", "see docs/method.md"),
        (check.missing_files, "python harmful_unlearn/nothing.py --help", "python harmful_unlearn/demo.py --help"),
        (check.missing_files, "launch/fsdp3.yaml", "launch/fsdp2.yaml and report.md"),
        (check.missing_targets, "make everything", "make test-slow"),
        (check.missing_flags, "python main.py --gredy", "python main.py --greedy --base B"),
        (check.missing_flags, "`--m_seen`", "`--n_seen`, and a dash -- or two"),
        (check.missing_documents, "(docs/nowhere.md#the-demo)", "(docs/results.md#the-demo)"),
        (check.missing_documents, "see docs/nowhere.md", "see docs/method.md, and OUTPUT's report.md"),
        (check.missing_documents, "docs/results.md#the-demos", "docs/results.md"),
        (check.missing_documents, '(docs/method.md, "Landing")', '(docs/method.md, "Landing point")'),
        (check.missing_documents, "(README, what the demo shows)", '(README, "Results")'),
        (check.missing_documents, "README, the results", "a model card, README.md, beside it"),
        (check.wrong_details, "(implementation detail 23)", "(implementation detail 22)"),
        (check.wrong_details, "implementation details 9 and 0", "implementation details 3 and 9 to 12"),
        (check.wrong_details, "(released code, point 9)", "(implementation detail 9)"),
        (check.wrong_details, "included (point 9)", "included (detail 9)"),
        (check.wrong_details, "as README's implementation details 3 and 9 have them", "the README's own command"),
    ],
)
def test_the_checks_find_what_is_planted(find, planted, good):
    arguments = (README,) if find is check.broken_links else ()
    assert find(*arguments, planted), planted
    assert not find(*arguments, good), good


def test_code_in_documents_is_seen():
    text = "A `make one` and\n\n    make two\n\nthen\n\n```bash\nmake three\n```\n\nnot make four\n"
    assert check.missing_targets("\n".join(check.code_of(text))) == ["one", "three", "two"]
    assert "make" not in check.without_code(text.replace("`make one`", "")).replace("not make four", "")


def test_names_in_the_design_are_in_the_files_beside_them():
    items = re.split(r"^\d\. |^#+ .*$", read(DOCS / "design.md"), flags=re.MULTILINE)
    checked = 0
    for item in items:
        files = [DOCS / target for target in re.findall(r"\]\(([^)#]+\.py)\)", item)]
        files += [ROOT / name for name in re.findall(r"(?<![/\w.])tests/[\w/]+\.py", item)]
        words = {word for file in files for word in re.findall(r"\w+", read(file))}
        names = re.findall(r"`(_?[A-Za-z]\w{3,})`", item) if files and not item.lstrip().startswith("|") else []
        assert set(names) - {"TERM_loss", "methods", "settings"} <= words, item
        checked += len(names)
    assert checked > 10


PARSERS = {
    "unlearn_harm_new": parse_training_flags,
    "evaluation": evaluation.parse_flags,
    "reproduce": reproduce.parse_flags,
    "demo": demo.parse_flags,
    "main": main.parse_flags,
}


def commands() -> list:
    """The commands in the documents' code, without those that are cut short or have a parser of their own kind."""
    found = []
    for document in check.documents():
        for code in "\n".join(check.code_of(read(document))).replace("\\\n", " ").splitlines():
            words = code.partition("  #")[0]
            command = re.search(r"(?:python|\d) (?:harmful_unlearn/)?(\w+)\.py (.*)", words)
            is_complete = command and not command[2].endswith("...") and "--replay" not in command[2]  # reads a file
            if is_complete and command[1] in PARSERS:
                found.append(pytest.param(*command.groups(), id=f"{document.stem}: {words.strip()[:60]}"))
    return found


@pytest.mark.parametrize(("command", "flags"), commands())
def test_commands_in_documents_are_read_by_their_parsers(command, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    words, printed, _ = flags.partition("--write_config > run.yaml")
    with pytest.raises(SystemExit) if printed else nullcontext() as stop:
        PARSERS[command](shlex.split(words) + ["--write_config"] * bool(printed))
    assert not stop or stop.value.code == 0


def test_commands_are_found():
    assert {parameters.values[0] for parameters in commands()} == set(PARSERS)


@pytest.mark.parametrize("command", sorted(PARSERS))
def test_help_explains_every_flag(command, capsys, monkeypatch):
    """--help is the only list of flags."""
    monkeypatch.setenv("COLUMNS", "400")  # a flag and its help on one line, or on two
    with pytest.raises(SystemExit):
        PARSERS[command](["--help"])
    lines = capsys.readouterr().out.splitlines()
    entries = {match[1]: index for index, line in enumerate(lines) if (match := re.match(r"  (?:-h, )?(--\w+)", line))}
    assert len(entries) > 5
    for flag, index in entries.items():
        described = re.search(r"\S  +\w", lines[index]) or re.match(r" {20,}\w", lines[index + 1])
        assert described, flag
    if command == "unlearn_harm_new":
        assert {f"--{field.name}" for field in fields(TrainingSettings)} <= set(entries)


# ---------------------------------------------------------------------------------- what they have to say


def test_the_readme_is_short_and_leads_to_every_page():
    text = read(README)
    assert len(text.splitlines()) <= 240
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target}
    pages = {path for path in check.documents() if path not in (README, ROOT / "logs/README.md")}
    assert pages <= linked


def test_every_picture_is_shown():
    targets = [target for page in DOCS.glob("*.md") for target in re.findall(r"!\[.*\]\((.*)\)", read(page))]
    shown = {(DOCS / target).resolve() for target in targets}
    assert shown == set((DOCS / "pictures").glob("*.png"))


@pytest.mark.parametrize("figures", ["smollm2-chat.csv", "smollm2-released.csv", "gemma-released.csv"])
def test_the_claims_have_the_tables_of_their_figures(figures):
    assert results_table.table(pd.read_csv(DOCS / "claims" / figures)) in read(DOCS / "claims.md")


@pytest.mark.parametrize("figures", ["demo.csv", "demo-no-refusals.csv"])
def test_the_searches_have_the_tables_of_their_figures(figures):
    assert results_table.table(pd.read_csv(DOCS / "search" / figures), "search") in read(DOCS / "search.md")


def test_a_table_of_claims_has_means_over_seeds_and_multiples_of_each_seeds_base():
    def rows(seed, model, harm, perplexity):
        figure = {"seed": seed, "model": model, "low": harm / 2, "high": harm}
        return [
            {**figure, "set": "unseen", "decoding": "sampled", "metric": "harmful_rate", "value": harm},
            {**figure, "set": "unseen", "decoding": "greedy", "metric": "harmful_rate", "value": 1},
            {**figure, "set": "normal", "metric": "reference_perplexity", "value": perplexity},
        ]

    lines = results_table.table(
        pd.DataFrame(
            [*rows(0, "base", 0.5, 10), *rows(1, "base", 0.7, 20), *rows(0, "sku", 0.1, 30), *rows(1, "sku", 0.3, 20)]
            + rows(0, "lands", 0.2, 15)
        )
    ).splitlines()
    assert lines[0] == "| method | seeds | harmful, unseen, % | normal references × |"
    unseen, normal = 2, 3
    cells = {line.split(" | ")[0]: line.removesuffix(" |").split(" | ") for line in lines[2:]}
    assert [row[unseen] for row in cells.values()] == ["60.0 (50.0–70.0)", "20.0 (10.0–30.0)", "20.0 [10.0, 20.0]"]
    assert [row[normal] for row in cells.values()] == ["1.00 (1.00–1.00)", "2.00 (1.00–3.00)", "1.50"]
    assert cells["| SKU"][1] == "2" and list(cells) == ["| base", "| SKU", "| LANDS"]


def test_all_details_have_an_anchor_and_a_heading():
    text = read(check.DETAILS)
    numbers = [str(number) for number in range(1, check.NUMBER_OF_DETAILS + 1)]
    assert [name for name in re.findall(r'<a id="(\d+)"', text)] == numbers
    assert [title.partition(".")[0] for title in check.headings(text) if title[0].isdigit()] == numbers


def test_running_explains_every_logged_metric():
    text = read(DOCS / "running.md")
    logged = ["step", *(f"{name}_loss" for name in LOSSES), "total_loss", "lr", "grad_norm", "tokens", "seconds"]
    assert [name for name in logged if not re.search(rf"^\| [^|]*`{name}`[^|]* \|", text, re.MULTILINE)] == []


def test_evaluation_explains_every_metric():
    text = read(DOCS / "evaluation.md").partition("## Metrics")[2].partition("\n## ")[0]
    explained = set(re.findall(r"`([a-z]+[a-z0-9]*(?:_[a-z]+)*)`", text))
    code = "".join(read(path) for path in (ROOT / "harmful_unlearn/evals").rglob("*.py"))
    figures = set(re.findall(r'(?:add\(label, [^,]+, [^,]+, |estimates\[)"(\w+)"', code))
    figures |= set(re.findall(r'"(oracle_\w+)"', code)) | {"mc1", "mc2"}
    assert len(figures) > 11 and figures <= explained
    assert {name for name in explained if f'"{name}"' not in code} == set()


def test_method_explains_every_method():
    text = read(DOCS / "method.md").partition("## Methods")[2].partition("\n## ")[0]
    assert [name for name in METHODS if f"`{name}`" not in text] == []


def test_the_citation_has_the_version_and_the_paper():
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert citation["version"] == CODE_VERSION
    assert f"## {CODE_VERSION}\n" in read(CHANGELOG)
    paper = citation["preferred-citation"]
    assert paper["title"] in read(README) and paper["identifiers"][0]["value"] == "arXiv:2402.10058"
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Dou", "Tan", "Tian", "Jiang"]
