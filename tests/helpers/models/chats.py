"""Small tokenizers with chat templates of the kinds that published models have."""

from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.helpers.models.tiny import GOLDENS


@dataclass(frozen=True)
class Chat:
    """A chat template and its special tokens, the end of turn first.

    Attributes:
        head, tail: what stands before a question, and between it and its answer.
        takes_system: whether it takes a system prompt.
    """

    tokens: tuple[str, ...]
    jinja: str
    head: str
    tail: str
    takes_system: bool = True


CHATS = {
    "smollm": Chat(  # a system prompt of its own
        ("<|im_end|>", "<|im_start|>"),
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": Chat(  # a BOS, trimmed texts, and today's date
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "{{ bos_token }}{% if messages[0].role != 'system' %}Today: {{ strftime_now('%d %b %Y') }}<|eot_id|>{% endif %}"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "</s>Today: 26 Jul 2024<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen3": Chat(  # takes thoughts out of an answer, and puts empty ones before it
        ("<|im_end|>", "<|im_start|>"),
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "r1": Chat(  # asks for thoughts, which a finished conversation does not hold
        ("<end>", "<user>", "<assistant>"),
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% else %}<{{ m.role }}>"
        "{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
        "</s><user>",
        "<assistant>",
    ),
    "gemma": Chat(  # no system prompt, another name for the assistant
        ("<end_of_turn>", "<start_of_turn>"),
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "</s><start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        takes_system=False,
    ),
    "mistral": Chat(  # a space before the answer, no word for whose turn it is, and the EOS as end of turn
        ("</s>",),
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system + m.content }} [/INST]{% else %}"
        " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "[INST] ",
        " [/INST]",
    ),
    "plain words": Chat(  # no special token at all
        (),
        "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n# end\n{% endfor %}"
        "{% if add_generation_prompt %}# assistant\n{% endif %}",
        "# user\n",
        "\n# end\n# assistant\n",
    ),
}


def chat_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The goldens' tokenizer with that chat template; its special tokens follow the 700 others."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "model")
    tokenizer.add_tokens([token for token in CHATS[name].tokens if token != "</s>"], special_tokens=True)
    tokenizer.chat_template = CHATS[name].jinja
    return tokenizer
