# SPDX-License-Identifier: Apache-2.0
"""Denoisers that two processes compute together (gloo): what is negated equals one process, or is refused by
name, whichever comes first. diffusers offers neither kind of parallelism without an accelerator, so its two
questions about one are answered here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("diffusers")

import joint_pipelines
import pipelines
from diffusers import ContextParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models._modeling_parallel import TensorParallelConfig
from diffusers.models.attention_processor import Attention
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastnegate as fn
from fastnegate import Policy, Rule
from fastnegate.integrations.diffusers.contract import denoiser
from fastnegate.integrations.diffusers.edits import safree

PATIENCE = 120.0  # seconds until processes count as stuck
# Random models hardly look at their text, so everything is stronger than published.
STRONG = Rule.preset("nag", strength=10.0, norm_limit=5.0, blend=1.0)
BY_HEAD = Rule.preset("nag", strength=10.0, norm_limit=5.0, blend=1.0, scope="head")
DOG = Policy({"dog": 1.0})

Deal = Callable[[nn.Module], object]


def context(**options: Any) -> Deal:
    return lambda model: model.enable_parallelism(config=ContextParallelConfig(**options))


def tensor(model: nn.Module) -> None:
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))


def heads(model: nn.Module) -> None:
    """Of models for which diffusers has no plan: as one would by hand."""
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {"to_q": columns, "to_k": columns, "to_v": columns, "to_out.0": rows}
    for module in model.modules():
        if isinstance(module, Attention):
            parallelize_module(module, init_device_mesh("cpu", (2,)), plan)
            module.heads //= 2


def fsdp(model: nn.Module) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


class Case(NamedTuple):
    """A model, how it is dealt out, and a rule.

    Attributes:
        refused: by which words, else it has to equal one process.
        near: how far, relative to the largest output, it may be: sums of parts are rounded in another order.
    """

    kind: str
    deal: Deal
    rule: Rule
    refused: str | None = None
    near: float = 0.0


ULYSSES = context(ulysses_degree=2)
CASES = {
    "Wan, Ulysses": Case("wan", ULYSSES, STRONG),
    "Wan, Ulysses with any lengths": Case("wan", context(ulysses_degree=2, ulysses_anything=True), STRONG),
    "Wan, ring": Case("wan", context(ring_degree=2), STRONG, "ring_degree"),
    "Wan, FSDP": Case("wan", fsdp, STRONG),
    "LTX, Ulysses": Case("ltx", ULYSSES, STRONG, "context parallelism"),
    "SDXL, heads": Case("sdxl", heads, BY_HEAD, near=5e-6),
    "SDXL, heads, a rule over all": Case("sdxl", heads, STRONG, "scope='feature'"),
    "FLUX, tensor": Case("flux", tensor, BY_HEAD, near=5e-6),
    "FLUX, tensor, a rule over all heads": Case("flux", tensor, STRONG, "scope='feature'"),
    "FLUX, Ulysses": Case("flux", ULYSSES, BY_HEAD, "context parallelism"),
    "Qwen-Image, tensor": Case("qwen", tensor, BY_HEAD, near=5e-6),
}  # fmt: skip
ORDERS = ("dealt out, then installed", "installed, then dealt out")
RUNS = [
    (name, order)
    for name, case in CASES.items()
    for order in ORDERS[: 1 if case.deal is fsdp else 2]  # it may undo what `install` put around it
]


def build(kind: str) -> Any:
    return (joint_pipelines if kind in joint_pipelines.JOINT else pipelines).build(kind)


def bank_of(pipe: Any) -> fn.ConceptBank:
    return fn.ConceptBank.from_prompts(pipe, {"dog": "dog"}, templates=["{}"])


def generate(pipe: Any, engine: fn.Engine, *policies: Policy | None) -> Tensor:
    """Latents of as many prompts."""
    prompts = ["a cat", "a photo"][: len(policies)]
    with engine.batch(policies):
        if type(pipe).__name__ in ("FluxPipeline", "QwenImagePipeline"):
            return joint_pipelines.generate(pipe, prompts, range(len(prompts)), num_inference_steps=1)
        return pipelines.generate(pipe, prompts, steps=1, guidance=2.0)


@functools.cache
def alone(kind: str, rule: Rule) -> tuple[Tensor, Tensor]:
    """What one process makes: of two prompts the first is negated, and none."""
    pipe = build(kind)
    engine = fn.install(pipe, bank_of(pipe), rule=rule)
    return generate(pipe, engine, DOG, None), generate(pipe, engine, None, None)


def outcome(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def together(case: Case, order: str) -> Any:
    """What a process makes with the other: the same two."""
    pipe = build(case.kind)
    bank = bank_of(pipe)
    if order == ORDERS[0]:
        case.deal(denoiser(pipe))
    engine = fn.install(pipe, bank, rule=case.rule)
    if order == ORDERS[1]:
        case.deal(denoiser(pipe))
    return generate(pipe, engine, DOG, None), generate(pipe, engine, None, None)


def disagreements(rank: int) -> dict[str, Any]:
    """Two processes that are told unlike things, and what sees one process's part alone."""
    pipe = build("wan")
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    ULYSSES(denoiser(pipe))
    told = {
        "policies": (DOG, Policy({"dog": 0.5})),
        "one is told nothing": (DOG, None),
        "windows": (DOG, Policy({"dog": 1.0}, stop=0.5)),
        "negative prompts": (Policy(negative_prompt="a dog"), Policy(negative_prompt="a cat")),
    }
    made = {name: outcome(lambda: generate(pipe, engine, told[name][rank])) for name in told}  # noqa: B023
    with fn.audit(pipe):
        made["audit"] = outcome(lambda: generate(pipe, engine, DOG))
    if rank:
        engine.bank.update("dog", fn.ConceptBank.from_prompts(pipe, {"dog": "cat"}, templates=["{}"])["dog"])
    made["banks"] = outcome(lambda: generate(pipe, engine, DOG))
    return made


def strangers() -> dict[str, str]:
    """What knows nothing of other processes, put on before and after the heads were dealt out."""
    made, pipe = {}, build("sd15")
    processor = fn.NegationAttnProcessor(bank_of(pipe), "protore", conditional="all")
    pipe.unet.set_attn_processor(processor)
    heads(pipe.unet)
    made["by hand, before"] = outcome(lambda: pipelines.generate(pipe, steps=1))
    fn.remove(pipe)
    made["by hand, after"] = outcome(lambda: pipe.unet.set_attn_processor(processor))
    made["an edit"] = outcome(lambda: safree(pipe, "dog"))
    return made


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    with (
        mock.patch.object(torch.accelerator, "device_count", lambda: 2),
        mock.patch.object(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",)),
    ):
        made: dict[Any, Any] = {
            (name, order): outcome(lambda: together(CASES[name], order))  # noqa: B023
            for name, order in RUNS
        }
        made |= disagreements(rank) | strangers()
    torch.save(made, folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """By each of two processes. They begin as copies of this one: to import everything again would take
    longer than all that they do."""
    folder, context = tmp_path_factory.mktemp("processes"), get_context("fork")
    processes = [context.Process(target=process, args=(rank, folder)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(PATIENCE)
        each.kill()
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("name", "order"), RUNS)
def test_two_processes(name: str, order: str, made: list[dict[Any, Any]]) -> None:
    case = CASES[name]
    for here in (each[name, order] for each in made):
        if case.refused is not None:
            assert isinstance(here, str) and here.startswith("UnsupportedModelError"), here
            assert case.refused in here
            continue
        assert not isinstance(here, str), here
        (wanted, untouched), (negated, plain) = alone(case.kind, case.rule), here
        assert (negated - wanted).abs().max() <= case.near * wanted.abs().max()
        assert (plain - untouched).abs().max() <= case.near * untouched.abs().max()
        assert (wanted[0] - untouched[0]).abs().max() > 1e-3


@pytest.mark.parametrize("what", ["policies", "one is told nothing", "windows", "negative prompts", "banks"])
def test_processes_that_are_told_unlike_things_all_stop(what: str, made: list[dict[Any, Any]]) -> None:
    for here in (each[what] for each in made):
        assert isinstance(here, str)
        assert here.startswith("NegationNotAppliedError: the processes that compute this denoiser together")


@pytest.mark.parametrize("what", ["audit", "by hand, before", "by hand, after", "an edit"])
def test_what_knows_nothing_of_other_processes_is_refused(what: str, made: list[dict[Any, Any]]) -> None:
    for here in (each[what] for each in made):
        assert isinstance(here, str) and here.startswith("UnsupportedModelError"), here
        assert "several processes compute it together" in here
