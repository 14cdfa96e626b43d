"""The parser of all commands, whose flags are the fields of a dataclass."""

import argparse
import difflib
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from harmful_unlearn.cli.config_file import read_config, written_config
from harmful_unlearn.cli.running import one_line

# Tokens of services that a run may use, headers and private keys, and secrets in addresses and settings.
SECRET = re.compile(
    r"(?<![A-Za-z0-9])((hf|api_org|gsk|r8|gh[pousr])_[A-Za-z0-9]{20}|github_pat_\w{20}|wandb_v1_\w{20}"
    r"|sk-(?=[\w-]*\d)([\w-]*[_-])?[A-Za-z0-9]{20}|pplx-[A-Za-z0-9]{20}|(glpat|nvapi|xox[abeoprs])-[\w-]{20}"
    r"|AIza[\w-]{30}|A[KS]IA[0-9A-Z]{16}|eyJ[\w-]{17}|(?i:bearer) +(?=\S*\d)[\w.~+/=-]{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s@?#]+@|[?&]\w*(?i:key|token|secret|password|sig(nature)?)=[^&\s]"
    r"|[A-Z]_(KEY|TOKEN|SECRET|PASSWORD) *[=:] *\S{8}"
)
HEX_KEY = re.compile("[0-9a-f]{40}")  # of wandb; as the value of a flag named ..._revision it is a commit
MAYBE_SECRET = re.compile(  # how tokens start: in a message, not even a piece of one is shown
    r"(?<!--)(?<![A-Za-z0-9])((hf|api_org|gsk|r8|gh[pousr]|github_pat|wandb_v1)_|(sk|pplx|glpat|nvapi|xox[abeoprs])-|AIza|eyJ)"
    r"[^\s'\"]+"
)
Settings = TypeVar("Settings")


def flag(help: str, group: str = "", **options: Any) -> Any:
    """A field of a command's settings dataclass, which is its flag, too. `options` are those of `add_argument`."""
    return field(metadata={"help": help, "group": group, **options})


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and suggest a flag for a misspelt one.

    Flags cannot be abbreviated, and a negative number may have an exponent (-1e-3). With settings, --config takes flags
    from a file, and --write_config prints them and stops.
    """

    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")  # argparse's own takes -1e-3 for a flag
        self._settings: dict[str, argparse.Action] = {}  # the flags that a file may give, by name
        self._parsed: dict[str, Any] = {}
        self._files: dict[str, str] = {}  # where the value of a flag comes from, if not from the command line
        self._prints_config = False
        self._recorded: Callable[[Path], Mapping[str, Any]] | None = None

    def add_settings(self, settings_class: type) -> None:
        """Add a flag for each field of a settings dataclass that `flag` made."""
        groups: dict[str, Any] = {}
        for setting in fields(settings_class):
            options = dict(setting.metadata)
            title = options.pop("group")
            if title not in groups:
                groups[title] = self.add_argument_group(title) if title else self
            default = options.get("default")
            if default not in (None, (), []) and default is not False and "(default:" not in options["help"]:
                options["help"] += f" (default: {default})"
            self._settings[setting.name] = groups[title].add_argument(f"--{setting.name}", **options)
            self.add_argument(
                f"--no_{setting.name}",
                dest=setting.name,
                action="store_const",
                const=options.get("default", False if options.get("action") == "store_true" else None),
                default=SUPPRESS,
                help=SUPPRESS,
            )
        files = self.add_argument_group("flags from a file")
        files.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="a YAML file with a line `flag: value` for each flag; those on the command line come first, and "
            "--no_FLAG leaves out what the file gives for FLAG",
        )
        files.add_argument(
            "--write_config", action="store_true", help="print the flags as such a file, and stop (> run.yaml)"
        )

    def replays(self, recorded: Callable[[Path], Mapping[str, Any]]) -> None:
        """Make --replay, a flag of the settings, take the flags that `recorded` reads from what it names."""
        self._recorded = recorded

    def settings(self, settings_class: Callable[..., Settings], values: Mapping[str, Any]) -> Settings:
        """The settings with these values of their flags.

        If --write_config asks, prints the flags and exits with code 0. What the command itself filled in is a comment:
        another run from the file, with another --method, say, has to fill in its own.
        """
        if self._prints_config:
            filled_in = {name: value for name, value in values.items() if self._parsed[name] in (None, [])}
            comments = written_config(filled_in, self._settings).splitlines(keepends=True)
            print(written_config(self._parsed, self._settings), end="")
            if comments != ["{}\n"]:
                print("# What follows from these flags:\n", *(f"# {line}" for line in comments), sep="", end="")
            self.exit()
        return settings_class(**values)

    def parse_args(self, args=None, namespace=None):
        """The flags. Exits with code 2: a value is refused, a flag is missing or unknown, not UTF-8, or a secret."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_secrets(words)
        try:
            "".join(words).encode()  # Python keeps other bytes as half a surrogate pair, which cannot be written
        except UnicodeEncodeError:
            self.error(f"{next(word for word in words if not word.isprintable())!r} is not UTF-8: give another name")
        of_files = self._words_of_files(words)
        self._refuse_secrets(of_files)
        flags, unknown = self.parse_known_args(of_files + words, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]  # the value may be a secret
            self.error(f"unknown argument {name}{self._suggestion(name)}")
        if self._settings:
            self._prints_config = flags.write_config
            del flags.config, flags.write_config
        self._parsed = dict(vars(flags))
        return flags

    def _refuse_secrets(self, words: list[str]) -> None:
        name = "a word"
        for word in words:
            flag_name, _, value = word.partition("=")
            if flag_name in self._option_string_actions:
                name = flag_name
            else:
                value = word
            if SECRET.search(word) or (HEX_KEY.fullmatch(value) and not name.endswith("_revision")):
                self.error(
                    f"{name} looks like it holds a token or a password, and flags are recorded: set it in the "
                    "environment instead (HF_TOKEN, ...)"
                )

    def _words_of_files(self, words: list[str]) -> list[str]:
        """What the files of --replay and --config stand for, without the flags that come before them."""
        more: list[str] = []
        if self._settings and (files := _values_of("--config", words)):
            if len(files) > 1:
                self.error("--config is given twice: put all flags into one file")
            (name,) = files
            try:
                text = Path(name).expanduser().read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or "it is no text"
                self.error(f"--config {name or repr(name)} cannot be read ({problem}): give a YAML file")
            more = self._words_of(lambda: text, name, words)
        if self._recorded and (name := ["", *_values_of("--replay", more + words)][-1]):
            recorded = self._recorded(Path(name).expanduser())
            more = self._words_of(lambda: written_config(recorded, self._settings), name, more + words) + more
        return more

    def _words_of(self, text: Callable[[], str], file: str, words: list[str]) -> list[str]:
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        given |= {name.removeprefix("no_") for name in given}
        try:
            of_file = read_config(text(), file, self._settings, given)
            self._files |= dict.fromkeys((word.partition("=")[0] for word in of_file if word.startswith("--")), file)
            return of_file
        except ValueError as error:
            self.error(str(error))
        except KeyError as error:
            (name,) = error.args
            self.error(f"{file} has an unknown flag {name}{self._suggestion(name)}")

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line, rather than the usage."""
        message = MAYBE_SECRET.sub("***", one_line(message).removeprefix("argument "))
        if file := self._files.get(message.partition(":")[0]):
            message += f", in {file}"
        self.exit(2, f"error: {message} (--help lists all flags)\n")

    def _suggestion(self, unknown: str) -> str:
        known = [flag for flag, action in self._option_string_actions.items() if action.help != SUPPRESS]
        known = [flag for flag in known if flag.startswith("--")]
        name = "--" + unknown.partition("=")[0].lstrip("-").replace("-", "_")
        near = [flag for flag in known if flag.startswith(name)] or difflib.get_close_matches(name, known, 1)
        return f": did you mean {' or '.join(near)}?" if near else ""


def _values_of(flag_name: str, words: list[str]) -> list[str]:
    """The values of a flag among words, before they are parsed; none if nothing follows it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag_name, dest="values", action="append", default=[])
    with suppress(argparse.ArgumentError):  # the complete parser will say so
        return parser.parse_known_args(words)[0].values
    return []
