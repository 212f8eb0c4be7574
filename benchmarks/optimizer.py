"""What AdamW costs by implementation: CPU seconds of a step, on a model's own tensors and on one rank's flat share.

python benchmarks/optimizer.py --model demo/model                  # after `make demo`; only config.json is read
python benchmarks/optimizer.py --model demo/model --deepspeed      # its CPU Adam, too, which is compiled first
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

KINDS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False, "fused": False}}
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--deepspeed", action="store_true", help="measure DeepSpeed's CPU Adam as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Trainer's default: {TrainingArguments(output_dir='none', use_cpu=True).optim.value}")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(given.model), dtype=torch.float32)
    own = list(model.parameters())
    whole = torch.cat([parameter.detach().flatten() for parameter in own])
    share = [torch.nn.Parameter(whole[: len(whole) // 2].clone())]
    for what, parameters in (("no DeepSpeed", own), ("ZeRO, one of two ranks", share)):
        best = measure(parameters, deepspeed=given.deepspeed)
        ratios = ", ".join(f"{kind} {seconds / best['fused']:.1f} x" for kind, seconds in best.items())
        print(f"{what}: {len(parameters)} tensors, {sum(p.numel() for p in parameters) / 1e6:.0f} M parameters: "
              f"{best['fused'] * 1e3:.0f} CPU ms fused; {ratios}")  # fmt: skip


def measure(parameters: list[torch.nn.Parameter], *, deepspeed: bool) -> dict[str, float]:
    """CPU seconds of the fastest step of each kind, their steps in turn."""
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizers: dict[str, torch.optim.Optimizer] = {
        kind: torch.optim.AdamW(parameters, lr=1e-4, **options) for kind, options in KINDS.items()
    }
    if deepspeed:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizers["DeepSpeed's"] = DeepSpeedCPUAdam(parameters, lr=1e-4, adamw_mode=True)
    for optimizer in optimizers.values():
        optimizer.step()  # makes its states
    best = dict.fromkeys(optimizers, float("inf"))
    for kind, optimizer in list(optimizers.items()) * ROUNDS:
        started = time.process_time()
        optimizer.step()
        best[kind] = min(best[kind], time.process_time() - started)
    for parameter in parameters:
        parameter.grad = None
    return best


if __name__ == "__main__":
    main()
