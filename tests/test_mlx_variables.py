from __future__ import annotations

from pathlib import Path

from server.mlx_variables import set_mlx_variables


def test_variables_that_the_user_has_set_stay(tmp_path: Path) -> None:
    mine = {"MLX_CUDA_USE_CUDNN_SDPA": "1", "MLX_PTX_CACHE_DIR": "elsewhere"}
    environment = dict(mine)
    set_mlx_variables(tmp_path, environment)
    others = {"MLX_ENABLE_CACHE_THRASHING_CHECK": "0", "MLX_USE_CUDA_GRAPHS": "0"}
    assert environment == {**mine, **others}


def test_attention_is_not_planned_many_shapes_are_no_error_and_kernels_are_kept(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    set_mlx_variables(tmp_path, environment)
    assert environment["MLX_CUDA_USE_CUDNN_SDPA"] == "0"
    assert environment["MLX_ENABLE_CACHE_THRASHING_CHECK"] == "0"
    assert environment["MLX_USE_CUDA_GRAPHS"] == "0"
    assert Path(environment["MLX_PTX_CACHE_DIR"]).is_relative_to(tmp_path / "kernels")
