"""Which programs load what stage 2 writes, and whether their greedy answers are those of transformers.

    python scripts/check_clients.py --base BASE --model UNLEARNED --adapter UNLEARNING_ADAPTER

tries every client that is installed beside this project (pip install mergekit lm_eval; vLLM pins its own transformers
and wants an environment of its own) and prints one row of a Markdown table for each. llama.cpp reads its own files
alone, which its convert_hf_to_gguf.py and convert_lora_to_gguf.py make:

    python scripts/check_clients.py --base BASE --model UNLEARNED --gguf UNLEARNED.gguf --clients llama_cpp
    python scripts/check_clients.py --base BASE --adapter A --adapter_gguf BASE.gguf A.gguf --clients llama_cpp

Everything is computed in float32. What an adapter should answer is what transformers answers with the model that this
project makes of it and its base. mergekit's task_arithmetic gets the model as a donor of weight 1, which should give
the model itself.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from harmful_unlearn.cli.flag_parser import FlagParser, flag
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.errors import UserError, first_line
from harmful_unlearn.negation.negate import negate
from harmful_unlearn.storage.files import user_path

PROMPT = "To keep tomato plants healthy in a dry summer, first of all"
NEW_TOKENS = 24
TASK = """
task: answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: ""
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {new_tokens}}}
metric_list: [{{metric: exact_match}}]
"""


@dataclass(frozen=True)
class Subject:
    """What a client is to load: a full model, or an adapter on its base. Paths of folders and .gguf files."""

    base: str
    model: str | None = None
    adapter: str | None = None
    gguf: str | None = None  # of the model, or of the adapter's base
    adapter_gguf: str | None = None

    @property
    def weights(self) -> str:
        """The folder whose weights are loaded first."""
        return self.model or self.base


def greedy(model: PreTrainedModel, folder: str) -> str:
    """The model's answer, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer = model.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", use_safetensors=True)


def expected(subject: Subject, scratch: Path) -> str:
    """The answer that every client should give."""
    if subject.model:
        return greedy(load(subject.model), subject.model)
    merged = scratch / "merged"
    negate(Path(subject.base), [(Path(str(subject.adapter)), 1.0)], merged, -1.0)
    return greedy(load(str(merged)), subject.base)


# -------------------------------------------------------------------------- how each client gets its answer


def by_pipeline(subject: Subject, _scratch: Path) -> str:
    generator = pipeline("text-generation", model=subject.model or subject.adapter, dtype="float32")
    answers = generator(PROMPT, do_sample=False, max_new_tokens=NEW_TOKENS, return_full_text=False)
    return answers[0]["generated_text"]


def by_peft(subject: Subject, _scratch: Path) -> str:
    from peft import PeftModel

    return greedy(PeftModel.from_pretrained(load(subject.base), subject.adapter), subject.base)


def by_auto_peft(subject: Subject, _scratch: Path) -> str:
    """The base is the one that the adapter names."""
    from peft import AutoPeftModelForCausalLM

    return greedy(AutoPeftModelForCausalLM.from_pretrained(subject.adapter, dtype="float32"), subject.base)


def by_mergekit(subject: Subject, scratch: Path) -> str:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    donor = subject.model or f"{subject.base}+{subject.adapter}"
    settings = {
        "merge_method": "task_arithmetic",
        "base_model": subject.base,
        "models": [{"model": donor, "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    options = MergeOptions(quiet=True, lora_merge_cache=str(scratch / "merged adapters"))
    run_merge(MergeConfiguration.model_validate(settings), str(scratch / "mergekit"), options)
    return greedy(load(str(scratch / "mergekit")), subject.weights)


def by_lm_eval(subject: Subject, scratch: Path) -> str:
    import lm_eval
    from lm_eval.tasks import TaskManager

    (scratch / "data.jsonl").write_text(json.dumps({"text": PROMPT}) + "\n")
    (scratch / "answer.yaml").write_text(TASK.format(data=scratch / "data.jsonl", new_tokens=NEW_TOKENS))
    tokenizer = AutoTokenizer.from_pretrained(subject.weights)
    has_bos = tokenizer(PROMPT).input_ids[0] == tokenizer.bos_token_id  # the harness adds one only where it is told to
    arguments = {"pretrained": subject.weights, "dtype": "float32", "add_bos_token": has_bos}
    if subject.adapter:
        arguments["peft"] = subject.adapter
    manager = TaskManager(include_path=str(scratch))
    run = lm_eval.simple_evaluate("hf", model_args=arguments, tasks=["answer"], device="cpu", task_manager=manager)
    return run["samples"]["answer"][0]["resps"][0][0]


def by_vllm(subject: Subject, _scratch: Path) -> str:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    ids = AutoTokenizer.from_pretrained(subject.weights)(PROMPT).input_ids
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 1}
    settings["gpu_memory_utilization"] = 0.2  # of a CPU's memory, too, where the default of 0.92 is seldom free
    lora = None
    if subject.adapter:
        rank = json.loads((Path(subject.adapter) / "adapter_config.json").read_text())["r"]
        settings |= {"enable_lora": True, "max_lora_rank": max(8, rank)}
        lora = LoRARequest("unlearning", 1, subject.adapter)
    engine = LLM(subject.weights, **settings)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    return engine.generate({"prompt_token_ids": ids}, sampling, lora_request=lora)[0].outputs[0].text


def by_llama_cpp(subject: Subject, _scratch: Path) -> str:
    from llama_cpp import Llama

    if not subject.gguf:
        raise UserError("convert it first, and give --gguf or --adapter_gguf")
    tokenizer = AutoTokenizer.from_pretrained(subject.weights)
    engine = Llama(subject.gguf, lora_path=subject.adapter_gguf, n_ctx=256, verbose=False)
    tokens: list[int] = []
    for token in engine.generate(tokenizer(PROMPT).input_ids, temp=0.0):
        if len(tokens) == NEW_TOKENS or token == engine.token_eos():
            break
        tokens.append(token)
    return tokenizer.decode(tokens, skip_special_tokens=True)


Answer = Callable[[Subject, Path], str]
# Client -> its module, and how it answers with a full model and with an adapter (None: it is not for that).
CLIENTS: dict[str, tuple[str, Answer | None, Answer | None]] = {
    "transformers": ("transformers", by_pipeline, by_pipeline),
    "peft": ("peft", None, by_peft),
    "peft_auto": ("peft", None, by_auto_peft),
    "mergekit": ("mergekit", by_mergekit, by_mergekit),
    "lm_eval": ("lm_eval", by_lm_eval, by_lm_eval),
    "vllm": ("vllm", by_vllm, by_vllm),
    "llama_cpp": ("llama_cpp", by_llama_cpp, by_llama_cpp),
}


@dataclass(frozen=True)
class ClientSettings:
    """The flags of this command."""

    base: str = flag("the base model's folder", required=True)
    model: str | None = flag("an unlearned model's folder")
    adapter: str | None = flag("an unlearning adapter's folder")
    gguf: str | None = flag("the unlearned model, converted for llama.cpp")
    adapter_gguf: list[str] | None = flag("base and adapter, both converted", nargs=2, metavar="FILE")
    clients: list[str] = flag("try these only (default: all)", nargs="+", choices=CLIENTS, default=list(CLIENTS))


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    description, _, more = __doc__.partition("\n")
    parser = FlagParser(prog="check_clients.py", description=description, epilog=more)
    parser.add_settings(ClientSettings)
    settings = ClientSettings(**vars(parser.parse_args(arguments)))
    base = _folder(settings.base)
    files: list[str | None] = [*settings.adapter_gguf] if settings.adapter_gguf else [None, None]
    subjects = [
        Subject(base, model=_folder(settings.model), gguf=settings.gguf) if settings.model else None,
        Subject(base, adapter=_folder(settings.adapter), gguf=files[0], adapter_gguf=files[1])
        if settings.adapter
        else None,
    ]
    if not any(subjects):
        parser.error("give --model or --adapter")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        wanted = [expected(subject, Path(folder)) if subject else "" for subject in subjects]
        if greedy(load(base), base) in wanted:
            raise UserError(f"{base} itself gives the same answer, which shows nothing: give a model that differs more")
        packages = packages_distributions()
        print("| client | version | full model | adapter |\n| --- | --- | --- | --- |")
        for name in settings.clients:
            module, *answers = CLIENTS[name]
            if find_spec(module) is None:
                print(f"| {name} | not installed |  |  |", flush=True)
                continue
            package = packages[module][0]
            cells = [_outcome(*each) for each in zip(answers, subjects, wanted, strict=True)]
            print(f"| {name} | {package} {version(package)} | {' | '.join(cells)} |", flush=True)


def _folder(name: str) -> str:
    folder = user_path(name)
    if not folder.is_dir():
        raise UserError(f"there is no folder {name}: check the path")
    return str(folder.resolve())


def _outcome(answer: Answer | None, subject: Subject | None, wanted: str) -> str:
    """What came out: "same answer", "another answer: ...", "failed: ..."; nothing where nothing was tried."""
    if answer is None or subject is None:
        return ""
    with tempfile.TemporaryDirectory(prefix="client-") as scratch:
        try:
            got = answer(subject, Path(scratch))
        except Exception as error:  # clients raise anything, and the others are still to be tried
            return f"failed: {type(error).__name__}: {first_line(error)}".replace("|", "\\|")
    return "same answer" if got.strip() == wanted.strip() else f"another answer: {got!r}, not {wanted!r}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
