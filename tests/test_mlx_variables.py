from __future__ import annotations

from server.mlx_variables import set_mlx_variables


def test_variables_that_the_user_has_set_stay() -> None:
    environment = {"MLX_CUDA_USE_CUDNN_SDPA": "1"}
    set_mlx_variables(environment)
    assert environment == {"MLX_CUDA_USE_CUDNN_SDPA": "1", "MLX_ENABLE_CACHE_THRASHING_CHECK": "0"}


def test_attention_is_not_planned_and_many_shapes_are_no_error() -> None:
    environment: dict[str, str] = {}
    set_mlx_variables(environment)
    assert environment == {"MLX_CUDA_USE_CUDNN_SDPA": "0", "MLX_ENABLE_CACHE_THRASHING_CHECK": "0"}
