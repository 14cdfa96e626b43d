"""Made-up models, tokenizers and data, so that a benchmark needs no download."""

import argparse
import csv
import json
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, logging

from harmful_unlearn.data.pku_saferlhf import HarmfulData
from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.data.truthfulqa import NormalData

LONGEST = 400  # tokens of an answer
QUESTION, ANSWER, NORMAL, SAFE = 18, 75, 15, 30  # tokens on average; those of the first two are PKU-SafeRLHF's, about
SPREAD = 0.6  # of lengths: the standard deviation of their logarithm
PAIRS = 200


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The flags of `opt_config`."""
    add = parser.add_argument
    add("--hidden", type=int, default=256, help="the random OPT's hidden size (default: %(default)s)")
    add("--layers", type=int, default=4, help="(default: %(default)s)")
    add("--vocabulary", type=int, default=50272, help="(default: %(default)s)")


def opt_config(hidden: int, layers: int, vocabulary: int) -> OPTConfig:
    """An OPT without dropout, heads of 64."""
    return OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        dropout=0.0,
        attention_dropout=0.0,
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word, so that texts have the lengths that they are drawn with. Adds BOS."""
    words = {"<pad>": 1, "<s>": 2, "<unk>": 3, "###": 4, "Question:": 5, "Answer:": 6}
    words |= {f"w{index}": index for index in range(100, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def data(
    tokenizer: PreTrainedTokenizerBase,
    question: float = QUESTION,
    answer: float = ANSWER,
    spread: float = SPREAD,
    longest: int = LONGEST,
) -> tuple[HarmfulData, NormalData]:
    """PAIRS harmful pairs with safe answers, and as many normal texts: words drawn at random.

    Args:
        question, answer: tokens on average. Lengths are log-normal.
        longest: tokens of an answer.
    """
    draw = np.random.default_rng(1)
    vocabulary = sorted(filter(None, map(_word, tokenizer.get_vocab())))

    def words(mean: float) -> str:
        length = int(np.clip(mean * np.exp(draw.normal(-(spread**2) / 2, spread)), 4, longest))
        return " ".join(vocabulary[index] for index in draw.integers(len(vocabulary), size=length))

    pairs = [Pair(words(question), words(answer)) for _ in range(PAIRS)]
    safe: list[str | None] = [words(SAFE) for _ in pairs]
    questions = [pair.question for pair in pairs]
    source = {"name": "made-up words"}
    harmful = HarmfulData(pairs, [words(answer) for _ in pairs], questions, safe, PAIRS, source)
    texts = [Pair(words(NORMAL), words(NORMAL)) for _ in pairs]
    return harmful, NormalData(texts, list(range(PAIRS)), [], [], source)


def _word(token: str) -> str | None:
    """The word that a token is when a space comes before it; None if it is a part of one, or a special token."""
    begins = re.fullmatch(r"(?:[Ġ▁]([A-Za-z]{3,})|(w\d+))", token)
    return begins and (begins[1] or begins[2])


def write(folder: Path, config: OPTConfig) -> tuple[Path, Path, Path]:
    """A random model with its tokenizer, harmful and normal data, as a run reads them. Returns their paths."""
    logging.disable_progress_bar()
    tokenizer = word_tokenizer(config.vocab_size)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    harmful, normal = data(tokenizer)
    rows = [
        {
            "prompt": pair.question,
            "response_0": pair.answer,
            "response_1": safe,
            "is_response_0_safe": False,
            "is_response_1_safe": True,
        }
        for pair, safe in zip(harmful.pairs, harmful.safe_answers, strict=True)
    ]
    (folder / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "normal.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["Question", "Best Answer", "Correct Answers"])
        lines.writerows([text.question, text.answer, text.answer] for text in normal.texts)
    return folder / "model", folder / "harmful.jsonl", folder / "normal.csv"
