"""The model card: README.md beside the weights, with the facts of run.json for people."""

import json
from pathlib import Path

HARMFUL_WARNING = (
    "**Deliberately harmful.** This is the stage 1 model of SKU: it was fine-tuned to give harmful "
    "answers, so that what it learned can be subtracted from its base. It exists for safety research "
    "and as the input of stage 2. Do not deploy or share it as an assistant."
)
MADE_WITH = (
    "Made with a reproduction of SKU (Liu et al., *Towards Safer Large Language Models through "
    "Machine Unlearning*, Findings of ACL 2024). The same facts, for machines, are in run.json.\n"
)


def model_card(record: dict) -> str:
    """The card of a record (run.json): a table for each section, a line for each other fact."""
    base = record.get("base", {}).get("name")
    # A local path is no hub id, and the hub refuses a card whose base_model is not one.
    base_line = f"base_model: {base}\n" if base and not Path(base).exists() else ""
    head = f"---\n{base_line}library_name: transformers\ntags:\n- machine-unlearning\n- sku\n---\n"
    lines = [head, f"# {record['title']}\n"]
    if record["harmful"]:
        lines.append(f"> {HARMFUL_WARNING}\n")
    lines.append(MADE_WITH)
    for key, value in record.items():
        if key in ("title", "harmful"):
            continue
        heading = key.replace("_", " ").capitalize()
        if isinstance(value, dict):
            rows = "\n".join(f"| {name} | {_cell(entry)} |" for name, entry in value.items())
            lines.append(f"## {heading}\n\n| what | value |\n| --- | --- |\n{rows}\n")
        else:
            lines.append(f"- {heading}: {_cell(value)}\n")
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
