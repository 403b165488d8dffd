"""What fusing keeps of an adapter, on bases of several widths and with each precision.

    python -m benchmarks.fusing [MODEL] [--adapters DIR…] [--bases bf16 8 6 4 3] [--json FILE] [--page FILE]

MODEL is a folder in MLX's format, by default the demo's model; it is quantised in memory by mlx-lm's
`quantize_model`. The reports are those of the server: the same layers, prompts and measures. Outputs are
computed in float32 with the very weights that bfloat16 and quantised ones stand for, since their own products
are many times slower on a CPU: what shows is what became of the weights. Main thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from server.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402 (MLX may be imported only after the BLAS)
import mlx.nn as nn  # noqa: E402
from mlx_lm.utils import load_model, load_tokenizer, quantize_model  # noqa: E402

from adapters_core.container import AdapterContainer  # noqa: E402
from adapters_core.fusing.activations import ActivationReport, compare_activations  # noqa: E402
from adapters_core.fusing.fusion import AUTO_THRESHOLD, Precision, fuse_layers  # noqa: E402
from adapters_core.fusing.sums import summed_layers  # noqa: E402
from adapters_core.layers.builders import dense_like  # noqa: E402
from adapters_core.layers.modules import dense_weight, is_quantized  # noqa: E402
from adapters_core.layers.surgery import replace_modules  # noqa: E402
from adapters_core.layers.targets import is_wrapper, named_modules  # noqa: E402
from benchmarks.fusing_report import (  # noqa: E402
    FusingReport,
    FusingResult,
    conditions_block,
    merged_report,
    per_adapter_block,
    precisions_block,
    read_fusing_report,
)
from benchmarks.page import fill_blocks  # noqa: E402
from server.adapters.bare import bare_copy  # noqa: E402
from server.adapters.fusing.probes import probe_rows  # noqa: E402
from server.cache_dir import default_cache_dir  # noqa: E402
from server.demo.model import MODEL_NAME, demo_model  # noqa: E402
from server.environment import describe_environment  # noqa: E402

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "fusing.md"
_ADAPTERS = _PAGE.parents[1] / "config" / "demo" / "adapters"
_BASES = ("bf16", "8", "6", "4", "3")
_GROUP_SIZE = 64
_CONTEXT_TOKENS = 2048


def main() -> None:
    """Run the command line."""
    options = _arguments()
    if options.reports:
        write_page(
            options.page or _PAGE, merged_report([read_fusing_report(file) for file in options.reports])
        )
        return
    started, created = time.perf_counter(), datetime.now(UTC)
    environment = describe_environment()
    folder = options.model or demo_model("float32", default_cache_dir(), print)
    rows = probe_rows(load_tokenizer(folder), _CONTEXT_TOKENS)
    results: list[FusingResult] = []
    for base in options.bases:
        model = base_model(folder, base)
        for adapter in options.adapters:
            for result in fused_results(model, base, adapter, rows, options.threshold):
                results.append(result)
                print(_line(result), flush=True)
    report = FusingReport(
        created=created,
        model=MODEL_NAME if options.model is None else folder.name,
        environment={
            "device": environment.device,
            "processor": environment.processor,
            "cores": str(environment.cores),
            "mlx": environment.packages["mlx"],
            "mlx-lm": environment.packages["mlx-lm"],
        },
        options={
            "adapters": ", ".join(sorted(adapter.name for adapter in options.adapters)),
            "threshold of auto": str(options.threshold),
            "quantised": f"affine, groups of {_GROUP_SIZE}, float32 scales",
            "prompts": f"{len(rows)}, with {sum(map(len, rows))} tokens",
        },
        results=results,
        seconds=time.perf_counter() - started,
    )
    if options.json is not None:
        options.json.write_text(report.model_dump_json(indent=2) + "\n")
    if options.page is not None:
        write_page(options.page, report)


def _line(result: FusingResult) -> str:
    return (
        f"{result.base:>8} {result.adapter:>12} {result.precision:>10}: delta {result.delta_error_mean:.4f} "
        f"outputs {result.output_error_mean:.4f} same token {result.agreement:.3f} {result.forms}"
    )


def base_model(folder: Path, base: str) -> Any:
    """The model with bfloat16 weights, or with float32 ones quantised to so many bits."""
    model, config = load_model(folder)
    model.set_dtype(mx.bfloat16 if base == "bf16" else mx.float32)
    if base != "bf16":
        model, _ = quantize_model(model, config, _GROUP_SIZE, int(base))
    model.eval()
    mx.eval(model.parameters())
    return model


def fused_results(
    model: Any, base: str, adapter: Path, rows: Sequence[Sequence[int]], threshold: float
) -> Iterator[FusingResult]:
    """Fuse one adapter with each precision; `model` stays as it is."""
    terms = [(AdapterContainer.from_directory(adapter), 1.0)]
    layers = summed_layers(model, terms)
    bases = {path: layer.reverted() for path, layer in layers.items()}
    dense = in_float32(model)
    adapted = summed_layers(dense, terms)
    merged: ActivationReport | None = None
    for precision in get_args(Precision):
        modules, report = fuse_layers(layers, precision, adapter.name, threshold=threshold)
        plain = {
            path: adapted[path] if is_wrapper(module) else as_dense(module)
            for path, module in modules.items()
        }
        # On a dense base, all that merges is the same.
        is_dense = set(report.precision) == {"dense"} and not any(map(is_quantized, bases.values()))
        activations = merged if is_dense else None
        if activations is None:
            activations = compare_activations(dense, adapted, plain, rows)
        merged = activations if is_dense else merged
        yield FusingResult(
            base="bfloat16" if base == "bf16" else f"{base} bits",
            precision=precision,
            adapter=adapter.name,
            modules=report.modules,
            forms=report.precision,
            delta_error_mean=report.error_mean,
            delta_error_worst=report.error_worst,
            output_error_mean=activations.error_mean,
            output_error_worst=activations.error_worst,
            tokens=activations.tokens,
            agreement=activations.agreement,
            kl_mean=activations.kl_mean,
            kl_max=activations.kl_max,
            bytes_before=report.bytes_before,
            bytes_after=report.bytes_after,
        )


def in_float32(model: Any) -> Any:
    """A copy of the module tree with dense modules for quantised ones, and the same weights in float32."""
    copy = bare_copy(model)
    replace_modules(
        copy, {path: as_dense(module) for path, module in named_modules(copy) if is_quantized(module)}
    )
    copy.set_dtype(mx.float32)
    mx.eval(copy.parameters())
    return copy


def as_dense(module: nn.Module) -> nn.Module:
    """A dense module with the very weights of `module`, or those that they stand for, in float32."""
    dense = dense_like(module, dense_weight(module))
    dense.set_dtype(mx.float32)
    mx.eval(dense.parameters())
    return dense


def write_page(page: Path, report: FusingReport) -> None:
    """Put the tables between the markers of a page. Raises: PageError if it has none."""
    blocks: Mapping[str, str] = {
        "fusing-precisions": precisions_block(report),
        "fusing-adapters": per_adapter_block(report, "4 bits"),
        "fusing-conditions": conditions_block(report),
    }
    page.write_text(fill_blocks(page.read_text(), blocks))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusing", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a folder in MLX's format")
    parser.add_argument("--adapters", nargs="+", type=Path, metavar="DIR", help="the demo's by default")
    parser.add_argument("--bases", nargs="+", choices=_BASES, default=list(_BASES))
    parser.add_argument("--threshold", type=float, default=AUTO_THRESHOLD)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument(
        "--reports", nargs="+", type=Path, metavar="FILE", help="measure nothing, fill the page from these"
    )
    parser.add_argument("--page", type=Path, nargs="?", const=_PAGE, help="fill the tables of this page")
    options = parser.parse_args()
    if options.adapters is None:
        options.adapters = sorted(path for path in _ADAPTERS.iterdir() if path.is_dir())
    return options


if __name__ == "__main__":
    main()
