# SPDX-License-Identifier: Apache-2.0
"""`NegationAttnProcessor` against diffusers' own processors, over the options of their contract."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import eps, pairwise
from torch import Tensor, nn

import fastnegate as fn

pytest.importorskip("diffusers")

import diffusers
import pipelines
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from pipelines import one_thread  # noqa: F401

from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.concepts import Concept, Fingerprint
from fastnegate.engine.engine import Engine
from fastnegate.engine.errors import NegationNotAppliedError
from fastnegate.engine.session.call import Call, Running
from fastnegate.engine.session.rows import Step
from fastnegate.integrations.diffusers.processor import NegationAttnProcessor
from fastnegate.operator.backends import cpu

BATCH = 2
WIDTH, TEXT, LATENT = 32, 16, 4  # channels: of the image (spatial norm has 32 groups), the text, `temb`
SIDE = 6  # images are SIDE x SIDE
NOTHING = fn.Rule.preset("nasa", strength=0.0)  # O = Z exactly, through the operator

GRID = list(
    pairwise(
        {
            "heads": [(1, 8), (2, 40), (3, 72), (2, 160), (2, 12)],  # 12: not for the fused CPU kernel
            "keys": [1, 7, 77, 120, 300],
            "mask": [None, "padding", "additive", "everything"],
            "image": ["tokens", "one token", "4d"],
            "cross_attention_norm": [None, "layer_norm", "group_norm"],
            "qk_norm": [None, "layer_norm", "fp32_layer_norm", "rms_norm", "l2"],
            "norm_num_groups": [None, 4],
            "spatial_norm": [False, True],
            "residual_connection": [False, True],
            "rescale_output_factor": [1.0, 2.5],
            "bias": [False, True],
            "out_bias": [False, True],
            "out_dim": [False, True],
            "dropout": [False, True],
            "inner": ["2_0", "plain", "unscaled"],
        }
    )
)


class Case:
    """One attention layer with random weights, its inputs, and the processor that is wrapped."""

    def __init__(self, options: dict[str, Any]) -> None:
        given = dict(options)
        heads, dim_head = given.pop("heads")
        keys, mask, image = given.pop("keys"), given.pop("mask"), given.pop("image")
        spatial, module, inner = given.pop("spatial_norm"), given.pop("dropout"), given.pop("inner")
        wide = given.pop("out_dim") and image != "4d" and not given["residual_connection"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attn = Attention(
                query_dim=WIDTH,
                cross_attention_dim=TEXT,
                heads=heads,
                dim_head=dim_head,
                out_dim=heads * dim_head if wide else None,
                cross_attention_norm_num_groups=4,
                spatial_norm_dim=LATENT if spatial and image == "4d" else None,
                scale_qk=inner != "unscaled",
                **given,
            ).eval()
            for parameter in self.attn.parameters():
                nn.init.normal_(parameter, std=0.3)
            shapes = {"tokens": (SIDE * SIDE, WIDTH), "one token": (1, WIDTH), "4d": (WIDTH, SIDE, SIDE)}
            self.image = torch.randn(BATCH, *shapes[image])
            self.text = torch.randn(BATCH, keys, TEXT)
            self.temb = torch.randn(BATCH, LATENT, SIDE, SIDE)
            self.mask = self._mask(mask, keys)
        if module:
            self.attn.to_out[1] = nn.Tanh()  # whatever sits in the place of dropout is called
        self.inner = AttnProcessor2_0() if inner == "2_0" else AttnProcessor()

    @staticmethod
    def _mask(kind: str | None, keys: int) -> Tensor | None:
        """[B, 1, keys], added to the logits."""
        if kind is None:
            return None
        if kind == "additive":
            return torch.randn(BATCH, 1, keys)
        kept = torch.tensor([max(keys // 2, 1), keys])  # of each row
        if kind == "everything":
            kept[1] = 0
        return torch.where(torch.arange(keys) < kept[:, None], 0.0, -10000.0)[:, None]

    def run(self, processor: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        attn = copy.deepcopy(self.attn).to(dtype)
        image, text, temb, mask = (
            None if t is None else t.to(dtype) for t in (self.image, self.text, self.temb, self.mask)
        )
        with torch.no_grad():
            return processor(attn, image, text, mask, temb)


def bank(*concepts: str) -> ConceptBank:
    """Concepts [3, TEXT] of no particular text encoder."""
    generator = torch.Generator().manual_seed(1)
    made = {c: Concept.from_embeddings(torch.randn(3, TEXT, generator=generator)) for c in concepts or ("c",)}
    return ConceptBank(made, Fingerprint({}, torch.zeros(1)))


def identify(options: Any) -> str:
    return "-".join(str(v) for v in options.values()) if isinstance(options, dict) else str(options)


@pytest.fixture(params=GRID, ids=identify)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def prepared(
    engine: Engine, progress: float | None = None, keep: bool = False
) -> AbstractContextManager[Running]:
    """A denoiser call of BATCH rows."""
    step = None if progress is None else Step(round(progress * 100), 100)
    return engine.running(Call(BATCH, torch.device("cpu"), lambda: False, step=step, keep=keep))


def sleeping(inner: Any) -> Iterator[NegationAttnProcessor]:
    """Processors without a live entry: not told of concepts, no policy, outside the window."""
    yield NegationAttnProcessor(inner=inner)
    engine = Engine(bank(), NOTHING, ["layer"])
    yield NegationAttnProcessor.bound(engine, "layer", inner)
    engine.set_rows([fn.Policy({"c": 1.0}, start=0.5)] * BATCH)
    with prepared(engine, 0.25):
        yield NegationAttnProcessor.bound(engine, "layer", inner)


def test_without_a_live_entry_the_wrapped_processor_runs(case: Case) -> None:
    expected = case.run(case.inner)
    for processor in sleeping(case.inner):
        assert torch.equal(case.run(processor), expected)


def test_self_attention_is_left_to_the_wrapped_processor() -> None:
    case = Case({**GRID[0], "inner": "2_0", "mask": None})
    case.attn = Attention(query_dim=WIDTH, heads=2, dim_head=8)
    case.image, case.text = torch.randn(BATCH, 9, WIDTH), None
    processor = NegationAttnProcessor(bank(), conditional="all")
    assert torch.equal(case.run(processor), case.run(AttnProcessor2_0()))


def test_own_path_is_the_wrapped_processor_within_rounding(case: Case) -> None:
    """Truth is the wrapped processor in float64; our float32 may err twice as much as its own."""
    truth = case.run(case.inner, torch.float64)
    magnitude = truth.abs().max()
    mine = NegationAttnProcessor(bank(), NOTHING, conditional="all", inner=case.inner)
    with mock.patch.object(case.inner.__class__, "__call__", side_effect=AssertionError("must not run")):
        actual = case.run(mine)
    assert actual.dtype == torch.float32 and actual.shape == truth.shape
    error, allowed = ((x - truth).abs().max() / magnitude for x in (actual, case.run(case.inner)))
    assert error <= 2 * allowed + 2 * eps(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_own_path_in_half_precision(dtype: torch.dtype) -> None:
    case = Case({**GRID[0], "heads": (2, 40), "keys": 77, "mask": "padding", "qk_norm": None, "inner": "2_0"})
    truth = case.run(case.inner, torch.float64)
    magnitude = truth.abs().max()
    actual = case.run(NegationAttnProcessor(bank(), NOTHING, conditional="all"), dtype)
    assert actual.dtype == dtype
    error, allowed = ((x - truth).abs().max() / magnitude for x in (actual, case.run(case.inner, dtype)))
    assert error <= 2 * allowed + 2 * eps(dtype)


def test_bound_and_made_by_hand_agree() -> None:
    """An engine's processor and one made from the bank give the same bits."""
    case = Case({**GRID[0], "keys": 9, "cross_attention_norm": "layer_norm", "qk_norm": "l2", "mask": None})
    concepts = bank("x", "y")
    rule = fn.Rule.preset("ong")
    engine = Engine(concepts, rule, ["layer"])
    engine.set_rows([None, fn.Policy({"x": 0.5, "y": 1.0})])
    by_hand = NegationAttnProcessor(
        concepts, rule, strengths={"x": 0.5, "y": 1.0}, conditional=[False, True], inner=case.inner
    )
    with prepared(engine):
        bound = case.run(NegationAttnProcessor.bound(engine, "layer", case.inner))
    assert torch.equal(bound, case.run(by_hand))
    plain = case.run(NegationAttnProcessor(concepts, NOTHING, conditional="all", inner=case.inner))
    assert torch.equal(bound[0], plain[0]) and not torch.allclose(bound[1], plain[1])


# The conventions of diffusers.


def test_made_without_arguments_it_is_a_plain_processor() -> None:
    case = Case(GRID[0])
    again = type(NegationAttnProcessor(bank()))()  # as load_ip_adapter does
    assert torch.equal(case.run(again), case.run(AttnProcessor2_0()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("kind", ["empty", "by hand", "bound"])
def test_copies_work(kind: str, copied: Any) -> None:
    case = Case({**GRID[0], "heads": (2, 40), "inner": "2_0"})
    if kind == "bound":
        processor = NegationAttnProcessor.bound(Engine(bank(), NOTHING, ["layer"]), "layer", case.inner)
    else:
        made_with = (bank(), "ong") if kind == "by hand" else ()
        processor = NegationAttnProcessor(*made_with, conditional="all")
    again = copied(processor)
    assert again is not processor
    assert torch.equal(case.run(again), case.run(processor))
    if kind == "bound":  # a copy of an installed processor is what it wraps
        assert type(again) is AttnProcessor2_0
    if kind == "by hand":
        again.bank.update("c", torch.ones(3, TEXT))
        assert not torch.equal(case.run(again), case.run(processor))


def test_diffusers_knows_the_class() -> None:
    mine, plain = (AttentionProcessorRegistry.get(c) for c in (NegationAttnProcessor, AttnProcessor2_0))
    assert mine is plain
    unet = pipelines.build("sd15").unet
    unet.set_attn_processor(NegationAttnProcessor(bank()))
    unet.set_default_attn_processor()
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor}


def test_keyword_arguments_pass_as_to_the_wrapped_class() -> None:
    """`Attention.forward` goes by the names of parameters and warns of those it does not find."""
    mine, known = (inspect.signature(c.__call__) for c in (NegationAttnProcessor, AttnProcessor2_0))
    assert list(mine.parameters) == list(known.parameters)
    case = Case({**GRID[0], "image": "4d", "spatial_norm": True, "inner": "2_0"})
    expected = case.run(case.inner)
    for processor in (NegationAttnProcessor(), NegationAttnProcessor(bank(), NOTHING, conditional="all")):
        case.attn.set_processor(processor)
        with mock.patch.object(attention_processor.logger, "warning") as warning, torch.no_grad():
            actual = case.attn(case.image, case.text, case.mask, temb=case.temb)
            assert not warning.called
            case.attn(case.image, case.text, case.mask, temb=case.temb, nonsense=1)
            assert warning.called
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "name",
    [
        "SlicedAttnProcessor",
        "FusedAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "NegationAttnProcessor",
    ],
)
def test_other_processors_are_refused_by_name(name: str) -> None:
    arguments = {"SlicedAttnProcessor": (1,), "IPAdapterXFormersAttnProcessor": (WIDTH, TEXT)}.get(name, ())
    inner = getattr(attention_processor, name, NegationAttnProcessor)(*arguments)
    with pytest.raises(fn.UnsupportedModelError, match=f"{name}.*AttnProcessor2_0, AttnProcessor"):
        NegationAttnProcessor(bank(), inner=inner)
    pipe = pipelines.build("sd15")
    next(iter(pipelines.attentions(pipe).values())).set_processor(inner)
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(fn.UnsupportedModelError, match=name):
        fn.install(pipe, ConceptBank.from_prompts(pipe, {"dog": "dog"}))
    assert pipe.unet.attn_processors == before and type(pipe.unet) is diffusers.UNet2DConditionModel


def test_a_subclass_may_do_anything_and_is_refused() -> None:
    class Mine(AttnProcessor2_0):
        pass

    with pytest.raises(fn.UnsupportedModelError, match="Mine"):
        NegationAttnProcessor(bank(), inner=Mine())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditional": "some"}, "conditional='some'"),
        ({"strengths": {"x": 1.0}}, "concept 'x': the bank has c"),
        ({"strengths": {"c": -1.0}}, "strength.*c.*-1"),
        ({"strengths": {"c": float("nan")}}, "strength.*c.*nan"),
        ({"rule": "magic"}, "rule='magic'"),
        ({"rule": "casteer"}, "direction"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NegationAttnProcessor(bank(), **arguments)


def test_rows_must_be_known() -> None:
    case = Case({**GRID[0], "inner": "2_0"})
    with pytest.raises(ValueError, match="conditional has 3 rows, the batch has 2"):
        case.run(NegationAttnProcessor(bank(), conditional=[True] * 3))
    with pytest.raises(NegationNotAppliedError, match="conditional="):
        case.run(NegationAttnProcessor(bank()))


def test_few_calls_of_python_lead_from_a_layer_to_the_kernel() -> None:
    """Of our own: what torch's modules do on the way is the wrapped processor's, too."""
    if cpu.unavailable() is not None:
        pytest.skip("the CPU kernels are not part of this install")
    case = Case({**GRID[0], "heads": (2, 40), "mask": None, "inner": "2_0", "qk_norm": None})
    engine = Engine(bank(), NOTHING, ["layer"])
    engine.set_rows([fn.Policy({"c": 1.0})] * BATCH)
    processor = NegationAttnProcessor.bound(engine, "layer", case.inner, "cpu")
    ours: list[str] = []

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(Path(fn.__file__).parent)):
            ours.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    with torch.no_grad(), prepared(engine, keep=True):
        for _ in range(2):  # the second time everything is planned
            ours.clear()
            sys.setprofile(note)
            try:
                processor(case.attn, case.image, case.text)
            finally:
                sys.setprofile(None)
    assert ours[0] == "processor.__call__" and ours.count("cpu.run") == 1
    assert len(ours) <= 12, " ".join(ours)
