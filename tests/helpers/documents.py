"""What documents and code name, and whether it exists: links, headings, files, flags, make targets, details."""

import ast
import re
from functools import cache
from pathlib import Path

from harmful_unlearn.storage.files import ROOT

PACKAGE = ROOT / "harmful_unlearn"
DETAILS = ROOT / "docs" / "implementation-details.md"
NUMBER_OF_DETAILS = 22
FOREIGN_FLAGS = {"--config_file", "--num_processes", "--nproc_per_node"}  # of accelerate and torchrun
WRITTEN_BY_RUNS = {"attacks.md", "report.md", "results.md", "run.losses.png", "run.yaml"}

FILE = re.compile(r"(?<![\w./*{<>-])(?:[\w.-]+/)*[\w.-]+\.(?:py|sh|ya?ml|toml|cff|md|png|txt)\b(?![\w/])")
DETAIL_NUMBERS = re.compile(r"\bdetails? (\d+(?:(?:, and |, or |, | and | or | to |-|–)\d+)*)", re.IGNORECASE)
OLD_NAMES = re.compile(r"released code,? points? \d|\(points? \d|README's implementation details?", re.IGNORECASE)


def documents() -> list[Path]:
    """The Markdown files that people read, outside of what runs write."""
    pages = [page for folder in ("docs", "dataloader", "benchmarks") for page in (ROOT / folder).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), ROOT / "logs" / "README.md", *pages])


def sources() -> list[Path]:
    """Code and configuration whose comments and messages name documents; tests are not read by users."""
    folders = (PACKAGE, ROOT / "benchmarks", ROOT / "dataloader", ROOT / "scripts", ROOT / ".github")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".yml", ".sh")]
    tops = [ROOT / name for name in ("Makefile", "pyproject.toml", "requirements.txt", "llm_unlearn.yml")]
    return sorted([*files, *ROOT.glob("*.py"), *tops])


def read(path: Path) -> str:
    """A file's text."""
    return path.read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text: ids, and GitHub's names of headings."""
    names: list[str] = []
    for title in headings(text):
        name = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{repeated}" if repeated else name)
    return {*names, *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def headings(text: str) -> list[str]:
    """The headings of a Markdown text, as they are shown."""
    titles = re.findall(r"^#{1,6} +(.+?)[ #]*$", without_code(text), re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"<[^>]+>|[`*]", "", title)).strip() for title in titles]


def without_code(text: str) -> str:
    """A Markdown text without its blocks of code, fenced or indented by four spaces."""
    text = re.sub(r"^(```+|~~~+).*?^\1[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?:(?<=\n\n)|\A)(?: {4}[^\n]*\n?|\n(?= {4}))+", "", text)


def code_of(text: str) -> list[str]:
    """The pieces of a Markdown text that are formatted as code."""
    prose = without_code(text)
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}([^\n]*)", text, re.MULTILINE)
    return [*re.findall(r"`([^`]+)`", prose), *blocks, *indented]


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links, images and anchors that lead nowhere."""
    prose = re.sub(r"`[^`]*`", "", without_code(text))
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)", prose, re.MULTILINE))
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + list(defined.values())
    broken = [f"[{name}] is not defined" for name in re.findall(r"\]\[([^\]]+)\]", prose) if name not in defined]
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not (file.exists() or file == document):
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(text if file == document else read(file)):
            broken.append(f"{target}: no such heading")
    return broken


def without_links_elsewhere(text: str) -> str:
    """A Markdown text without its links to other sites: the files of other projects are not here."""
    text = re.sub(r"\[[^\]]*\]\(https?:[^)]*\)", "", text)
    defined = re.findall(r"^\[([^\]]+)\]: https?:", text, re.MULTILINE)
    for name in defined:
        text = re.sub(rf"\[[^\]]*\]\[{re.escape(name)}\]|^\[{re.escape(name)}\]: .*$", "", text, flags=re.MULTILINE)
    return text


def missing_files(text: str, folder: Path = ROOT) -> list[str]:
    """Files that a text names and that are not in the repository.

    A name with a folder counts from the repository, the package or `folder`; a bare name may be anywhere.
    """
    names = set(FILE.findall(re.sub(r"https?://\S+", "", text))) - WRITTEN_BY_RUNS
    return sorted(name for name in names if not _exists(name, folder))


def _exists(name: str, folder: Path) -> bool:
    if any((start / name).exists() for start in (ROOT, PACKAGE, folder)):
        return True
    return "/" not in name and name in _file_names()


@cache
def _file_names() -> set[str]:
    folders = (PACKAGE, *(ROOT / name for name in ("tests", "docs", "benchmarks", "dataloader", "scripts", ".github")))
    return {path.name for folder in folders for path in folder.rglob("*")}


def missing_targets(text: str) -> list[str]:
    """Targets of `make` that a text names and the Makefile does not have."""
    known = set(re.findall(r"^([a-z][a-z-]*):", read(ROOT / "Makefile"), re.MULTILINE))
    return sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", text)) - known)


def missing_flags(text: str) -> list[str]:
    """Flags that a text names and none of the commands has."""
    flags = set(re.findall(r"(?<![\w-])--[a-z]\w*", text)) - FOREIGN_FLAGS
    return sorted(flag for flag in flags if not known_flags().fullmatch(flag))


@cache
def known_flags() -> re.Pattern:
    """Every flag of every command, as the code writes it: "--seed", f"--n_{name}", or a field of its settings."""
    files = [path for path in sources() if path.suffix == ".py"]
    nodes = [node for file in files for node in ast.walk(ast.parse(read(file)))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    flags = {text for text in texts if re.fullmatch(r"--[a-z]\w*", text)} | {"--help"}
    begun = [ast.unparse(node)[2:-1] for node in nodes if isinstance(node, ast.JoinedStr)]
    flags |= {re.sub(r"{\w+}", r"\\w+", text) for text in begun if re.fullmatch(r"--[a-z]\w*_{\w+}", text)}
    settings = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Settings")]
    fields = [field for node in settings for field in node.body if isinstance(field, ast.AnnAssign)]
    flags |= {f"--{field.target.id}" for field in fields if isinstance(field.target, ast.Name)}
    return re.compile("|".join(flags))


def missing_documents(text: str) -> list[str]:
    """Documents and headings that code names and that do not exist.

    A heading is named as `docs/method.md#landing-point`, or as `docs/method.md, "Landing point"`.
    """
    missing = []
    for name, anchor, title in re.findall(r'\b((?:\w+/)*[\w-]+\.md|README)(?:#([\w-]+)|,? \(?"([^"\n]+)")?', text):
        file = ROOT / (name if name.endswith(".md") else f"{name}.md")
        document = read(file) if file.exists() else ""
        absent = "/" in name and not document
        if absent or (anchor and anchor not in anchors(document)) or (title and title not in headings(document)):
            missing.append(f"{name}: {anchor or title}".rstrip(": "))
    loose = re.findall(r"\bREADME, [A-Za-z]\w+(?: \w+)*", text)
    return missing + [f"{name}: name the page in docs/ and its heading" for name in loose]


def wrong_details(text: str) -> list[str]:
    """Numbers that the list of implementation details does not have, and old names of the list."""
    numbers = [int(number) for match in DETAIL_NUMBERS.findall(text) for number in re.findall(r"\d+", match)]
    wrong = [f"detail {number}" for number in numbers if not 1 <= number <= NUMBER_OF_DETAILS]
    return wrong + [f"{name}: say implementation detail" for name in OLD_NAMES.findall(text)]
