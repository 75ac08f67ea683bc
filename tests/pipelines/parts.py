"""Parts that tiny pipelines of several families share."""

import torch
from transformers import Qwen2Tokenizer


def wake(denoiser):
    """Random weights under which text, latents and noise level all matter: the default start leaves norms and output near 0."""
    for parameter in denoiser.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.8 * parameter[0].numel() ** -0.5)
    return denoiser


def qwen_tokenizer():
    """One token a byte."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*symbols, *special])}, merges=[], unk_token=None, additional_special_tokens=special
    )
    made.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    return made


TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
