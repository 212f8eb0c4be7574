"""AdamW whose weights and moments are bfloat16: 8 bytes a parameter with the gradient, where float32 needs 16 or more.

A bfloat16 number has 8 significant bits. Rounded to the nearest one a weight loses every update below a 512th of
itself, and a second moment with beta2 = 0.999 never becomes smaller. Both are rounded at random instead, up as often as
what lies between two numbers says, so their expected values are those of float32 ("stochastic rounding": Gupta et al.,
1502.02551; of bfloat16 weights Zamirai et al., 2010.06192). Compensated sums need two bytes more, and learned no more
(docs/optimizer.md). The first moment is replaced by a tenth in each step, and is rounded to nearest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ds_sft.config.extension import is_dotted, load, require_call, said
from ds_sft.config.keys import MUON, Config
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch
from ds_sft.training.muon import muon_of, partitioned_muon_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Elements that are float32 at a time: on a CPU what its cache holds, on a GPU enough for a kernel. Each takes 36 bytes:
# four of its numbers, a root, three times random bits, and those of the next piece.
CHUNK, CHUNK_ON_GPU = 2**18, 2**23
LOW = 0xFFFF  # the bits of a float32 that a bfloat16 does not have


def optimizer_of(config: Config, args: TrainingArguments, launch: Launch) -> tuple[Any, dict[str, Any]] | None:
    """What makes the optimizer, and with which options, as Trainer takes them; None: it chooses by the key `optim`."""
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if config.training.get("optim") == MUON:
        under_zero = args.deepspeed is not None
        launch.say("Optimizer: Muon for hidden matrices, AdamW for the others."
                   + " grad_norm is that of Muon's updates and the others' gradients." * under_zero)  # fmt: skip
        made = partitioned_muon_of if under_zero else muon_of
        return (lambda: made), {**options, "weight_decay": args.weight_decay}
    if is_dotted(optim := config.training.get("optim")):
        launch.say(f"Optimizer: {optim}.")
        return own_optimizer(config), {"lr": args.learning_rate, **optimizer_options(config)}
    if config.optimizer_dtype == "float32":
        return None
    launch.say("Optimizer: AdamW in bfloat16, stochastic rounding: weights, gradients and two moments of 2 bytes each.")
    # Ranks of DistributedDataParallel have the same weights and must round alike; those of ZeRO have parts of them.
    stream = args.process_index if args.deepspeed is not None else 0
    return StochasticAdamW, {**options, "seed": args.seed, "stream": stream}


def own_optimizer(config: Config) -> type[torch.optim.Optimizer]:
    """The class of the user's that `optim` names.

    Raises:
        UserError: it cannot be had, is none, or cannot be made with the rate and `optim_args`.
    """
    name = str(config.training["optim"])
    found = load(name, "optim")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"optim: {name}: expected a class, a torch.optim.Optimizer, found {found!r:.80}")
    options = optimizer_options(config)
    require_call(found, name, "optim", "params", keywords={"lr": 0.0, **options})
    for option, value in options.items():
        with suppress(TypeError, ValueError):  # of compiled code, which says no defaults
            _require_kind(option, value, inspect.signature(found).parameters.get(option))
    rate = config.training.get("learning_rate", 0.0)
    try:
        group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.0}
        found([group], lr=rate, **options)  # type: ignore[call-arg]
    except Exception as error:
        call = ", ".join([f"lr={rate:g}", *(f"{option}={value}" for option, value in options.items())])
        raise UserError(f"optim: {name}: making it with {call} ends in {said(error)}") from error
    return found


def _require_kind(option: str, value: Any, parameter: inspect.Parameter | None) -> None:
    """A value of `optim_args` is of the kind of its default, which many classes see in their first step alone.

    Raises:
        UserError: it is not.
    """
    default = parameter.default if parameter is not None else None
    number = isinstance(default, (int, float))
    right = isinstance(value, bool) if isinstance(default, bool) else isinstance(value, (int, float)) or not number
    if not right:
        expected = "true or false" if isinstance(default, bool) else "a number"
        raise UserError(f"optim_args: {option}={value}: expected {expected}, as its default is: {default}")


def optimizer_options(config: Config) -> dict[str, Any]:
    """`optim_args`, name=value,name=value, as keywords; a value is a number where it reads as one.

    Raises:
        UserError: not of that form.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (config.training.get("optim_args") or "").replace(" ", "").split(",")):
        name, equals, value = part.partition("=")
        if not (equals and name.isidentifier()):
            raise UserError(f"optim_args: {part}: expected name=value,name=value, such as momentum=0.9,nesterov=true")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


class FlatPart(NamedTuple):
    """Part of a parameter, flat; what is 16 bits is written."""

    weight: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    noise: torch.Tensor  # int32, 31 random bits
    step: int  # of the parameter, this one included


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 1711.05101) computed in float32 of bfloat16 weights, gradients and moments.

    The random bits of a parameter depend on `seed`, `stream`, its step and its place among the parameters alone, so a
    resumed run has the same.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed, self.stream = seed, stream
        self.places: dict[torch.Tensor, int] = {}  # DeepSpeed steps one group after the other, always in one order

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for pieces in _together(self._pieces(group["params"])):
                _update(pieces, group)
        return loss

    def _pieces(self, parameters: Sequence[torch.Tensor]) -> Iterator[FlatPart]:
        for parameter in parameters:
            place = self.places.setdefault(parameter, len(self.places))
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            generator = torch.Generator(parameter.device)
            generator.manual_seed(hash((self.seed, self.stream, place, state["step"])))
            whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            flat = [tensor.view(-1).split(_chunk(parameter)) for tensor in whole]
            for weight, gradient, average, square in zip(*flat, strict=True):
                noise = torch.empty_like(weight, dtype=torch.int32).random_(generator=generator)
                yield FlatPart(weight, gradient, average, square, noise, state["step"])


def _together(pieces: Iterator[FlatPart]) -> Iterator[list[FlatPart]]:
    """Pieces that are updated by one call each operation, no more than a chunk."""
    waiting: list[FlatPart] = []
    for piece in pieces:
        if waiting and sum(other.weight.numel() for other in [*waiting, piece]) > _chunk(piece.weight):
            yield waiting
            waiting = []
        waiting.append(piece)
    if waiting:
        yield waiting


def _update(pieces: Sequence[FlatPart], group: dict[str, Any]) -> None:
    lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
    weights, gradients = [_wide(piece.weight) for piece in pieces], [_wide(piece.gradient) for piece in pieces]
    averages, squares = [_wide(piece.exp_avg) for piece in pieces], [_wide(piece.exp_avg_sq) for piece in pieces]
    torch._foreach_lerp_(averages, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, [(1 - beta2**piece.step) ** 0.5 for piece in pieces])
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(weights, averages, roots, [-lr / (1 - beta1**piece.step) for piece in pieces])
    torch._foreach_copy_([piece.exp_avg for piece in pieces], averages)
    for piece, weight, square in zip(pieces, weights, squares, strict=True):
        round_into(piece.weight, weight, piece.noise & LOW)
        round_into(piece.exp_avg_sq, square, piece.noise >> 15 & (LOW - 1))  # bits that the weight has not used


def round_into(narrow: torch.Tensor, wide: torch.Tensor, noise: torch.Tensor) -> None:
    """Round float32 to one of the two bfloat16 beside each number; the farther one as often as the nearer is off.

    Args:
        wide: float32; overwritten.
        noise: int32, from 0 to `LOW`, of equal shape.
    """
    wide.view(torch.int32).add_(noise).bitwise_and_(~LOW)
    narrow.copy_(wide)


def _chunk(tensor: torch.Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else CHUNK_ON_GPU


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32, copy=True)
