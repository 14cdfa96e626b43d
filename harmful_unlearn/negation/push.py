"""Push an unlearned model or an unlearning adapter to the hub. A model that has learned harm is always refused.

Weights, configuration, tokenizer and licence are uploaded as they are; run.json and the card without the paths of this
machine and the command line; nothing else, above all no pickle.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from harmful_unlearn.errors import UserError, disk_problem, first_line
from harmful_unlearn.storage.files import read_json
from harmful_unlearn.storage.model_card import HUB_ID, model_card
from harmful_unlearn.storage.run_record import RunRecord
from harmful_unlearn.storage.safetensors_io import WEIGHT_SUFFIXES, SafetensorsFolder

SMALL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip
SOURCE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # where a configuration says what it is from
LOCAL = re.compile(r"/|~|\.\.?[/\\]|[A-Za-z]:[/\\]")  # how a path of this machine may start
# Flags that are paths, and keys of a record that are paths or hub ids.
PATHS = {"model_save_dir", "saved_model", "log_file", "task_vector_saving_path", "resume", "replay"}
SOURCES = {"name", "model_name", "harmful_dataset", "normal_dataset", "more_normal_dataset"}
TEXTS = ("system_prompt", "prompt_template")  # texts of the record, which may start like a path ("/no_think")
FIXES = {
    401: "it does not accept the token: make a new one with write access, and set HF_TOKEN or run `hf auth login`",
    403: "the token may not do that: give one with write access, and an OWNER that you may write to",
    404: "there is no such repository any more: check the name",
    409: "somebody else uses that name, or has changed the repository in the meantime: check it, or give another name",
}


def check_access(repo_id: str) -> None:
    """Raises UserError: `repo_id` is not OWNER/NAME, HF_HUB_OFFLINE is set, or there is no token."""
    try:
        validate_repo_id(repo_id)
        is_valid = "/" in repo_id
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(f"--push_to_hub {repo_id!r} is no name on the hub: give OWNER/NAME")
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set: unset it, or omit --push_to_hub")
    if not get_token():
        raise UserError("--push_to_hub needs a token with write access: run `hf auth login`, or set HF_TOKEN")


def check_unlearned(record: RunRecord, folder: Path) -> None:
    """Raises UserError: by its record, the model in `folder` is not one from which stage 2 took harm away."""
    if record.harmful is None:
        raise UserError(f"no run.json says how {folder} was made: push a folder that stage 2 of this project wrote")
    if record.harmful or record.scaling_coef is None or not record.finetuned:
        what = "deliberately harmful" if record.harmful else "no result of stage 2"
        raise UserError(f"{folder} is {what}, and is never pushed: push the unlearned model or adapter made from it")
    for source, coef in _trained(record, record.scaling_coef):
        if source.negates is None:
            raise UserError(
                f"run.json of {folder} does not say how all of its sources were trained, and it is not pushed: make it "
                "again from stage 1 models with their run.json"
            )
        if not (coef > 0 if source.negates else coef < 0):
            action = "subtracts" if source.negates else "adds"
            raise UserError(
                f"{folder} does not unlearn, and is never pushed: stage 2 {action} what --method "
                f"{source.method or 'sku'} trained, and its coefficient here is {-coef if action == 'adds' else coef:g}"
                ": give another --scaling_coef"
            )


def _check_weights(record: RunRecord, weights: SafetensorsFolder) -> None:
    """Raises UserError: the weights are not those that stage 2 wrote with this record, but, say, of a stage 1 model."""
    if not record.fingerprint:
        raise UserError(f"run.json of {weights.folder} does not say which weights it is about: make it anew")
    if record.fingerprint != weights.fingerprint():
        raise UserError(
            f"the weights in {weights.folder} are not what stage 2 wrote, and are never pushed: make it anew"
        )


def _trained(record: RunRecord, coef: float) -> Iterator[tuple[RunRecord, float]]:
    """The stage 1 models behind a record, or an empty record for an unknown one, and what each is subtracted by."""
    if not record.finetuned:
        yield record, coef
    elif len(record.stage_1) != len(record.finetuned):  # the same folder was given twice
        yield RunRecord(), coef
    else:
        for source, inner in zip(record.stage_1, record.finetuned.values(), strict=True):
            yield from _trained(source, coef * inner)


def push(folder: Path, repo_id: str, public: bool = False) -> str:
    """Upload an unlearned model or unlearning adapter, in one commit; the repository is created if there is none.

    Args:
        folder: what `negate` or `negate_adapter` wrote. Nothing in it is changed.
        repo_id: OWNER/NAME.
        public: whether the repository is public. That of one that exists is never changed.

    Returns:
        The URL of the repository.

    Raises:
        UserError: as `check_access` and `check_unlearned`; weights that are not the record's; a broken folder; a
            repository that is private or public against the wish, or has weights that this upload would not replace;
            the hub refuses or cannot be reached.
    """
    check_access(repo_id)
    record = RunRecord.read(folder)
    check_unlearned(record, folder)
    _check_weights(record, _weights(folder))
    files = uploads(folder)
    api = HfApi()
    with _hub_errors(folder, repo_id):
        try:
            repository = api.model_info(repo_id)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=not public)
            repository = api.model_info(repo_id)
        if bool(repository.private) == public:
            what, fix = ("private", "omit") if public else ("public", "give")
            raise UserError(f"{repo_id} is a {what} repository: {fix} --public, or give another name")
        present = {file.rfilename for file in repository.siblings or []}
        stale = sorted(name for name in present - files.keys() if Path(name).suffix in WEIGHT_SUFFIXES)
        if stale:
            raise UserError(f"{repo_id} has other weights ({stale[0]}): delete them on the hub, or give another name")
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo_id, operations, commit_message="Upload an unlearned model")
    return f"{api.endpoint}/{repo_id}"


def _weights(folder: Path) -> SafetensorsFolder:
    return SafetensorsFolder(folder, "adapter_model" if (folder / "adapter_config.json").is_file() else "model")


def uploads(folder: Path) -> dict[str, Path | bytes]:
    """What `push` uploads: for each name the file, or the content if it is not that of the folder's file.

    Raises UserError: no model or adapter, a broken one, or a broken run.json.
    """
    weights = _weights(folder)
    names = [*weights.shards, *SMALL_FILES]
    if f"{weights.stem}.safetensors" not in weights.shards:
        names.append(weights.index.name)
    files: dict[str, Path | bytes] = {name: folder / name for name in names if (folder / name).is_file()}
    content = read_json(folder / "run.json")
    ids, paths = _hub_ids(content)
    record = _public_record(content, ids)
    base = (record.get("base") or {}).get("name")
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        content = read_json(folder / name) if name in files else {}
        sources = {key: content[key] for key in SOURCE_KEYS if isinstance(content.get(key), str)}
        local = [key for key, source in sources.items() if source in paths or _is_local(source)]
        if local:
            files[name] = _json(content | dict.fromkeys(local, base if base in ids else None))
    return files | {
        "run.json": _json(record),
        "README.md": model_card(record, weights.stem == "adapter_model").encode(),
    }


def _hub_ids(content: dict) -> tuple[set[str], set[str]]:
    """Which names of models and data in a record are ids of the hub, and which are paths: these have no revision."""
    ids, names, sections = set(), set(), [content]
    for section in sections:
        sections += [value for value in section.values() if isinstance(value, dict)]
        if isinstance(name := section.get("name"), str):
            names.add(name)
            if section.get("revision") and HUB_ID.fullmatch(name):
                ids.add(name)
    return ids, names - ids


def _public_record(content: dict, ids: set[str]) -> dict:
    """run.json without command line and working folder, and with the last part alone of each path of this machine."""
    public = _without_paths({key: value for key, value in content.items() if key not in ("command", "folder")}, ids)
    base, title = (content.get("base") or {}).get("name"), str(content.get("title", ""))
    if isinstance(base, str):
        title = title.replace(base, public["base"]["name"])
    return public | {"title": title}


def _without_paths(value: Any, ids: set[str], key: str = "") -> Any:
    if isinstance(value, dict):
        value = {name: _without_paths(entry, ids, name) for name, entry in value.items()}
        if value.get("finetuned"):  # its keys are folders; the sections of their trainings have the same numbers
            value["finetuned"] = {f"model_{n}": coef for n, coef in enumerate(value["finetuned"].values(), 1)}
        return value
    if isinstance(value, list):
        return [_without_paths(entry, ids, key) for entry in value]
    if not isinstance(value, str) or key in TEXTS or value in ("auto", ""):  # auto: of --resume
        return value
    is_path = key in PATHS or (value not in ids if key in SOURCES else LOCAL.match(value))
    return _shortened(value) if is_path else value


def _is_local(name: str) -> bool:
    return bool(LOCAL.match(name)) or Path(name).exists()


def _shortened(path: str) -> str:
    return ".../" + re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _hub_errors(folder: Path, repo_id: str) -> Iterator[None]:
    """Within the block, whatever the hub's client raises is a UserError that says how to go on."""
    try:
        yield
    except Exception as error:  # the client passes on the errors of its HTTP library
        if isinstance(error, UserError) or disk_problem(error):
            raise
        refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__  # an upload's error wraps the hub's
        status = refusal.response.status_code if isinstance(refusal, HfHubHTTPError) else None
        message = getattr(refusal, "server_message", None) or first_line(error)
        problem = f"the hub said {status} ({message})" if status else f"the hub was not reached ({message})"
        fix = FIXES.get(status or 0, "try again later" if status else "check the connection")
        again = f"then `python task_vector.py --push_to_hub {repo_id} --output {folder}` pushes {folder}"
        text = f"{repo_id}: {problem}; {fix}; {again}"
        raise UserError(text.replace(get_token() or "\n", "***")) from None
