"""What has nothing around it: generators and decode steps in processes of their own; random models."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load

from benchmarks.adapters import RANK_8_QV, AdapterKind
from benchmarks.cases import mixes
from benchmarks.cases.mixes import Mixes
from benchmarks.library import AdapterLibrary, AdapterSet
from benchmarks.loads import PassageLoad
from benchmarks.models import Shape, write_random_model
from benchmarks.sides import SideContext, SideKind, SideSpec, open_side
from benchmarks.sizes import GPU_SIZES


def context_of(model_path: Path, folder: Path) -> SideContext:
    return SideContext(model_path, AdapterLibrary(model_path, folder / "adapters", 0), folder, 60, 60)


@pytest.fixture(scope="module")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of width 32, with the tokenizer that is made where there is no other."""
    folder = tmp_path_factory.mktemp("models") / "random"
    write_random_model(Shape(32, 2, 64, 4, 2, "float32"), folder, tokenizer_of=None)
    return folder


def test_a_random_model_never_ends_and_reads_every_text(random_path: Path) -> None:
    model, tokenizer, *_ = load(str(random_path))
    chat = [{"role": "user", "content": "Größe?\n"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(tokens) == "<|im_start|>user\nGröße?\n<|im_end|>\n<|im_start|>assistant\n"
    (end,) = tokenizer.eos_token_ids
    logits = model(mx.array([tokens]))[0]
    assert logits.shape == (len(tokens), 49152)
    assert mx.all(logits[:, end] == 0)
    assert mx.all(mx.max(logits, axis=-1) > 0)


async def test_the_loop_and_the_bare_generator_answer_alike(random_path: Path, tmp_path: Path) -> None:
    samples = []
    bare = PassageLoad(SideSpec(SideKind.BARE), 5, (20, 60), (3, 6), every_seconds=0.01)
    for kind in (SideKind.BARE, SideKind.LOOP, SideKind.GRAFT):
        measure = PassageLoad(SideSpec(kind), 5, bare.prompts, bare.answers, every_seconds=0.01)
        assert measure.asked == bare.asked
        async with open_side(measure.side, context_of(random_path, tmp_path)) as side:
            await measure.prepare(side)
            asked = measure.ask(side, 1)
            samples.append(await measure.run(side, 1))
        assert [one.arrives_seconds for one in asked] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
        assert samples[-1].values["completion_tokens"] == (sum(one.max_tokens for one in asked),)
        assert len(samples[-1].values["first_token_seconds"]) == 5
        assert min(samples[-1].values["first_token_seconds"]) > 0
    texts = [sample.texts for sample in samples]
    assert texts[0] == texts[1]
    assert [text.strip() for text in texts[0]] == [text.strip() for text in texts[2]]


async def test_arrivals_by_chance_follow_the_bare_generators_rate(random_path: Path, tmp_path: Path) -> None:
    kinds = (RANK_8_QV, AdapterKind(2, dora=True))
    sets = tuple(AdapterSet(kind, 1) for kind in kinds)
    bare = PassageLoad(SideSpec(SideKind.BARE), 6, (20, 40), (2, 4), percent=50)
    names = tuple(name for each in sets for name in each.ids)
    ours = PassageLoad(SideSpec(SideKind.GRAFT, sets), 6, (20, 40), (2, 4), names, percent=50)
    context = context_of(random_path, tmp_path)
    async with open_side(bare.side, context) as first, open_side(ours.side, context) as second:
        await bare.prepare(first)
        (rate,) = context.capacities.values()
        await ours.prepare(second)
        assert [one.arrives_seconds for one in bare.ask(first, 1)] == [
            one.arrives_seconds for one in ours.ask(second, 1)
        ]
        asked = ours.ask(second, 1)
        assert [one.adapter for one in asked] == [None, *names, None, *names]
        arrivals = [one.arrives_seconds for one in ours.ask(second, 2)]
        context.capacities.update(dict.fromkeys(context.capacities, 2 * rate))
        assert [one.arrives_seconds for one in ours.ask(second, 2)] == pytest.approx(
            [one / 2 for one in arrivals]
        )
        sample = await ours.run(second, 1)
    assert len(sample.texts) == 6


async def test_decode_steps_of_mixes(random_path: Path, tmp_path: Path) -> None:
    sets = (AdapterSet(RANK_8_QV, 2), AdapterSet(AdapterKind(2, dora=True), 1))
    names = tuple(name for each in sets for name in each.ids)
    of_each = (("base", (None,)), ("mixed", (*names, None)))
    measure = Mixes(SideSpec(SideKind.DECODING, sets), 4, 2, of_each)
    async with open_side(measure.side, context_of(random_path, tmp_path)) as side:
        await measure.prepare(side)
        sample = await measure.run(side, 1)
    assert {mix: len(values) for mix, values in sample.values.items()} == {"base": 3, "mixed": 3}
    assert all(value > 0 for values in sample.values.values() for value in values)


def test_mixes_are_of_what_they_are_named_after() -> None:
    many, _, alone = mixes.case(GPU_SIZES).measures
    assert isinstance(many, Mixes)
    assert isinstance(alone, Mixes)
    kinds = {mix: {name and name.rpartition("-")[0] for name in names} for mix, names in many.mixes}
    assert kinds["one layout"] == {"rank16-all"}
    assert kinds["three ranks"] == {"rank8-all", "rank16-all", "rank32-all"}
    assert len(kinds["nine layouts"]) == 9
    assert kinds["LoRA with DoRA"] == {"rank16-all", "dora16-all"}
    assert kinds["with base rows"] == {"rank16-all", None}
    assert all(len(set(names)) == 32 for mix, names in many.mixes if mix in list(kinds)[1:5])
    assert dict(alone.mixes) == {"base": (None,), "LoRA": ("rank16-all-0",), "DoRA": ("dora16-all-0",)}
