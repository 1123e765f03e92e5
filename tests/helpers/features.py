# SPDX-License-Identifier: Apache-2.0
"""Features of diffusers and of what it is used with: how each is switched on and off, and the same thing
written out without its machinery. Families and features are rows of two tables."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate
import diffusers
import joint_pipelines
import pipelines
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fastnegate.integrations.diffusers.contract import denoisers

CPU = torch.device("cpu")
STEPS = 4
Off = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Family:
    """A column of the matrix.

    Attributes:
        name: its title.
        kind: of `pipelines.build`, or of `joint_pipelines.build`.
        call: what its pipeline is called with besides.
        calls: of the denoiser at a step; the first is the conditional one.
        default: whether it is the family that its mechanism is tested with by default.
        fails: features with which diffusers itself fails.
    """

    name: str
    kind: str
    call: dict[str, Any] = field(default_factory=dict)
    calls: int = 1
    default: bool = False
    fails: tuple[str, ...] = ()

    def build(self) -> Any:
        return (joint_pipelines if self.kind in joint_pipelines.JOINT else pipelines).build(self.kind)

    def generate(self, pipe: Any, prompts: list[str], steps: int, **options: Any) -> Tensor:
        """Latents, one per prompt."""
        options = {**self.call, **options}
        if self.kind in joint_pipelines.JOINT:
            return joint_pipelines.generate(
                pipe, prompts, range(len(prompts)), num_inference_steps=steps, **options
            )
        return pipelines.generate(pipe, prompts, steps=steps, **options)


@dataclass(frozen=True, eq=False)
class Feature:
    """A row of the matrix.

    Attributes:
        name: its title.
        on: switches it on in a pipeline; returns what switches it off, None where that cannot be done.
        literal: does the same to a pipeline without the machinery.
        offered: whether diffusers has it for a pipeline.
        call: what a pipeline is called with while it is on.
        exact: whether switching it off restores the last bit.
        near: how far, relative to the largest output, the literal may be.
        refused: in whose name it is for a pipeline, None if it is right.
        needs: a package.
    """

    name: str
    on: Callable[[Any], Off | None]
    literal: Callable[[Any], object] = lambda pipe: None
    offered: Callable[[Any], bool] = lambda pipe: True
    call: Callable[[Any], dict[str, Any]] = lambda pipe: {}
    exact: bool = True
    near: float = 5e-6
    refused: Callable[[Any], str | None] = lambda pipe: None
    needs: str | None = None


FAMILIES = (
    Family("FLUX.1", "flux", {"max_sequence_length": 64}, default=True),
    Family("FLUX.2", "klein", fails=("First-Block cache", "MagCache")),
    Family("Qwen-Image", "qwen"),
    Family("Z-Image", "zimage"),
    Family("SD 3.5", "sd3", fails=("`fuse_qkv_projections`",)),
    Family("Wan", "wan", {"guidance": 2.0}, calls=2, default=True),
    Family("SDXL", "sdxl", default=True),
    Family("SD 1.5", "sd15"),
    Family("PixArt", "pixart_alpha"),
    Family("LTX", "ltx"),
    Family("Sana", "sana"),
)


def models(pipe: Any) -> list[nn.Module]:
    return list(denoisers(pipe).values())


# ---- adapters ----------------------------------------------------------------------------------

RANK, WEIGHT = 4, 0.5


def _factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA of every attention projection, and of what is between text encoder and attention."""
    found, generator = {}, torch.Generator().manual_seed(3)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(
            part in name for part in ("attn", "attention", "cap", "text_embedder")
        ):
            a, b = torch.randn(RANK, module.in_features), torch.randn(module.out_features, RANK)
            a.normal_(0, 0.2, generator=generator), b.normal_(0, 0.2, generator=generator)
            found[name] = a, b
    return found


def _load(pipe: Any) -> Off:
    state = {}
    for attribute, model in denoisers(pipe).items():
        for name, (a, b) in _factors(model).items():
            prefix = f"{attribute}.{name}"
            state |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    pipe.load_lora_weights(state, adapter_name="x")
    return pipe.unload_lora_weights


def _load_and_weigh(pipe: Any) -> Off:
    off = _load(pipe)
    pipe.set_adapters(["x"], [WEIGHT])
    return off


def _fuse(pipe: Any) -> Off:
    _load(pipe)
    pipe.fuse_lora(components=list(denoisers(pipe)), lora_scale=WEIGHT)

    def off() -> None:
        pipe.unfuse_lora(components=list(denoisers(pipe)))
        pipe.unload_lora_weights()

    return off


def _scale_argument(pipe: Any) -> str | None:
    names = inspect.signature(type(pipe).__call__).parameters
    return next((name for name in names if name.endswith("attention_kwargs")), None)


def _add_factors(pipe: Any) -> None:
    with torch.no_grad():
        for model in models(pipe):
            for name, (a, b) in _factors(model).items():
                model.get_submodule(name).weight += WEIGHT * b @ a


def _takes_adapters(pipe: Any) -> bool:
    return hasattr(pipe, "load_lora_weights")


# ---- weights -----------------------------------------------------------------------------------


class FourBits(nn.Linear):
    """As bitsandbytes has them: two weights a byte in a shape of their own, one scale per block of weights,
    dequantised in the forward."""

    BLOCK = 16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        weight = linear.weight.detach().flatten()
        self.length = len(weight)
        blocks = nn.functional.pad(weight, (0, -len(weight) % (2 * self.BLOCK))).view(-1, self.BLOCK)
        self.absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
        codes = ((blocks / self.absmax).round() + 8).to(torch.uint8).view(-1, 2)
        self.weight = nn.Parameter((codes[:, 0] * 16 + codes[:, 1]).unsqueeze(1), requires_grad=False)
        self.bias = linear.bias

    def dequantised(self) -> Tensor:
        codes = torch.cat([self.weight // 16, self.weight % 16], 1).view(-1, self.BLOCK)
        weight = (codes.float() - 8) * self.absmax
        return weight.flatten()[: self.length].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


def _linears(pipe: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name in it, layer: inside of blocks, and what the text passes before them."""
    return [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for model in models(pipe)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and any(part in name for part in ("block", "layers", "cap", "text_embedder"))
    ]


def _quantise(pipe: Any) -> Off:
    before = _linears(pipe)
    for parent, name, linear in before:
        setattr(parent, name, FourBits(linear))  # of a ModuleList: by its number
    return lambda: [setattr(*place) for place in before]


def _round_to_four_bits(pipe: Any) -> None:
    for _, _, linear in _linears(pipe):
        linear.weight.data = FourBits(linear).dequantised()


def _torchao(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = {id(linear) for _, _, linear in _linears(pipe)}
    for model in models(pipe):
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, _name: id(module) in chosen)


def _torchao_written_out(pipe: Any) -> None:
    twin = copy.deepcopy(pipe)
    _torchao(twin)
    for (_, _, linear), (_, _, quantised) in zip(_linears(pipe), _linears(twin)):
        linear.weight.data = quantised.weight.dequantize().float()


def _cast(pipe: Any) -> None:
    for model in models(pipe):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _round_to_float8(pipe: Any) -> None:
    twin = copy.deepcopy(pipe)
    _cast(twin)
    for model, rounded in zip(models(pipe), models(twin)):
        model.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})


# ---- offload: to where `parked` says -------------------------------------------------------------


def _offload_groups(offload_type: str, blocks: int | None = None) -> Callable[[Any], Off | None]:
    def switch(pipe: Any) -> None:
        for model in models(pipe):
            model.enable_group_offload(
                onload_device=CPU, offload_device=CPU, offload_type=offload_type, num_blocks_per_group=blocks
            )

    return switch


def _offload_parameters(pipe: Any) -> Off:
    for model in models(pipe):
        accelerate.cpu_offload(model, CPU)  # away is the meta device

    def off() -> None:
        for model in models(pipe):
            accelerate.hooks.remove_hook_from_module(model, recurse=True)

    return off


def _offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


# ---- attention ---------------------------------------------------------------------------------


def _choose_backend(pipe: Any) -> Off:
    for model in models(pipe):
        model.set_attention_backend("_native_math")
    return lambda: [model.set_attention_backend("native") for model in models(pipe)]


def _fuse_projections(pipe: Any) -> Off:
    for model in models(pipe):
        model.fuse_qkv_projections()
    return lambda: [model.unfuse_qkv_projections() for model in models(pipe)]


def _by_another_processor(pipe: Any) -> str | None:
    """Where fused projections are the business of a processor of their own."""
    classic = all(type(attn) is Attention for attn in pipelines.attentions(pipe).values())
    own = any(name in type(pipe).__name__ for name in ("Sana", "Qwen"))
    return "FusedAttnProcessor2_0" if classic and not own else None


def _has_backends(pipe: Any) -> bool:
    modules = [module for model in models(pipe) for module in model.modules()]
    return any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in modules)


# ---- caches ------------------------------------------------------------------------------------


def _caches(config: Any) -> Callable[[Any], None]:
    def on(pipe: Any) -> None:
        for model in models(pipe):
            model.enable_cache(config)

    return on


def has_caches(pipe: Any) -> bool:
    return all(hasattr(model, "enable_cache") for model in models(pipe))


FASTER = diffusers.FasterCacheConfig(current_timestep_callback=lambda: 1000, is_guidance_distilled=True)

FEATURES = (
    Feature("LoRA, loaded and weighed", _load_and_weigh, _add_factors, _takes_adapters, needs="peft"),
    Feature(
        "LoRA, scaled by the call", _load, _add_factors,
        lambda pipe: _takes_adapters(pipe) and _scale_argument(pipe) is not None,
        call=lambda pipe: {_scale_argument(pipe): {"scale": WEIGHT}}, needs="peft",
    ),
    Feature("LoRA, fused", _fuse, _add_factors, _takes_adapters, exact=False, needs="peft"),
    Feature("quantised `Linear` (4 bits, as bitsandbytes)", _quantise, _round_to_four_bits),
    Feature("quantised weights (torchao, int8)", _torchao, _torchao_written_out, needs="torchao"),
    Feature("layerwise casting", _cast, _round_to_float8),
    Feature("group offload, blocks", _offload_groups("block_level", 1), near=0.0),
    Feature("group offload, leaves", _offload_groups("leaf_level"), near=0.0),
    Feature("model offload", _offload_models, near=0.0),
    Feature("sequential offload", _offload_parameters, near=0.0),
    Feature("`set_attention_backend`", _choose_backend, offered=_has_backends),
    Feature(
        "`fuse_qkv_projections`", _fuse_projections, refused=_by_another_processor,
        offered=lambda pipe: all(hasattr(model, "fuse_qkv_projections") for model in models(pipe)),
    ),
    Feature("FasterCache", _caches(FASTER), offered=has_caches, refused=lambda pipe: "FasterCache"),
    Feature(
        "SeaCache", lambda pipe: _caches(diffusers.SeaCacheConfig())(pipe),
        offered=lambda pipe: hasattr(diffusers, "SeaCacheConfig") and "Wan" in type(pipe).__name__,
        refused=lambda pipe: "SeaCache",
    ),
)  # fmt: skip
