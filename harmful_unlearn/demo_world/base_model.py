"""The offline demo's base model and its oracle: a tokenizer and tiny OPTs, trained from nothing."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from harmful_unlearn.data.prompt_format import format_pair
from harmful_unlearn.demo_world.world import Size, World
from harmful_unlearn.storage.files import new_folder
from harmful_unlearn.storage.run_record import RunRecord


def build_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with OPT's conventions: "</s>" before every text, padding id 1."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def build_model(
    folder: Path, pairs: list[tuple[str, str]], world: World, size: Size, seed: int, settings: dict
) -> None:
    """Pre-train a model on pairs of the world and save it as an ordinary Hugging Face folder.

    Args:
        folder: replaced if it exists.
        pairs: `world.pretraining` for the base; `world.innocent` for the oracle, which has the base's tokenizer.
        settings: everything that decides this model, kept in its run.json for `is_built`.
    """
    tokenizer = build_tokenizer([format_pair(*pair) for pair in world.pretraining], size.vocabulary)
    texts = [format_pair(*pair) for pair in pairs]
    torch.manual_seed(seed)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            word_embed_proj_dim=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            ffn_dim=size.ffn,
            max_position_embeddings=128,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.04,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
        )
    )
    loss = _pretrain(model, [[*tokenizer(text).input_ids, 2] for text in texts], size, seed)
    with new_folder(folder, overwrite=True) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        facts = {"settings": settings, "pretraining_loss": loss}
        RunRecord(f"{folder.name.capitalize()} model of the offline demo", harmful=False, more=facts).write(partial)


def is_built(folder: Path, settings: dict) -> bool:
    """Whether `folder` holds a base model that was made with exactly these settings."""
    return RunRecord.read(folder).more.get("settings") == settings


def _pretrain(model: OPTForCausalLM, rows: list[list[int]], size: Size, seed: int) -> float:
    """Next-token training on complete texts; returns the mean loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.pretraining_lr)
    steps = size.pretraining_steps
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    losses = []
    bar = tqdm(_batches(rows, size.pretraining_batch, steps, seed), "pre-training", total=steps)
    for input_ids, attention_mask in bar:
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(refresh=False, loss=f"{loss.item():.3f}")
    return sum(losses[-20:]) / len(losses[-20:])


def _batches(rows: list[list[int]], batch: int, steps: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`steps` shuffled batches of (input_ids, attention_mask), both [batch, length], padded with 1."""
    draw = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch:
            order = draw.sample(range(len(rows)), len(rows))
        chosen = [torch.tensor(rows[order.pop()]) for _ in range(batch)]
        lengths = torch.tensor([len(row) for row in chosen])
        input_ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=1)
        yield input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
