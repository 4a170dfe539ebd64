"""What a training run reports. Torch-free, so that whoever shows it need not load torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """Describe one step, the same on every rank but for the times."""

    generation: int
    step: int  # steps done, this one included
    loss: float  # nats per token, mean over the tokens of all ranks; without the router's losses
    grad_norm: float  # global, before clipping
    lr: float
    num_tokens: int  # targets, over all ranks
    committed: bool  # False: loss or gradient was not finite, and no rank changed a weight
    step_s: float  # this rank's wall time, all parts included
    parts_s: dict[str, float]  # data, forward_backward, reduce, optimizer, checkpoint_stall
    expert_load_max_over_mean: float | None  # of the worst layer; None for a dense model
    expert_entropy: float | None  # nats, mean over layers; ln(num_experts) at balance
    load_balance_loss: float | None  # mean over layers, unweighted; 1 at balance
    z_loss: float | None  # mean over layers, unweighted
    time: float  # unix_s, at the end of the step


@dataclass(frozen=True)
class EvalResult:
    """Give the loss on held-out samples."""

    step: int
    loss: float  # nats per token
    num_tokens: int


@dataclass(frozen=True)
class TrainResult:
    """Say how a run ended."""

    step: int
    stopped: bool  # True: asked to stop before the last step
    weights_sha256: str  # of the global weights: the same for the same weights in any layout
