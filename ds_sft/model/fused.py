"""Norms, rotations and gates in one kernel each, by Liger, in one model and not in the whole process.

On a GPU a layer in eager PyTorch is some sixty kernels that each read and write all activations: RMSNorm, RoPE and
SwiGLU took more time than attention (an H200, Qwen3-0.6B: 50,600 tokens/s without Liger's, 81,400 with). Liger's own
`apply_liger_kernel_to_*` exchange classes and functions of transformers' modules, so every model made later has them;
here the modules of one model get another `forward`, and only those whose own is known by its text. The other way is to
compile each layer: `fused_kernels: compile`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_sft.errors import UserError
from ds_sft.plan.layouts import chosen_kernels, has_liger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What modules compute, by the text of their forward, without docstring.
LLAMA_NORM = """\
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)"""
GEMMA_NORM = """\
output = self._norm(x.float())
output = output * (1.0 + self.weight.float())
return output.type_as(x)"""
GATED = """\
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj"""
ROTATION = """\
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = q * cos + rotate_half(q) * sin
k_embed = k * cos + rotate_half(k) * sin
return (q_embed, k_embed)"""
HALVES = """\
x1 = x[..., :x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2:]
return torch.cat((-x2, x1), dim=-1)"""


@dataclass(frozen=True)
class Kernels:
    """Liger's autograd functions, as `apply` takes them."""

    norm: Callable[..., torch.Tensor]  # x, weight, eps, offset, casting mode, in place
    silu_mul: Callable[..., torch.Tensor]  # gate, up
    gelu_mul: Callable[..., torch.Tensor]  # gate, up; tanh's approximation
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # q, k, cos, sin, position ids, unsqueeze dim


@dataclass
class Fused:
    """What was fused in a model, and what computes it, or why nothing was."""

    by: str
    norms: int = 0
    gates: int = 0
    rotations: int = 0
    layers: int = 0  # compiled ones

    def __bool__(self) -> bool:
        return self.layers + self.norms + self.gates + self.rotations > 0

    def __str__(self) -> str:
        if self.layers:
            return f"{self.layers} layers, each compiled at its first use ({self.by})"
        found = f"{self.norms} norms, {self.gates} gates, {self.rotations} rotations" if self else "none"
        return f"{found} ({self.by})"


def fuse(model: PreTrainedModel, wanted: str, *, on_gpu: bool, compiled: bool = False) -> Fused:
    """Give a model the kernels that `fused_kernels` names, which `require_kernels` allowed.

    Args:
        model: before DeepSpeed or DistributedDataParallel wrap it.
        wanted: auto (Liger's on a GPU, where it is installed), liger, compile or none.
        on_gpu: where the model computes.
        compiled: `torch_compile` compiles the whole model.
    """
    chosen = chosen_kernels(wanted, on_gpu=on_gpu, compiled=compiled)
    if chosen == "compile":
        return compile_layers(model)
    if chosen == "liger":
        return use_kernels(model, liger(), f"Liger {importlib.metadata.version('liger-kernel')}")
    return Fused(_why_none(wanted, on_gpu=on_gpu, compiled=compiled))


def _why_none(wanted: str, *, on_gpu: bool, compiled: bool) -> str:
    if wanted == "none":
        return "as fused_kernels says"
    if compiled:
        return "torch_compile compiles the whole model"
    if not on_gpu:
        return "they are for GPUs"
    return "pip install liger-kernel brings Liger's, with which an H200 was 1.6 times as fast"


def require_kernels(wanted: str, *, on_gpu: bool, compiled: bool) -> None:
    """Before a model is loaded.

    Raises:
        UserError: what the key `fused_kernels` wants cannot be had here.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if wanted == "liger" and not on_gpu:
        raise UserError("fused_kernels: liger: its kernels run on GPUs only; write auto, compile or none")
    if wanted == "liger" and not has_liger():
        raise UserError("fused_kernels: liger: it is not installed: pip install liger-kernel, or write none")
    if wanted in ("liger", "compile") and compiled:
        raise UserError(
            f"fused_kernels: {wanted}: torch_compile compiles the whole model already; leave one of them out"
        )
    if wanted == "compile" and is_deepspeed_zero3_enabled():
        raise UserError("fused_kernels: compile: ZeRO-3 exchanges weights inside of a layer; write liger or none, or "
                        "use ZeRO-2")  # fmt: skip


def liger() -> Kernels:
    """Liger's functions; importing them needs Triton."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

    return Kernels(
        norm=LigerRMSNormFunction.apply,
        silu_mul=LigerSiLUMulFunction.apply,
        gelu_mul=LigerGELUMulFunction.apply,
        rotate=LigerRopeFunction.apply,
    )


def use_kernels(model: nn.Module, kernels: Kernels, by: str) -> Fused:
    """Exchange the forward of the modules that are known by their text; classes and other models stay as they are."""
    fused = Fused(by)
    for module in model.modules():
        text = body_of(type(module).forward)
        if text in (LLAMA_NORM, GEMMA_NORM):
            module.forward = _norm(module, kernels, gemma=text == GEMMA_NORM)
            fused.norms += 1
        elif text == GATED and (multiply := _activation(module, kernels)) is not None:
            module.forward = _gated(module, multiply)
            fused.gates += 1
        elif _rotates_by_halves(module):
            module.forward = _with_rotation(module, kernels)
            fused.rotations += 1
    return fused


def compile_layers(model: nn.Module) -> Fused:
    """Compile each layer by itself, for any number of tokens: equal layers share what is compiled."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True)
    return Fused(f"torch.compile of PyTorch {torch.__version__}", layers=len(layers))


# ---- Forwards


def _norm(module: Any, kernels: Kernels, *, gemma: bool) -> Callable[..., torch.Tensor]:
    """Not in place: the gradient of a norm's output may be that of a residual, too (Gemma)."""
    eps, offset, casting = (module.eps, 1.0, "gemma") if gemma else (module.variance_epsilon, 0.0, "llama")
    # The weight is asked for at each call: the optimizer's working copy and ZeRO-3 exchange it.
    return lambda x: kernels.norm(x, module.weight, eps, offset, casting, False)


def _activation(module: Any, kernels: Kernels) -> Callable[..., torch.Tensor] | None:
    name = type(module.act_fn).__name__
    return {"SiLU": kernels.silu_mul, "SiLUActivation": kernels.silu_mul, "GELUTanh": kernels.gelu_mul}.get(name)


def _gated(module: Any, multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = module.down_proj(multiply(module.gate_proj(x), module.up_proj(x)))
        return projected

    return forward


def _rotates_by_halves(module: nn.Module) -> bool:
    """Whether a module's forward calls `apply_rotary_pos_emb` as Llama's file defines it."""
    forward = inspect.unwrap(type(module).forward)
    names = getattr(forward, "__globals__", {})
    return (
        "apply_rotary_pos_emb" in getattr(getattr(forward, "__code__", None), "co_names", ())
        and body_of(names.get("apply_rotary_pos_emb")) == ROTATION
        and body_of(names.get("rotate_half")) == HALVES
    )


def _with_rotation(module: Any, kernels: Kernels) -> Callable[..., Any]:
    """The module's own forward, in which one name means another function.

    Without its decorator: that of transformers 5.24 translates an older name of the cache, which no layer uses.
    """

    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.rotate(q, k, cos, sin, None, unsqueeze_dim)

    own: Any = inspect.unwrap(type(module).forward)
    names = {**own.__globals__, "apply_rotary_pos_emb": rotate}
    forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__, forward.__annotations__ = own.__kwdefaults__, own.__annotations__
    return types.MethodType(forward, module)


@cache
def body_of(function: Any) -> str:
    """The statements of a function as text, without docstring and comments; nothing where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    skipped = 1 if ast.get_docstring(tree) is not None else 0
    return "\n".join(ast.unparse(statement) for statement in tree.body[skipped:])
