"""The state of a model and its optimizer, whole and on the CPU, however the processes share it (DDP, FSDP2).

Of torch.distributed.checkpoint; parameters go by their names, the optimizer's too. All processes call these together.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict; where it is sharded, the main process alone gets it and the others an empty one."""
    return get_model_state_dict(model, options=GATHERED)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """The optimizer's state dict by names of parameters, as `model_state` for the main process alone.

    None before its first step, which torch would take in order to have a state.
    """
    if not optimizer.state:
        return None
    return get_optimizer_state_dict(model, optimizer, options=GATHERED)


def restore(model: nn.Module, optimizer: Optimizer, states: dict[str, Any]) -> None:
    """Gives every process its part of whole states, which each of them has.

    Args:
        states: "model" and "optimizer", as `model_state` and `optimizer_state` returned them.
    """
    if states["optimizer"] is not None:
        set_optimizer_state_dict(model, optimizer, states["optimizer"], options=SPREAD)  # takes a step of rate 0
    set_model_state_dict(model, states["model"], options=SPREAD)
