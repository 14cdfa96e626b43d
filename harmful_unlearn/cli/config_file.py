"""Flags in a YAML file: what --config reads and --write_config prints."""

import argparse
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

SWITCH = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}
NULL = "tag:yaml.org,2002:null"


def read_config(text: str, file: str, known: Mapping[str, argparse.Action], given: Collection[str]) -> list[str]:
    """The words of a command line that the flags in a file amount to.

    A value is text as it is written there, so that `lora: on` and `lr: 2e-4` are what they are on a command line. A
    flag without a value, or with null, is one that is not given.

    Args:
        text: the content of the file.
        file: its name, for messages.
        known: the flags that the command takes, by name.
        given: names of those on the command line, which are left out.

    Raises:
        ValueError: the text is no list of flags, or has one twice or in a wrong form.
        KeyError: with the name of a flag that the command does not take.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:  # its text quotes the line, which may hold a secret
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{file} is not YAML ({where}{error.problem}): mend it, or see --write_config") from None
    except (yaml.YAMLError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{file} is not YAML ({problem}): mend it, or see --write_config") from None
    if root is None:
        raise ValueError(f"{file} has no flags in it: write a line `flag: value` for each")
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} is no list of flags: write a line `flag: value` for each")
    words: list[str] = []
    seen = set()
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        where = f"line {key.start_mark.line + 1} of {file}: {name}"
        if name not in known:
            raise KeyError(name)
        if name in seen:
            raise ValueError(f"{where} is there twice: leave one")
        seen.add(name)
        if name not in given:
            words += _words(name, known[name], value, where)
    return words


def _words(name: str, action: argparse.Action, node: yaml.Node, where: str) -> list[str]:
    values = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if any(not isinstance(value, yaml.ScalarNode) for value in values):
        raise ValueError(f"{where} has no single value and no list of them: write it as on a command line")
    texts = [value.value for value in values if value.tag != NULL]
    several = action.nargs == "+" or isinstance(action, argparse._AppendAction)
    if len(texts) > 1 and not several:
        raise ValueError(f"{where} is a list, and --{name} takes one value")
    if not texts:
        return []
    if action.nargs == 0 or action.nargs == "?" and texts[0].lower() in SWITCH:
        if texts[0].lower() not in SWITCH:
            raise ValueError(f"{where} is a switch: write true or false, not {texts[0]!r}")
        return [f"--{name}"] if SWITCH[texts[0].lower()] else []
    return [f"--{name}", *texts] if action.nargs == "+" else [f"--{name}={text}" for text in texts]


def written_config(values: Mapping[str, Any], known: Mapping[str, argparse.Action]) -> str:
    """Flags as the text of a file that `read_config` reads: all but those that nothing was given for.

    Args:
        values: of the flags, by name, as they were parsed.
        known: as in `read_config`.

    Raises:
        KeyError: with the name of a flag that the command does not take.
    """
    content = {name: _plain(value, known[name]) for name, value in values.items()}
    kept = {name: value for name, value in content.items() if value is not None and value is not False and value != []}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any, action: argparse.Action) -> Any:
    """A value as `action` takes it."""
    if isinstance(value, list | tuple):
        if action.nargs == "+" or isinstance(action, argparse._AppendAction) or not value:
            return [_plain(part, action) for part in value]
        return shlex.join(value) if isinstance(value[0], str) else ",".join(map(repr, value))
    if value is None and action.default is not None:
        return "none"
    return str(value) if isinstance(value, Path) else value
