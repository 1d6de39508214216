"""Phase 2: train the layer on a stream to predict the next token."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .callback import Callback, Diverged, Metric
from .config import Phase2Config
from .memory import snapshot
from .model import ContextKV
from .optimizer import ScheduledAdamW, Stepper
from .scoring import mean_scores, perplexity
from .streams import DTYPES, Batch, Stream

CHECKED_STEPS = 50  # steps between checks of the loss; each check makes the CPU wait for the GPU
# Positions per shuffle pool, and blocks of consecutive positions per pool. Shuffling within one pool at a
# time limits random reads to 4 GiB of contexts for a stream of any length.
POOL, POOL_BLOCKS = 2**22, 8
STEPPERS: dict[str, type[Stepper]] = {"adamw": Stepper, "scheduled": ScheduledAdamW}


@dataclass
class Phase2State:
    """The state that Phase 2 needs in order to resume after an epoch."""

    weights: dict[str, nn.Parameter]  # trained parameters by name
    stepper: Stepper
    metrics: list[Metric] = field(default_factory=list)  # metrics of the finished epochs
    best: dict[str, Tensor] = field(default_factory=dict)  # weights of the best epoch


@dataclass(frozen=True)
class Phase2Result:
    epochs: list[Metric]
    stop_reason: str  # early_stopping | max_epochs


def train_layer(
    model: ContextKV,
    train: Stream,
    validation: Stream,
    config: Phase2Config,
    seed: int,
    precision: str = "fp32",
    callback: Callback | None = None,
) -> Phase2Result:
    """Train `model` in place and leave it with the best epoch's weights.

    Each epoch's order and dropout depend only on the seed and the epoch, so a resumed run gives the same
    numbers as an uninterrupted run. Raises Diverged if the loss is not finite.

    Args:
        precision: the dtype of matrix products in training, fp32 or bf16 (see `batch_gradients`). Sums, the
            optimizer and validation use float32.
    """
    callback = callback or Callback()
    model.set_phase(2)
    weights = model.trained_weights()
    state = Phase2State(weights, STEPPERS[config.optimizer](weights, config, len(train)))
    callback.restore(state)
    metrics = state.metrics
    best_ppl = min((metric["val_ppl"] for metric in metrics), default=math.inf)
    no_improve = metrics[-1]["no_improve"] if metrics else 0
    while len(metrics) < config.max_epochs and no_improve < config.patience:
        epoch, began = len(metrics) + 1, time.perf_counter()
        train_loss = train_epoch(model, train, state.stepper, config, seed, epoch, precision, callback)
        with state.stepper.averaged():
            val_loss, val_acc = mean_scores(model, validation, callback)
            train_ppl, val_ppl = perplexity(train_loss), perplexity(val_loss)
            if not (math.isfinite(train_ppl) and math.isfinite(val_ppl)):
                raise _diverged(epoch, f"train loss {train_loss}, validation loss {val_loss}", config)
            if improved := val_ppl < best_ppl:
                best_ppl = val_ppl
                state.best = {name: weight.detach().clone() for name, weight in weights.items()}
        no_improve = 0 if improved else no_improve + 1
        metric = {"stage": "phase2", "epoch": epoch, "train_ppl": train_ppl, "val_ppl": val_ppl}
        metric |= {"val_acc": val_acc, "improved": improved, "no_improve": no_improve}
        metric |= {"seconds": round(time.perf_counter() - began, 3)}
        metrics.append(metric | {"memory": snapshot(f"epoch {epoch}", model.device)})
        callback.after_round(state, metrics[-1])
    for name, weight in weights.items():
        weight.data.copy_(state.best[name])
    model.eval()
    return Phase2Result(metrics, "early_stopping" if no_improve >= config.patience else "max_epochs")


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the random seed for an epoch's order and dropout, within the range that torch accepts."""
    return (seed * 1_000_003 + epoch) % 2**63


def epoch_order(count: int, seed: int, epoch: int, chunk: int = 1) -> Tensor:
    """Draw the order in which an epoch visits `count` positions, int64 `[count]` on the CPU.

    The order is a permutation that depends only on `seed` and `epoch`. A stream of more than `POOL` positions
    is cut into blocks. The blocks are permuted and grouped into pools, and the positions are permuted within
    each pool. If `chunk` is above 1, chunks of `chunk` consecutive positions are permuted instead, and each
    epoch cuts the stream at different places.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    positions = torch.arange(count)
    if chunk > 1:
        shift = int(torch.randint(chunk, (), generator=generator))
        chunks = [positions[:shift], *positions[shift:].split(chunk)]
        return torch.cat([chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()])
    if count <= POOL:
        return torch.randperm(count, generator=generator)
    blocks = positions.split(max(1, POOL // POOL_BLOCKS))
    pools = torch.randperm(len(blocks), generator=generator).split(POOL_BLOCKS)
    pooled = [torch.cat([blocks[number] for number in pool.tolist()]) for pool in pools]
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for pool in pooled])


def train_epoch(
    model: ContextKV,
    train: Stream,
    stepper: Stepper,
    config: Phase2Config,
    seed: int,
    epoch: int,
    precision: str,
    callback: Callback,
) -> float:
    """Train on every position once, and return the mean loss in nats; see `train_layer` for the arguments.

    After every `CHECKED_STEPS` steps within the epoch, `callback.after_steps` gets their mean loss.
    """
    model.train()
    torch.manual_seed(epoch_seed(seed, epoch))  # for dropout
    size, steps = config.batch_size, -(-len(train) // config.batch_size)
    table = model.wte.weight.detach().to(DTYPES[precision])
    # An epoch may have millions of steps, so the loss is summed in float64, which mps does not support.
    sum_dtype = torch.float32 if model.device.type == "mps" else torch.float64
    total, last_sum = torch.zeros((), dtype=sum_dtype, device=model.device), 0.0
    batches = model.batches(train, epoch_order(len(train), seed, epoch, model.window.chunk), size)
    for step, batch in enumerate(callback.track(batches, f"Epoch {epoch} of {config.max_epochs}", steps)):
        stepper.schedule((epoch - 1) * steps + step)
        total += train_step(model, table, stepper, batch, precision)
        if (step + 1) % CHECKED_STEPS == 0 and step + 1 < steps:  # not at the end
            loss_sum = total.item()
            if not math.isfinite(loss_sum):
                raise _diverged(epoch, f"by step {step + 1} of {steps} the loss is {loss_sum}", config)
            metric = {"stage": "phase2", "epoch": epoch, "step": step + 1, "steps": steps}
            metric |= {"loss": (loss_sum - last_sum) / (CHECKED_STEPS * size)}
            callback.after_steps(metric | {"learning_rate": stepper.optimizer.param_groups[0]["lr"]})
            last_sum = loss_sum
    return total.item() / len(train)


def train_step(
    model: ContextKV,
    table: Tensor,
    stepper: Stepper,
    batch: Batch,
    precision: str = "fp32",
) -> Tensor:
    """Take one step, and return the loss summed over the batch's positions, on the device.

    `table` is the token table in the dtype of `precision`.
    """
    stepper.optimizer.zero_grad()
    loss = batch_gradients(model, table, batch, precision)
    stepper.step()
    return loss


def batch_gradients(model: ContextKV, table: Tensor, batch: Batch, precision: str = "fp32") -> Tensor:
    """Accumulate the gradients of the mean loss; return the summed loss, on the device.

    With bf16, matrix products are computed in bf16: in the layer by autocast, and in the output head because
    `table` is bf16. Sums are float32.
    """
    with torch.autocast(model.device.type, torch.bfloat16, precision == "bf16", cache_enabled=False):
        hidden, _ = model.read(batch)
    losses, _ = model.losses(hidden, batch.tokens, batch.targets, table)
    (losses.sum() / len(batch)).backward()
    return losses.detach().sum()


def _diverged(epoch: int, cause: str, config: Phase2Config) -> Diverged:
    return Diverged(
        f"Phase 2 diverged in epoch {epoch} ({cause}); lower phase2.learning_rate (here "
        f"{config.learning_rate:g})."
    )
