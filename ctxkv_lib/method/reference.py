"""The published method in slow but simple code. Tests compare the package with this module.

The module imports nothing from the package. Letters for sizes: n tokens, vocabulary V, `hidden_size` H,
`context_dim` C, batch B, S slots. `p` is a dict of float32 tensors:
`context_block.linear.weight` [C, C+H], `attention.{q,k,v,out}.weight`, `feed_forward.{up,down}.weight`, a
`.norm.weight` for each of these three parts, and all biases. `table` [V, H] is the raw token embedding, which
is also the output head. Training updates the tensors in `p` in place, so pass clones. `ids` are input tokens,
each with one context; `train_ids` and `val_ids` have one more token, the last target. `config` has the fields
of `Phase1Config` or `Phase2Config`, and `shape` the fields of `ModelConfig`.
"""

import math

import torch
import torch.nn.functional as F


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.norm.weight"], p[f"{name}.norm.bias"], eps=1e-5)


def normed_embedding(table, ids):
    """Return token embeddings after the untrained LayerNorm: (n,) -> (n, H)."""
    return F.layer_norm(table[ids], table.shape[-1:], eps=1e-5)


def context_block(p, c, x):
    """Compute c' = LayerNorm(c + GELU(Linear(concat(c, x)))): (n, C), (n, H) -> (n, C)."""
    return norm(p, "context_block", c + F.gelu(linear(p, "context_block.linear", torch.cat([c, x], dim=-1))))


def shifted(contexts):
    """Shift contexts by one position: row i becomes the context of position i - 1, and row 0 is zero."""
    return torch.cat([torch.zeros_like(contexts[:1]), contexts[:-1]])


def dispersion_loss(x, centroid_weight):
    """Compute -||X - mean(X)||_F / n + centroid_weight * ||mean(X)||^2 for X (n, C)."""
    mean = x.mean(dim=0)
    return -torch.norm(x - mean) / len(x) + centroid_weight * (mean**2).sum()


def trainable(p, prefixes):
    """Switch on gradients for the tensors of `p` whose names start with `prefixes`; return the tensors."""
    return [tensor.requires_grad_(True) for name, tensor in p.items() if name.startswith(prefixes)]


def phase1_iteration(p, optimizer, x, contexts, generator, config):
    """Do one pass over the stream and one optimizer step.

    `x` (n, H) are token embeddings. `contexts` (n, C) are those of the previous iteration. Returns the new
    contexts (n, C), the mean loss, and the convergence rate.
    """
    previous = shifted(contexts)
    starts = range(0, len(x), config.batch_size)
    outputs, losses = [], []
    optimizer.zero_grad()
    for start in starts:
        c = previous[start : start + config.batch_size]
        noise = torch.randn(c.shape, generator=generator, device=c.device)
        output = context_block(p, c + noise * config.noise_std, x[start : start + config.batch_size])
        loss = dispersion_loss(output, config.centroid_weight)
        (loss / len(starts)).backward()
        outputs.append(output.detach())
        losses.append(loss.item())
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip_norm)
    optimizer.step()

    new_contexts = torch.cat(outputs)
    change = ((new_contexts - contexts) ** 2).mean(dim=1)
    converged = (change < config.convergence_threshold).sum().item() / len(x)
    return new_contexts, sum(losses) / len(losses), converged


def phase1(p, table, train_ids, config, seed):
    """Train the ContextBlock. Rates are from 0 to 1; `losses[0]` and `rates[0]` belong to iteration 2."""
    generator = torch.Generator().manual_seed(seed)
    parameters = trainable(p, ("context_block.",))
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    x = normed_embedding(table, train_ids[:-1])
    size = len(x), len(p["context_block.linear.weight"])
    contexts = torch.randn(size, generator=generator) * config.initial_std
    losses, rates, stalled, stop_reason = [], [], 0, "max_iterations"
    for _ in range(2, config.max_iterations + 1):
        contexts, loss, rate = phase1_iteration(p, optimizer, x, contexts, generator, config)
        losses.append(loss)
        rates.append(rate)
        if rate >= config.stop_rate:
            stop_reason = "converged"
            break
        gained_little = len(rates) > 1 and rate - rates[-2] < config.plateau_gain
        stalled = stalled + 1 if rate > config.plateau_rate and gained_little else 0
        if stalled >= config.plateau_patience:
            stop_reason = "plateau"
            break
    for tensor in parameters:
        tensor.requires_grad_(False)
    result = {"losses": losses, "rates": rates, "iterations": 1 + len(rates)}
    return result | {"stop_reason": stop_reason, "contexts": contexts}


@torch.no_grad()
def parallel_pass(p, table, ids, contexts):
    """Do one parallel pass without noise: (n,), (n, C) -> (n, C)."""
    return context_block(p, shifted(contexts), normed_embedding(table, ids))


def validation_contexts(p, table, ids, passes, initial_std, generator):
    """Do `passes` parallel passes, starting from contexts drawn from N(0, initial_std): (n,) -> (n, C)."""
    size = len(ids), len(p["context_block.linear.weight"])
    contexts = torch.randn(size, generator=generator) * initial_std
    for _ in range(passes):
        contexts = parallel_pass(p, table, ids, contexts)
    return contexts


@torch.no_grad()
def exact_contexts(p, table, ids):
    """Compute contexts by the true recurrence, one position at a time from a zero vector: (n,) -> (n, C)."""
    c = torch.zeros(1, len(p["context_block.linear.weight"]))
    contexts = []
    for x in normed_embedding(table, ids):
        c = context_block(p, c, x[None])
        contexts.append(c)
    return torch.cat(contexts)


def effective_rank(contexts, max_rows, generator):
    """Compute exp(entropy of the normalized singular values) / C from at most `max_rows` random rows."""
    if len(contexts) > max_rows:
        contexts = contexts[torch.randperm(len(contexts), generator=generator)[:max_rows]]
    s = torch.linalg.svdvals(contexts)
    s = s[s > 0] / s.sum()
    return math.exp(-(s * s.log()).sum().item()) / contexts.shape[1]


def gather_slots(contexts, positions, shape):
    """Return contexts[i - interval * k] for k < max_contexts, (B, S, C), and which of them exist, (B, S)."""
    index = positions[:, None] - shape.interval * torch.arange(shape.max_contexts, device=positions.device)
    exists = index >= 0
    return contexts[index.clamp(min=0)] * exists[..., None], exists


def phase2_logits(p, table, ids, contexts, positions, shape, dropout=0.0):
    """Compute next-token logits (B, V) at `positions` (B,).

    If `kv_method` is "variable", slots before the start of the stream are masked. If `kv_method` is "fixed",
    attention treats these slots as zero vectors.
    """
    x = normed_embedding(table, ids[positions])  # (B, H)
    slots, exists = gather_slots(contexts, positions, shape)
    q = linear(p, "attention.q", x).unflatten(-1, (shape.num_heads, -1))  # (B, heads, D)
    k = linear(p, "attention.k", slots).unflatten(-1, (shape.num_heads, -1))  # (B, S, heads, D)
    v = linear(p, "attention.v", slots).unflatten(-1, (shape.num_heads, -1))

    scores = torch.einsum("bhd,bshd->bhs", q, k) / math.sqrt(q.shape[-1])
    if shape.kv_method == "variable":
        scores = scores.masked_fill(~exists[:, None, :], -math.inf)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    mixed = torch.einsum("bhs,bshd->bhd", weights, v).flatten(1)  # (B, H)

    h = norm(p, "attention", x + linear(p, "attention.out", mixed))
    h = h + norm(p, "feed_forward", linear(p, "feed_forward.down", F.gelu(linear(p, "feed_forward.up", h))))
    return h @ table.T


@torch.no_grad()
def evaluate(p, table, all_ids, contexts, batch_size, shape):
    """Compute the mean next-token loss and the accuracy over all input positions of `all_ids`."""
    total_loss, correct, n = 0.0, 0, len(all_ids) - 1
    for positions in torch.arange(n).split(batch_size):
        logits = phase2_logits(p, table, all_ids, contexts, positions, shape)
        targets = all_ids[positions + 1]
        total_loss += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += (logits.argmax(dim=-1) == targets).sum().item()
    return total_loss / n, correct / n


def phase2(p, table, train_ids, train_contexts, val_ids, val_contexts, shape, config, permutations):
    """Train attention and feed-forward. `permutations(epoch)` returns the order of positions in an epoch.

    Epochs count from 1. Afterwards, `p` contains the weights of the last epoch, not of the best epoch.
    Dropout uses torch's global random state.
    """
    parameters = trainable(p, ("attention.", "feed_forward."))
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    epochs, best_ppl, best_epoch, no_improve, stop_reason = [], math.inf, 0, 0, "max_epochs"
    for epoch in range(1, config.max_epochs + 1):
        total_loss, n = 0.0, len(train_ids) - 1
        for positions in permutations(epoch).split(config.batch_size):
            dropout = shape.attention_dropout
            logits = phase2_logits(p, table, train_ids, train_contexts, positions, shape, dropout)
            loss = F.cross_entropy(logits, train_ids[positions + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item() * len(positions)
        val_loss, val_acc = evaluate(p, table, val_ids, val_contexts, config.batch_size, shape)
        val_ppl = math.exp(val_loss)
        no_improve += 1
        if improved := val_ppl < best_ppl:
            best_ppl, best_epoch, no_improve = val_ppl, epoch, 0
        row = {"epoch": epoch, "train_ppl": math.exp(total_loss / n), "val_ppl": val_ppl, "val_acc": val_acc}
        epochs.append(row | {"improved": improved, "no_improve": no_improve})
        if no_improve >= config.patience:
            stop_reason = "early_stopping"
            break
    for tensor in parameters:
        tensor.requires_grad_(False)
    return {"epochs": epochs, "best_epoch": best_epoch, "stop_reason": stop_reason}
