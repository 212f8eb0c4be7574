"""Cross-entropy over supervised tokens only, in chunks: the logits of a batch never exist all at once.

`supervise(model)` makes the output projection inside a model a `LossInPlaceOfLogits` and replaces the model's loss, so
that `model(**batch, labels=labels, num_items_in_batch=n).loss` stays the call it was, for Trainer as for anyone. Hidden
states are selected where the label of the next token counts; a chunk of them is projected, and gradients of hidden
states and projection are formed from its logits at once, in forward: three matrix products as in the model's own loss,
nothing computed again. The projection's module is called once a batch on every rank, however many tokens it
supervises, so ZeRO-3 gathers its weight as for any other module (a call for each chunk waits forever for ranks that
have fewer). The idea of forming gradients in forward is Liger Kernel's (arXiv 2410.10989).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ds_sft.data.batch import METADATA, BatchMetadata
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.errors import UserError
from ds_sft.model.autocast import autocast_dtype, without_autocast
from ds_sft.model.routing import Routing
from ds_sft.plan.activations import CHUNK_BYTES

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

# What models do to their logits before the loss, by the text of the statements: (scale, cap) of logits, None: no cap.
LOGIT_STATEMENTS: dict[str, Callable[[Any], tuple[float, float | None]]] = {
    "": lambda model: (1.0, None),
    "logits = logits * self.logit_scale": lambda model: (model.logit_scale, None),  # Cohere
    "logits = logits / self.config.logits_scaling": lambda model: (1 / model.config.logits_scaling, None),  # Granite
    "if self.config.final_logit_softcapping is not None:\n"
    "    logits = logits / self.config.final_logit_softcapping\n"
    "    logits = torch.tanh(logits)\n"
    "    logits = logits * self.config.final_logit_softcapping": lambda model: (
        1.0,
        model.config.final_logit_softcapping,
    ),  # Gemma
}


@dataclass(frozen=True)
class LogitTerms:
    """`cap * tanh(scale * x / cap)` of the projection's output x; without a cap `scale * x`."""

    scale: float = 1.0
    cap: float | None = None
    kernel: bool = True  # on a GPU the loss is one Triton kernel's
    smoothing: float = 0.0  # to learn, this share of a target is spread over the whole vocabulary


class LossInPlaceOfLogits(nn.Linear):
    """An output projection that returns one number while labels are there: the sum of their cross-entropy; else logits.

    It is the projection that the model was loaded with, of another class: the same object, parameters and hooks, under
    the same name, so DeepSpeed, DistributedDataParallel, peft and checkpoints see an ordinary `nn.Linear`.
    """

    supervised: SupervisedLoss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [batch, seq, hidden]; returns a float32 [], or logits [batch, seq, vocab]."""
        return super().forward(hidden) if self.supervised.labels is None else self.supervised.cross_entropy(hidden)


@dataclass(frozen=True)
class OwnLoss:
    """The loss that a model had, with the logits of all tokens at once."""

    why: str

    def __str__(self) -> str:
        return f"the model's own, with the logits of all tokens at once: {self.why}"


class SupervisedLoss:
    """A model's loss over supervised tokens, for as long as labels come with a batch."""

    def __init__(self, model: PreTrainedModel, terms: LogitTerms) -> None:
        self.head: LossInPlaceOfLogits = output_projection(model)
        self.terms = terms
        self.labels: torch.Tensor | None = None  # of the batch under way, [batch, seq]
        self.metadata: BatchMetadata | None = None  # of the same, where it came with one
        self.total: torch.Tensor | None = None  # of the last batch: sum of the cross-entropy, float32
        self.count: torch.Tensor | None = None  # supervised tokens in it
        self._hook: RemovableHandle | None = None
        self.head.__class__ = LossInPlaceOfLogits
        self.head.supervised = self
        model.loss_function = self._mean
        model.register_forward_pre_hook(self._take_labels, with_kwargs=True)

    def _take_labels(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.labels, self.metadata, self.total = kwargs.get("labels"), kwargs.get(METADATA), None
        if self._hook is not None:  # of a forward that failed
            self._hook.remove()
            self._hook = None
        if self.labels is not None:
            # Registered anew for each batch, so that it comes after DeepSpeed's hooks: theirs gather the weight for
            # the backward of what the module returns, and `total` must be that.
            self._hook = self.head.register_forward_hook(self._keep_total)

    def __str__(self) -> str:
        kernel = ", by one kernel each" if self.terms.kernel and self.head.weight.is_cuda else ""
        return f"of supervised tokens alone, a chunk of their logits at a time{kernel}"

    def cross_entropy(self, hidden: torch.Tensor) -> torch.Tensor:
        """Its sum over the batch's supervised tokens, float32, []; hidden: [batch, seq, hidden]."""
        assert self.labels is not None
        if self.metadata is not None:
            positions, targets = self.metadata.positions, self.metadata.targets
        else:
            positions, targets = supervised_positions(self.labels.to(hidden.device))
        self.count = torch.full((), len(targets), device=hidden.device)
        return cross_entropy_sum(
            hidden.flatten(0, -2).index_select(0, positions), self.head.weight, self.head.bias, targets, self.terms
        )

    def _keep_total(self, head: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """The model goes on with logits of no token: what it does to them has been done."""
        self.total, self.labels, self.metadata = output, None, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return output.new_empty(0, self.head.out_features)

    def _mean(
        self, logits: torch.Tensor, labels: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """In place of the model's loss: over as many tokens as Trainer counts, without a count over the batch's own."""
        assert self.total is not None, "the output projection was not called"
        assert self.count is not None
        count = self.count if num_items_in_batch is None else num_items_in_batch
        total, self.total = self.total, self.total.detach()  # what stays must not keep the graph alive
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def output_projection(model: PreTrainedModel) -> Any:
    """What projects hidden states to logits: under an adapter that trains it whole, the copy that is trained."""
    head: Any = model.get_output_embeddings()
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head


def supervise(
    model: PreTrainedModel, *, fp16: bool = False, kernel: bool = True, smoothing: float = 0.0
) -> SupervisedLoss | OwnLoss:
    """Let a model compute its loss over supervised tokens only, in chunks; else leave it its own.

    Args:
        model: before DeepSpeed or DistributedDataParallel wrap it.
        fp16: forward and backward are in float16.
        kernel: on a GPU one Triton kernel computes the loss and its gradient.
        smoothing: of labels (Szegedy et al., 1512.00567); what is learned, not what is measured without a gradient.

    Raises:
        UserError: labels are to be smoothed, and the model keeps its own loss.
    """
    loss = _take_over(model, fp16=fp16, kernel=kernel and not smoothing, smoothing=smoothing)
    if smoothing and isinstance(loss, OwnLoss):
        raise UserError(
            f"label_smoothing_factor: {smoothing}: {type(model).__name__} keeps its own loss ({loss.why}): leave it out"
        )
    return loss


def _take_over(model: PreTrainedModel, *, fp16: bool, kernel: bool, smoothing: float) -> SupervisedLoss | OwnLoss:
    try:
        terms = LogitTerms(*LOGIT_STATEMENTS[_between_logits_and_loss(type(model))](model))
    except (KeyError, LookupError, AttributeError, OSError, TypeError, SyntaxError):
        return OwnLoss("what it does between output projection and loss is not known")
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = output_projection(model)
    if type(head) is not nn.Linear or model.get_output_embeddings() is not getattr(model, "lm_head", None):
        return OwnLoss("its output projection is no plain matrix")
    if model.loss_function is not ForCausalLMLoss:
        return OwnLoss("its loss is another")
    if fp16 or head.weight.dtype == torch.float16:
        return OwnLoss("float16 has no room for gradients of unscaled sums")
    return SupervisedLoss(model, replace(terms, kernel=kernel, smoothing=smoothing))


def why_own_loss(model: PreTrainedModel) -> str | None:
    """Why a model's own loss would be left to it in other precisions than float16; None if it would not.

    The model is of no use afterwards.
    """
    loss = supervise(model, kernel=False)
    return loss.why if isinstance(loss, OwnLoss) else None


def _between_logits_and_loss(model_class: type) -> str:
    """The statements from the output projection to the stock loss in a model's `forward`, as text.

    Raises:
        LookupError: `forward` has another shape, or uses the logits after that.
    """
    source = inspect.getsource(inspect.unwrap(model_class.forward))  # type: ignore[attr-defined]
    function = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(function, ast.FunctionDef)
    texts = [ast.unparse(statement) for statement in function.body]
    calls = [i for i, text in enumerate(texts) if "self.lm_head(" in text]
    losses = [i for i, text in enumerate(texts) if "self.loss_function(" in text]
    if len(calls) != 1 or len(losses) != 1 or not texts[calls[0]].startswith("logits = self.lm_head(hidden_states"):
        raise LookupError
    call, loss = function.body[calls[0]], function.body[losses[0]]
    plain = isinstance(call, ast.Assign) and ast.unparse(call.value).count("(") == 1 and texts[calls[0]].endswith(")")
    alone = isinstance(loss, ast.If) and ast.unparse(loss.test) == "labels is not None" and len(loss.body) == 1
    after = [text for text in texts[losses[0] + 1 :] if "logits" in text.replace("router_logits", "")]
    if not plain or not alone or any(not text.startswith(("return ", "if not return_dict:")) for text in after):
        raise LookupError
    return "\n".join(text for text in texts[calls[0] + 1 : losses[0]] if text != "loss = None")


def adds_to_loss(model_class: type) -> bool:
    """Whether a model's `forward` adds something of its own to the cross-entropy."""
    try:
        source = inspect.getsource(inspect.unwrap(model_class.forward))  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    return re.search(r"\bloss (\+= |= loss \+ )", source) is not None


def share_auxiliary(model: PreTrainedModel, routing: Routing | None = None) -> SharedAuxiliary | None:
    """Let what a model adds to its loss, where it does, count by the tokens of a micro batch; after `supervise`.

    `routing`: of a mixture of experts, whose load balancing loss may be that of a step.
    """
    return SharedAuxiliary(model, routing) if adds_to_loss(type(model)) else None


class SharedAuxiliary:
    """Weighs what a model adds to its cross-entropy by the micro batch's share of the step's supervised tokens.

    A mixture of experts adds its load balancing loss, Bamba a z-loss: each a mean over one micro batch, added whole,
    while the cross-entropy is divided by the tokens of the step. The sum of a step then grew with its micro batches and
    ranks. The shares of a step are 1 in all, so its auxiliary loss is a mean, weighted like the cross-entropy.

    In a step that a trainer has announced, a load balancing loss is that of the step instead (model/routing.py).
    """

    def __init__(self, model: PreTrainedModel, routing: Routing | None) -> None:
        self.routing = routing
        self.cross_entropy: torch.Tensor | None = None  # of the batch under way
        self._loss_function = model.loss_function
        model.loss_function = self._keep
        model.register_forward_hook(self._weigh, with_kwargs=True)

    def __str__(self) -> str:
        if self.routing is not None and self.routing.balancing is not None:
            return "load balancing, of all tokens of a step"
        return "what the model adds to its loss, by each micro batch's share of supervised tokens"

    def _keep(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.cross_entropy = self._loss_function(*args, **kwargs)
        return self.cross_entropy.clone()  # models add in place

    def _weigh(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The model's output, whose loss comes first."""
        known, self.cross_entropy = self.cross_entropy, None
        count = kwargs.get("num_items_in_batch")
        routing, router_logits = self.routing, getattr(output, "router_logits", None)
        if known is not None and model.training and routing is not None and routing.balances_step and router_logits:
            output["loss"] = known + routing.part_of_step(router_logits)
            return output
        if known is None or count is None:
            return output
        supervised = (kwargs["labels"][..., 1:] != IGNORE_INDEX).sum().to(known.device)
        share = supervised / torch.as_tensor(count, device=known.device).clamp(min=1)
        loss = known + share * (output[0] - known)
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output["loss"] = loss
        return output


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a hidden state predicts a supervised token, and that token.

    Args:
        labels: [batch, seq], `IGNORE_INDEX` where nothing counts; position t predicts the label of t + 1.

    Returns:
        Positions in [batch x seq], and their targets: [supervised] each.
    """
    following = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    positions = (following != IGNORE_INDEX).nonzero()[:, 0]
    return positions, following[positions]


def cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    terms: LogitTerms = LogitTerms(),
) -> torch.Tensor:
    """Sum of the cross-entropy of `hidden @ weight.T + bias` against `targets`, float32, [].

    Matrix products are in the dtype of training (autocast's where it is on), everything else in float32. Gradients are
    those of the model's own loss: float32 to 1e-6 of their length, bfloat16 to 1e-2 (tests/test_loss.py).

    Args:
        hidden: [supervised, hidden]; none at all gives 0, with gradients of 0.
        weight: [vocab, hidden].
        bias: [vocab].
        targets: [supervised].
        terms: what the model does to its logits.
    """
    dtype = autocast_dtype(hidden.device) or weight.dtype
    with without_autocast(hidden.device):
        total: torch.Tensor = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, terms, dtype, torch.is_grad_enabled()
        )
    return total


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        terms: LogitTerms,
        dtype: torch.dtype,
        learn: bool,
    ) -> torch.Tensor:
        x, w, b = hidden.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None
        wanted = [learn and needed for needed in ctx.needs_input_grad[:3]]
        # The sum over chunks of the weight's gradient stays in the dtype of training: a float32 buffer costs twice the
        # time of the three products, and the error is that of the products themselves (bfloat16, 32 chunks: 0.19 % of
        # the gradient's length, one chunk 0.15 %).
        gradients = [
            torch.zeros_like(t) if want and t is not None else None for t, want in zip((x, w, b), wanted, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, CHUNK_BYTES // (4 * len(w)))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            of_hidden, *others = gradients
            parts = (of_hidden[rows] if of_hidden is not None else None, *others)
            total += _learn_chunk(x[rows], w, b, targets[rows], terms, parts)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [t.dtype if t is not None else None for t in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            gradient.mul_(slope).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _learn_chunk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    terms: LogitTerms,
    gradients: tuple[torch.Tensor | None, ...],
) -> torch.Tensor:
    """Sum of the cross-entropy of a chunk; adds to `gradients` of its hidden states x [n, hidden], weight and bias."""
    of_hidden, of_weight, of_bias = gradients
    logits = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    learn = any(g is not None for g in gradients)
    loss = (_by_kernel if terms.kernel and uses_kernel(logits) else _by_torch)(logits, targets, terms, learn=learn)
    slopes = logits  # they took its place
    if of_hidden is not None:
        torch.mm(slopes, weight, out=of_hidden)
    if of_weight is not None:
        of_weight.addmm_(slopes.T, x)
    if of_bias is not None:
        of_bias += slopes.sum(0)
    return loss


def uses_kernel(logits: torch.Tensor) -> bool:
    """Whether one Triton kernel computes loss and gradient of logits: on GPUs, where Triton comes with PyTorch."""
    return logits.is_cuda and importlib.util.find_spec("triton") is not None


def _by_kernel(logits: torch.Tensor, targets: torch.Tensor, terms: LogitTerms, *, learn: bool) -> torch.Tensor:
    from ds_sft.model.loss_kernel import loss_and_slopes  # needs Triton

    return loss_and_slopes(logits, targets, terms.scale, terms.cap, learn=learn)


def _by_torch(logits: torch.Tensor, targets: torch.Tensor, terms: LogitTerms, *, learn: bool) -> torch.Tensor:
    """Sum of the cross-entropy of a chunk; to learn, its gradient takes the place of `logits` [n, vocab]."""
    x = logits.float()
    if terms.scale != 1:
        x = x.mul_(terms.scale)
    curve = None
    if terms.cap is not None:
        bent = x.div_(terms.cap).tanh_()
        curve = bent.square().neg_().add_(1) if learn else None
        x = bent.mul_(terms.cap)
    top = x.amax(-1, keepdim=True)
    of_target = x.gather(1, targets[:, None]) - top
    x = x.sub_(top)
    if learn and terms.smoothing:
        of_target = of_target.lerp(x.mean(-1, keepdim=True), terms.smoothing)
    x = x.exp_()
    whole = x.sum(-1, keepdim=True)
    loss = (whole.log() - of_target).sum()
    if not learn:
        return loss
    x = x.div_(whole)
    if terms.smoothing:
        x = x.sub_(terms.smoothing / x.shape[-1])
    x.scatter_add_(1, targets[:, None], torch.full_like(of_target, terms.smoothing - 1))
    if curve is not None:
        x = x.mul_(curve)
    logits.copy_(x.mul_(terms.scale) if terms.scale != 1 else x)  # in the dtype of training
    return loss
