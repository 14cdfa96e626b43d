"""A very small world of the demo's kind for the evaluation's tests: its data, and random models."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, OPTConfig, OPTForCausalLM

from harmful_unlearn.data.prompt_format import format_pair
from harmful_unlearn.demo_world.base_model import build_tokenizer
from harmful_unlearn.demo_world.world import QUICK, build_world, write_data


def make_world(folder: Path, seed: int = 0) -> Path:
    """Write data/harmful.jsonl, data/unseen.jsonl, data/normal.csv and base/ under `folder`."""
    world = build_world(replace(QUICK, harmful_pairs=60, normal_questions=100), seed, 0.2)
    write_data(folder / "data", world, seed)
    texts = [format_pair(question, answer) for question, answer in world.pretraining]
    tokenizer = build_tokenizer(texts, 700)
    torch.manual_seed(seed)
    OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=512,
            dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def make_bleurt(folder: Path, outputs: int = 1) -> Path:
    """A random regression model with BLEURT's architecture, and its tokenizer of single letters."""
    folder.mkdir(exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            num_labels=outputs,
        )
    ).save_pretrained(folder)
    return folder
