"""Parameters that OpenAI's API or other servers know and this one does not (yet): names and harmless values.

A harmless value asks for nothing that is not done anyway; a request with any other is refused by name, never
answered as if the parameter had not been there. Data only.
"""

from __future__ import annotations

from typing import Any

__all__ = ["IN_CHAT", "IN_COMPARISONS", "IN_COMPLETIONS", "IN_MESSAGES"]

_NEVER = ()

_OPENAI_BOTH: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
}

# Extensions that clients of vLLM, mlx-lm's server and llama.cpp send.
_OTHER_SERVERS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": _NEVER,
    "allowed_token_ids": _NEVER,
    "bad_words": ([],),
    "chat_template": _NEVER,
    "chat_template_kwargs": ({},),
    "draft_model": _NEVER,
    "grammar": ("",),
    "guided_choice": _NEVER,
    "guided_decoding_backend": _NEVER,
    "guided_grammar": _NEVER,
    "guided_json": _NEVER,
    "guided_regex": _NEVER,
    "guided_whitespace_pattern": _NEVER,
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "json_schema": _NEVER,
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "prompt_logprobs": _NEVER,
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": _NEVER,
    "truncate_prompt_tokens": _NEVER,
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}

IN_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "audio": _NEVER,
    "modalities": (["text"],),
    "prediction": _NEVER,
    "web_search_options": _NEVER,
    "reasoning_effort": _NEVER,
    "verbosity": ("medium",),
    **_OPENAI_BOTH,
    **_OTHER_SERVERS,
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "media_io_kwargs": ({},),
}

# `models` says who answers, once each, and log-probabilities always come, in a form of their own.
IN_COMPARISONS: dict[str, tuple[Any, ...]] = {
    **IN_CHAT,
    "model": _NEVER,
    "adapters": ([],),
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": _NEVER,
}

# `best_of` is harmless when it equals `n`, which the model itself checks.
IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "echo": (False,),
    **_OPENAI_BOTH,
    **_OTHER_SERVERS,
    "prompt_embeds": _NEVER,
    "response_format": ({"type": "text"},),
}

IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": _NEVER,
    "tool_call_id": _NEVER,
    "audio": _NEVER,
    "refusal": _NEVER,
}
