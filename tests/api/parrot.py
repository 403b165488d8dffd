"""A real mlx-lm Llama whose weights are planted so that each token has one successor, and its tokenizer.

What it says depends on the prompt's last token alone: a conversation is rendered as its contents, so that the
last user word chooses the line. A model of 0 attention, one-hot embeddings and a table for its head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.engine.model import LoadedModel, ModelInfo

END = "<end>"
TRAP = "<trap>"
"""The model raises when it reads this."""

LINES: dict[str, list[str]] = {
    "hello": ["Hi", " there", "!", END],
    "greek": ["alp", "ha", "be", "ta", "ga", "mma", END],
    "accent": ["\u00c3", "\u00a9", "\u00c3"],  # as bytes c3 a9: é, again and again
    "sing": ["la", "la"],
    "country": [" Paris", ".", END],
    "fall": ["ouch", TRAP, END],
    "silence": [END],
    "#": ["%", "\u0120", "2", "3", END],  # the second is byte-level for a space by itself
}
TEXTS = {"hello": "Hi there!", "greek": "alphabetagamma", "country": " Paris."}
CONTEXT_TOKENS = 512

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('A system message must come first.') }}{% endif %}"
    "{{ message.content }}{% endfor %}"
)


def parrot_tokenizer(template: str | None = TEMPLATE) -> TokenizerWrapper:
    """Byte-level: 256 byte tokens, then each word of the lines as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [*LINES, *(word for line in LINES.values() for word in line)]
    added = [word for word in dict.fromkeys(words) if word not in (*alphabet, END)]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in added])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = template
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)  # pyright: ignore[reportArgumentType]


class Parrot(llama.Model):
    """Raises when it reads the trap, as a failing kernel would.

    Says the tokens `way`, of which the last is the trap, after one another alone, never by chance.
    """

    way: tuple[int, ...]

    def __call__(self, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
        trap = self.way[-1]
        if (inputs == trap).any().item():
            raise RuntimeError("a secret of the inside: /etc/passwd")
        logits = super().__call__(inputs, *args, **options)
        # Whatever is sampled or adapted; the first one never, since nothing comes after the trap.
        for before, token in zip((trap, *self.way), self.way, strict=False):
            chance = (mx.arange(logits.shape[-1]) == token) & (inputs != before)[..., None]
            logits = mx.where(chance, -1e4, logits)
        return logits


def load_parrot(template: str | None = TEMPLATE, context_tokens: int = CONTEXT_TOKENS) -> LoadedModel:
    """As `load_model` would return it. Its most likely successor has a probability of almost 1."""
    tokenizer = parrot_tokenizer(template)
    size = len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    width = -(-size // 8) * 8
    model = Parrot(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=width,
            num_hidden_layers=1,
            intermediate_size=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            vocab_size=size,
            tie_word_embeddings=False,
        )
    )
    model.way = (vocabulary["fall"], vocabulary["ouch"], vocabulary[TRAP])
    table = mx.zeros((size, width))
    for first, line in LINES.items():
        for token, successor in zip([first, *line], line, strict=False):
            table[vocabulary[successor], vocabulary[token]] = 1.0
    model.model.embed_tokens.weight = mx.eye(size, width)
    model.lm_head.weight = table * (30.0 / width**0.5)  # the norm makes a one-hot row of length sqrt(width)
    layer = model.layers[0]
    layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
    layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    mx.eval(model.parameters())
    model.eval()
    info = ModelInfo(tokenizer, {}, "parrot", Path("parrot"), context_tokens, size, "sha256:0123456789abcdef")
    return LoadedModel(model, info)
