"""The model card: README.md beside the weights, with the facts of run.json for people."""

import json
import re
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
LICENCE = "The licence and the terms of use of its base apply to it, too.\n"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def model_card(record: dict, is_adapter: bool = False) -> str:
    """The card of a record (run.json): the hub's metadata, a table for each section, a line for each other fact."""
    base = record.get("base", {}).get("name")
    # The hub refuses a card whose base_model is not an id, and a local path is none.
    is_id = bool(base and HUB_ID.fullmatch(base) and not Path(base).exists())
    relation = "adapter" if is_adapter else "finetune"
    head = f"---\nbase_model: {base}\nbase_model_relation: {relation}\n" if is_id else "---\n"
    head += f"library_name: {'peft' if is_adapter else 'transformers'}\npipeline_tag: text-generation\n"
    head += "tags:\n- machine-unlearning\n- sku\n---\n"
    lines = [head, f"# {record['title']}\n"]
    if record["harmful"]:
        lines.append(f"> {HARMFUL_WARNING}\n")
    lines += [MADE_WITH, LICENCE]
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
