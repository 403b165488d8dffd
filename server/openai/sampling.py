"""From a request's fields to the engine's sampling parameters. Knows the vocabulary's size. Pure."""

from __future__ import annotations

from server.engine.messages import SamplingParams
from server.errors import InvalidRequestError
from server.openai.wire import SampledRequest

__all__ = ["sampling_params"]

# As vLLM and llama.cpp have it.
_RANDOM_SEED = -1


def sampling_params(request: SampledRequest, vocabulary_tokens: int) -> SamplingParams:
    """How the engine is to choose the request's tokens.

    Raises:
        InvalidRequestError: a bias for a token that the vocabulary does not have.
    """
    beyond = [token for token in request.logit_bias if token >= vocabulary_tokens]
    if beyond:
        message = f"'logit_bias' should have token ids below {vocabulary_tokens}, but has {beyond[0]}."
        raise InvalidRequestError(message, param="logit_bias")
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),  # others write -1 for off
        min_p=request.min_p,
        seed=None if request.seed == _RANDOM_SEED else request.seed,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=tuple(sorted(request.logit_bias.items())),
        top_logprobs=request.wanted_logprobs,
    )
