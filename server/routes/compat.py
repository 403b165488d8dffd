"""vLLM's names for loading and unloading adapters, with vLLM's answers. Runs on the event loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import Field

from adapters_core.errors import InvalidAdapterError
from server.adapters.errors import AdapterExistsError, AdapterNotFoundError, InvalidAdapterIdError
from server.errors import ApiError
from server.json_body import JsonRoute
from server.resources import is_exhaustion
from server.routes.bodies import Body, Scale
from server.routes.dependencies import Adapters, options_in_body

__all__ = ["router"]

router = APIRouter(
    prefix="/v1", tags=["vLLM"], route_class=JsonRoute, dependencies=[Depends(options_in_body)]
)

Text = Annotated[str, Field(max_length=4096, strict=True)]


class LoadLoraBody(Body):
    """What vLLM asks for; a field that is missing gets vLLM's own answer."""

    lora_name: Text = ""
    lora_path: Text = ""
    load_inplace: bool = False
    pinned: bool | None = None
    """SGLang's: keep it loaded when memory is needed."""
    base_model_name: Text | None = None
    """A label in vLLM; here there is one base."""
    scale: Scale | None = None
    """Nobody else's: as `POST /v1/adapters` has it."""


class UnloadLoraBody(Body):
    """What vLLM asks for; a field that is missing gets vLLM's own answer."""

    lora_name: Text = ""
    lora_int_id: int | None = None
    """vLLM's own number of it, which it does not read either."""


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadLoraBody, service: Adapters) -> PlainTextResponse:
    """Load an adapter from a folder under the adapters root."""
    if not body.lora_name or not body.lora_path:
        raise _invalid("Both 'lora_name' and 'lora_path' must be provided.")
    with _vllm_errors(body.lora_name):
        await service.load(
            body.lora_name,
            body.lora_path,
            scale=body.scale,
            pinned=body.pinned,
            replace=body.load_inplace,
        )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadLoraBody, service: Adapters) -> PlainTextResponse:
    """Unload an adapter once the requests that use it have finished."""
    if not body.lora_name:
        raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await service.unload(body.lora_name)
    except AdapterNotFoundError as error:
        raise _not_found(f"The lora adapter '{body.lora_name}' cannot be found.") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@contextmanager
def _vllm_errors(name: str) -> Iterator[None]:
    try:
        yield
    except AdapterExistsError as error:
        raise _invalid(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        ) from error
    except AdapterNotFoundError as error:
        raise _not_found(str(error)) from error
    except InvalidAdapterIdError as error:
        raise _invalid(str(error)) from error
    except InvalidAdapterError as error:
        if is_exhaustion(error):
            raise
        raise _invalid(str(error), error.details) from error


def _invalid(message: str, details: list[str] | None = None) -> ApiError:
    return ApiError(400, message, type="InvalidUserInput", details=details)


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, type="NotFoundError")
