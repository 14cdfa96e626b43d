"""The end of a report: what the metrics mean, and what made the figures."""

from harmful_unlearn.reporting.blocks import Block, code, table
from harmful_unlearn.reporting.figures import DASH
from harmful_unlearn.reporting.glossary import INTERVAL, MEANINGS, METRIC_TITLES
from harmful_unlearn.reporting.parts.context import ReportContext


def glossary(report: ReportContext) -> list[Block]:
    shown = {
        METRIC_TITLES[metric].removesuffix(", %"): MEANINGS[metric] for metric in MEANINGS if metric in report.metrics
    }
    return [_facts_table({**shown, "interval": INTERVAL})]


def settings(report: ReportContext) -> list[Block]:
    data = report.data
    judged = {
        f"judge, seed {seed}": {key: round(v, 4) if isinstance(v, float) else v for key, v in facts.items()}
        for seed, facts in data.judge["by_seed"].items()
    }
    return [
        code("Command", data.command),
        _facts_table({"model": data.model, "seeds": data.seeds, **data.settings, **judged}),
    ]


def commands(report: ReportContext) -> list[Block]:
    models = [model for model in report.data.methods.values() if model["command"]]
    return [code(f"{model['label']} (seed {report.data.seeds[0]})", model["command"]) for model in models]


def provenance(report: ReportContext) -> list[Block]:
    facts = {name: fact for name, fact in report.data.provenance.items() if name != "folder"}  # of this machine
    return [_facts_table(facts)] if facts else []


def _facts_table(facts: dict) -> Block:
    """A dict as a table of two columns; a dict or list in it is one line."""

    def line(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {line(part)}" for key, part in value.items())
        if isinstance(value, list):
            return ", ".join(map(line, value))
        return DASH if value is None else str(value)

    return table(None, ["what", "value"], [[name, line(value)] for name, value in facts.items()])
