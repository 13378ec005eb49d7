"""The tokenizer of the demo: one token a word, and a chat template that marks what the assistant says.

The frame is ``<|user|> question <|assistant|> answer <eos>``. `{% generation %}` stands round the answer and its
``<eos>``, so transformers and TRL can build assistant masks. ``<eos>`` also ends every plain document, hence the base
knows it; the two role tokens are in no plain document.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from paft.demo.world import words

SPECIAL = ("<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>")
PAD_ID, EOS_ID = SPECIAL.index("<pad>"), SPECIAL.index("<eos>")
MAX_LENGTH = 128
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{%- if not loop.first -%}{{ ' ' }}{%- endif -%}\n"
    "{%- if message['role'] == 'assistant' -%}\n"
    "{{ '<|assistant|> ' }}{%- generation -%}{{ message['content'] + ' ' + eos_token }}{%- endgeneration -%}\n"
    "{%- elif message['role'] == 'user' -%}\n"
    "{{ '<|user|> ' + message['content'] }}\n"
    "{%- else -%}\n"
    "{{ raise_exception('the demo knows the roles user and assistant, not ' + message['role']) }}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ ' <|assistant|> ' }}{%- endif -%}\n"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the world: ids 0-4 are special, then `world.words` in order; unknown words become ``<unk>``."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words()))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=["<|user|>", "<|assistant|>"], model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False)
    fast.chat_template = CHAT_TEMPLATE
    return fast
