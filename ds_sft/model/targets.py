"""Which layers of a model get adapters, and which modules are trained whole beside them, as peft takes their names.

peft matches names by their ends, whatever they belong to: `gate_proj` is in a dense layer and in a shared expert,
`q_proj` in the language model and in a vision tower that no text reaches. Here the layers are chosen first; then they
are named, by short names where these say exactly the same, else in full.

The experts of a layer are no linear layers but tensors of all of them, which peft takes as `target_parameters`: each
expert gets A and B of its own.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
EXPERTS = "experts"  # all tensors of experts
FUSED = f"peft takes this name for the model's fused experts: write {EXPERTS} for these"
# Parts of names that choose experts for a token. An adapter there would be larger than they are, and move tokens to
# experts that have not changed.
ROUTERS = re.compile(r"(^|\.)(gate|shared_expert_gate|\w*router\w*)(\.|$)")


def targets(model: PreTrainedModel, asked: Sequence[str] | None, *, apart_from: Sequence[str] = ()) -> list[str]:
    """`target_modules` as peft takes them, of the layers that `lora_targets` names.

    Args:
        asked: ends of names, regular expressions of whole names, or `all-linear`, which is the default; what names
            tensors of experts alone is for `target_parameters`.
        apart_from: `lora_modules_to_save`.

    Raises:
        UserError: one names neither linear layer nor experts, or a layer that cannot have an adapter.
    """
    layers = linear_layers(model)
    if EXPERTS in (asked or []) and not expert_tensors(model):
        raise UserError(f"lora_targets: {EXPERTS}: {type(model).__name__} has no tensors of experts: leave it out")
    asked = [name for name in asked or [ALL_LINEAR] if name != EXPERTS]
    if asked == [ALL_LINEAR]:
        chosen = [
            name for name in _for_all_linear(model, layers) if not any(_ends_with(name, end) for end in apart_from)
        ]
        if not chosen:
            raise UserError(f"lora_targets: {ALL_LINEAR}: {_no_linear_layer(model)}")
    else:
        chosen = _named(model, asked, layers)
        if both := [name for name in apart_from if any(_ends_with(layer, name) for layer in chosen)]:
            raise UserError(f"lora_targets: {both[0]} is in lora_modules_to_save, too: leave it out of one of them")
        if refused := why_refused(model, chosen):
            name, why = next(iter(refused.items()))
            raise UserError(f"lora_targets: {name} of {type(model).__name__} cannot have adapters: {why}")
    return _as_named(chosen, [name for name, _ in model.named_modules()])


def target_parameters(model: PreTrainedModel, asked: Sequence[str] | None) -> list[str]:
    """`target_parameters` as peft takes them: the tensors of experts that `lora_targets` names, as layers are named."""
    tensors = expert_tensors(model)
    chosen = [t for t in tensors if any(name == EXPERTS or _matches(t, name) for name in asked or [])]
    short = sorted({f"{EXPERTS}.{last(name)}" for name in chosen})
    alone = [name for name, _ in model.named_parameters() if any(_ends_with(name, end) for end in short)] == chosen
    return short if alone else chosen


def expert_tensors(model: nn.Module) -> list[str]:
    """Names of the tensors that hold one matrix of all experts of a layer each, adapters around them or not."""
    return [name for name, p in model.named_parameters() if len(whole_shape(p)) == 3 and f".{EXPERTS}." in name]


def whole_modules(model: PreTrainedModel, asked: Sequence[str]) -> list[str]:
    """`modules_to_save` as peft takes them; it compares ends of names without regard to their dots.

    Raises:
        UserError: one names no module, a group of them, or one without weights.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    for name in asked:
        matched = [known for known in modules if _ends_with(known, name)]
        if not matched:
            with_weights = [
                n for n, module in modules.items() if next(module.parameters(recurse=False), None) is not None
            ]
            raise UserError(
                f"lora_modules_to_save: {name!r} is no module of this model; near it: {_near(name, with_weights)}"
            )
        if parts := [part for known in matched for part, _ in modules[known].named_children()]:
            raise UserError(
                f"lora_modules_to_save: {name!r} is a group of modules: name those of it that are to be trained whole: "
                f"{', '.join(dict.fromkeys(parts))}"
            )
        if not any(True for known in matched for _ in modules[known].parameters()):
            raise UserError(f"lora_modules_to_save: {name!r} has no weights ({type(modules[matched[0]]).__name__})")
        exact = {known for known in modules if known.endswith(name)} == set(matched)
        found += [name] if exact else matched
    return list(dict.fromkeys(found))


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that can have adapters: linear ones of the language model, without the output projection."""
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    within = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), "")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.startswith(within)
    ]


def _for_all_linear(model: PreTrainedModel, layers: Sequence[str]) -> list[str]:
    chosen = [name for name in layers if not ROUTERS.search(name)]
    refused = why_refused(model, chosen)
    return [name for name in chosen if last(name) not in refused]


def last(name: str) -> str:
    """The end of a module's name, such as q_proj."""
    return name.rpartition(".")[2]


def count_by_end(names: Iterable[str]) -> str:
    """`q_proj x 28, v_proj x 28`."""
    return ", ".join(f"{end} x {count}" for end, count in sorted(Counter(map(last, names)).items()))


def why_refused(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """Ends of names that peft takes for something else in this model -> why.

    Under transformers 5 the experts of Mixtral's and Qwen's relatives are one tensor. peft takes the old names of their
    matrices for that tensor, also where a dense layer or a shared expert has the same: it would train other weights
    than were named. And kernels of Mamba are given the weight of a layer that is never called.
    """
    found = {}
    for end in sorted(set(map(last, layers))):
        if (why := _why_no_adapter(model, end)) is not None:
            found[end] = why
    return found


def _why_no_adapter(model: PreTrainedModel, end: str) -> str | None:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    probe = LoraConfig(target_modules=[end])
    try:
        convert_peft_config_for_transformers(probe, model, get_model_conversion_mapping(model))
    except ValueError:  # one half of what is one tensor now
        return FUSED
    if probe.target_parameters:
        return FUSED
    source = inspect.getsource(sys.modules[type(model).__module__])
    if re.search(rf"\bself\.{re.escape(end)}\.weight(?=[\s,)]|\.(type|to|t|T)\b)", source):
        return "the model reads its weight and does not call it"
    return None


# ---- Names


def _named(model: PreTrainedModel, asked: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The layers that are named, in the order of the model."""
    chosen: set[str] = set()
    experts = expert_tensors(model)
    for name in asked:
        found = {layer for layer in layers if _matches(layer, name)}
        if not found and not any(_matches(tensor, name) for tensor in experts):
            raise UserError(f"lora_targets: {_why_no_layer(model, name, [*_for_all_linear(model, layers), *experts])}")
        chosen |= found
    return [layer for layer in layers if layer in chosen]


def _matches(layer: str, name: str) -> bool:
    """Whether a layer's name ends with this one, or the whole of it is what a regular expression says."""
    try:
        return _ends_with(layer, name) or re.fullmatch(name, layer) is not None
    except re.error as error:
        raise UserError(f"lora_targets: {name!r} is neither a name nor a regular expression: {error}") from None


def _ends_with(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _why_no_layer(model: PreTrainedModel, name: str, layers: Sequence[str]) -> str:
    if not layers:
        return f"{name!r}: {_no_linear_layer(model)}"
    if name == ALL_LINEAR:
        return f"{ALL_LINEAR} is said alone, or with {EXPERTS}"
    others = [(known, module) for known, module in model.named_modules() if known and _matches(known, name)]
    for known, module in others:
        if module in (model.get_input_embeddings(), model.get_output_embeddings()):
            return (
                f"{last(known)}: an adapter merged into an embedding or an output projection, which may be one tensor, "
                f"would change both: write lora_modules_to_save: [{last(known)}], which trains it whole"
            )
    if others:
        kind = type(others[0][1]).__name__
        return f"{name!r} is no linear layer ({kind}): adapters can be on {_near(name, layers)}"
    tensors = [known for known, p in model.named_parameters() if _matches(known, name)]
    if tensors:
        return f"{name!r} is a tensor ({tensors[0]}), no linear layer: adapters can be on {_near(name, layers)}"
    return f"{name!r} matches no layer of this model; near it: {_near(name, layers)}"


def _near(name: str, known: Sequence[str]) -> str:
    """The ends of names that are most like this one; those there are, where none is."""
    ends = sorted({last(other) for other in known if other})
    return ", ".join(difflib.get_close_matches(last(name), ends, n=3, cutoff=0.4) or ends[:8])


def _no_linear_layer(model: PreTrainedModel) -> str:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices = [m for m in model.modules() if m not in ends and len(whole_shape(getattr(m, "weight", None))) == 2]
    kinds = ", ".join(sorted({type(module).__name__ for module in matrices if not isinstance(module, nn.Embedding)}))
    return (
        f"{type(model).__name__} has no linear layer beside its output projection that can have an adapter (its "
        f"matrices are of {kinds or 'no module'}): write adapter: none, perhaps with train_only"
    )


def whole_shape(weight: Any) -> tuple[int, ...]:
    """Also under ZeRO-3, which leaves a weight no shape of its own."""
    return tuple(getattr(weight, "ds_shape", getattr(weight, "shape", ())))


def _as_named(chosen: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Ends of names where they match the chosen ones and nothing else."""
    ends = set(map(last, chosen))
    alone = {name for name in modules if last(name) in ends} == set(chosen)
    return sorted(ends) if alone else list(chosen)
