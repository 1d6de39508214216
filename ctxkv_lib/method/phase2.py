"""Phase 2: train the layer on cached streams to predict the next token."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .caches import DTYPES, Batch, Cache
from .config import Phase2Config
from .loop import Diverged, Loop, Metric
from .memory import snapshot
from .model import ContextKV
from .optimizer import ScheduledAdamW, Stepper
from .scoring import mean_scores, perplexity

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
    train: Cache,
    validation: Cache,
    config: Phase2Config,
    seed: int,
    precision: str = "fp32",
    loop: Loop | None = None,
) -> Phase2Result:
    """Train `model` in place and leave it with the best epoch's weights.

    Each epoch's order and dropout depend only on the seed and the epoch, so a resumed run gives the same
    numbers as an uninterrupted run. Raises Diverged if the loss is not finite.

    Args:
        precision: the dtype of matrix products in training, fp32 or bf16 (see `batch_gradients`). Sums, the
            optimiser and validation use float32.
    """
    loop = loop or Loop()
    model.set_phase(2)
    weights = model.trained_weights()
    state = Phase2State(weights, STEPPERS[config.optimizer](weights, config, len(train)))
    loop.restore(state)
    metrics = state.metrics
    best_ppl = min((metric["val_ppl"] for metric in metrics), default=math.inf)
    no_improve = metrics[-1]["no_improve"] if metrics else 0
    while len(metrics) < config.max_epochs and no_improve < config.patience:
        epoch, began = len(metrics) + 1, time.perf_counter()
        train_loss = train_epoch(model, train, state.stepper, config, seed, epoch, precision, loop)
        with state.stepper.averaged():
            val_loss, val_acc = mean_scores(model, validation, loop)
            validated = {name: weight.detach().clone() for name, weight in weights.items()}
        train_ppl, val_ppl = perplexity(train_loss), perplexity(val_loss)
        if not (math.isfinite(train_ppl) and math.isfinite(val_ppl)):
            raise _diverged(epoch, f"train loss {train_loss}, validation loss {val_loss}", config)
        improved = val_ppl < best_ppl
        if improved:
            best_ppl, state.best = val_ppl, validated
        no_improve = 0 if improved else no_improve + 1
        metric = {"stage": "phase2", "epoch": epoch, "train_ppl": train_ppl, "val_ppl": val_ppl}
        metric |= {"val_acc": val_acc, "improved": improved, "no_improve": no_improve}
        metric |= {"seconds": round(time.perf_counter() - began, 3)}
        metrics.append(metric | {"memory": snapshot(f"epoch {epoch}", model.device)})
        loop.after_round(state, metrics[-1])
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
    train: Cache,
    stepper: Stepper,
    config: Phase2Config,
    seed: int,
    epoch: int,
    precision: str,
    loop: Loop,
) -> float:
    """Train on every position once, and return the mean loss in nats; see `train_layer` for the arguments.

    After every `CHECKED_STEPS` steps within the epoch, `loop.after_steps` gets the mean loss of these steps.
    """
    model.train()
    torch.manual_seed(epoch_seed(seed, epoch))  # for dropout
    size, steps = config.batch_size, -(-len(train) // config.batch_size)
    table = model.wte.weight.detach().to(DTYPES[precision])
    # An epoch may have millions of steps, so the loss is summed in float64, which mps does not support.
    sum_dtype = torch.float32 if model.device.type == "mps" else torch.float64
    total, last_sum = torch.zeros((), dtype=sum_dtype, device=model.device), 0.0
    batches = model.batches(train, epoch_order(len(train), seed, epoch, model.window.chunk), size, loop.shard)
    for step, batch in enumerate(loop.track(batches, f"Epoch {epoch} of {config.max_epochs}", steps)):
        stepper.schedule((epoch - 1) * steps + step)
        count = min(size, len(train) - step * size)
        total += train_step(model, table, stepper, loop, batch, count, precision)
        if (step + 1) % CHECKED_STEPS == 0 and step + 1 < steps:  # not at the end
            loss_sum = total.item()
            if not math.isfinite(loss_sum):
                raise _diverged(epoch, f"by step {step + 1} of {steps} the loss is {loss_sum}", config)
            metric = {"stage": "phase2", "epoch": epoch, "step": step + 1, "steps": steps}
            metric |= {"loss": (loss_sum - last_sum) / (CHECKED_STEPS * size)}
            loop.after_steps(metric | {"learning_rate": stepper.optimizer.param_groups[0]["lr"]})
            last_sum = loss_sum
    return total.item() / len(train)


def train_step(
    model: ContextKV,
    table: Tensor,
    stepper: Stepper,
    loop: Loop,
    batch: Batch,
    count: int,
    precision: str = "fp32",
) -> Tensor:
    """Take one step, and return the loss summed over the batch's `count` positions, on the device.

    `table` is the token table in the dtype of `precision`. `batch` has only this process's rows.
    """
    shard = loop.shard(count)
    stepper.optimizer.zero_grad()
    with nullcontext() if shard == slice(0, count) else ShardedDropout(count, shard):
        loss = batch_gradients(model, table, count, batch, precision)
    for weight in stepper.weights.values():  # an empty batch leaves no gradient
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    loop.all_reduce([loss, *(weight.grad for weight in stepper.weights.values() if weight.grad is not None)])
    stepper.step()
    return loss


def batch_gradients(
    model: ContextKV, table: Tensor, count: int, batch: Batch, precision: str = "fp32"
) -> Tensor:
    """Accumulate the gradients of the summed loss / `count`; return the summed loss, on the device.

    With bf16, matrix products are computed in bf16: in the layer by autocast, and in the output head because
    `table` is bf16. Sums are float32.
    """
    with torch.autocast(model.device.type, torch.bfloat16, precision == "bf16", cache_enabled=False):
        hidden, _ = model.read(batch)
    losses, _ = model.losses(hidden, batch.tokens, batch.targets, table)
    (losses.sum() / count).backward()
    return losses.detach().sum()


class ShardedDropout(TorchFunctionMode):
    """A mode in which `nn.Dropout` drops the same values in several processes as in a single process.

    Each process computes the rows `shard` of a batch of `batch_size` rows. If a tensor has as many rows as
    the shard, dropout draws a mask for the whole batch from the random state that all processes share. It
    then applies only the shard's rows of the mask.
    """

    def __init__(self, batch_size: int, shard: slice) -> None:
        super().__init__()
        self.batch_size, self.shard = batch_size, shard

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs, rows = kwargs or {}, self.shard.stop - self.shard.start
        if function is not F.dropout or len(args[0]) != rows:
            return function(*args, **kwargs)
        mask = F.dropout(args[0].new_ones(self.batch_size, *args[0].shape[1:]), **kwargs)
        return args[0] * mask[self.shard]


def _diverged(epoch: int, cause: str, config: Phase2Config) -> Diverged:
    return Diverged(
        f"Phase 2 diverged in epoch {epoch} ({cause}); lower phase2.learning_rate (here "
        f"{config.learning_rate:g})."
    )
